"""What one run of the suite is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DEFAULTS: Mapping[str, Any] = {"dtype": "float64", "tolerance": 1e-9, "bf16": 2e-2, "bitwise": False}


@dataclass(frozen=True)
class Settings:
    """The engine under test and how it is run.

    Attributes:
        stack: its name.
        nproc: processes.
        dtype: of model and data.
        tolerance: largest difference from the reference, relative to the largest magnitude of a tensor.
        bf16: the same for losses in bf16; None when the engine has no bf16.
        bitwise: whether one process, or two that average, do the arithmetic of a plain loop in its order.
        overrides: configuration keys of every run, dotted.
        guarantees: numbers that the engine claims.
        claimant: name of its class.
    """

    stack: str
    nproc: int
    dtype: str = "float64"
    tolerance: float = 1e-9
    bf16: float | None = 2e-2
    bitwise: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    guarantees: Sequence[int] = tuple(range(1, 12))
    claimant: str = ""

    @classmethod
    def of(cls, stack: str, nproc: int, **options: Any) -> Settings:
        """The settings for a stack, from its class, and from options that are not None."""
        from danling.runners.discovery import load_engine

        engine = load_engine(stack)
        values = {**DEFAULTS, **getattr(engine, "conformance", {})}
        if "conformance" not in vars(engine):  # what a base does in one order, a class below it may do in another
            values["bitwise"] = False
        values |= {name: value for name, value in options.items() if value is not None}
        if unknown := set(values) - set(cls.__dataclass_fields__):
            raise ValueError(
                f"{engine.__name__}.conformance: unknown keys {sorted(unknown)}; known: {sorted(DEFAULTS)}"
            )
        return cls(stack, nproc, guarantees=sorted(engine.guarantees), claimant=engine.__name__, **values)

    def dumps(self) -> str:
        """As JSON, for the processes.

        >>> Settings.loads(Settings("torch", 2).dumps()) == Settings("torch", 2, guarantees=list(range(1, 12)))
        True
        """
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Settings:
        """Read what `dumps` wrote."""
        return cls(**json.loads(text))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE`; the value is read as YAML.

    >>> parse_override("parallel.axes.shard=2"), parse_override("deepspeed={zero_optimization: {stage: 2}}")
    (('parallel.axes.shard', 2), ('deepspeed', {'zero_optimization': {'stage': 2}}))
    """
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected KEY=VALUE, got {text!r}")
    return key, yaml.safe_load(value)
