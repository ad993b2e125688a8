"""`Runner`: the class people subclass, whose engine the configuration chooses."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from functools import cache
from typing import Any

from .base_runner import BaseRunner
from .discovery import load_engine, resolve_stack


class Runner(BaseRunner):
    """A training run on whichever engine the configuration names.

    Subclass it, assign ``model``, ``criterion``, ``datasets`` and ``metrics`` in ``__init__``, and call `train`:

    ```python
    class Digits(dl.Runner):
        def __init__(self, config):
            super().__init__(config)
            self.model = build_model()
            self.criterion = torch.nn.CrossEntropyLoss()
            self.datasets.train, self.datasets.val = load_digits()
    ```

    ``Digits(config)`` is an instance of ``Digits``, of `Runner`, and of the engine's class, which ``super()`` reaches:
    the class of the instance has the bases (``Digits``, engine). It is made once per pair, bears the name of ``Digits``
    and pickles as the pair; no class is changed.

    Args:
        config: a `RunnerConfig` or a mapping; it is copied.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Runner:
        """Choose the engine and make an instance of the combined class."""
        if cls.stack is not None:  # an engine is among the bases, or this is a combined class already
            return super().__new__(cls)
        config = _find_config(args, kwargs)
        choice = resolve_stack(config, checkpoint_stack=_checkpoint_stack(cls, config))
        runner = super().__new__(combine(cls, load_engine(choice.name)))
        runner.__dict__["stack_reason"] = choice.reason
        return runner


class _Combined(type(BaseRunner)):  # type: ignore[misc]
    """Marks the classes made by `combine`, so that they pickle by reference to their pair."""


@cache
def combine(user: type, engine: type[BaseRunner]) -> type:
    """The class with bases (``user``, ``engine``): one and the same for a pair."""
    namespace = {
        "__module__": user.__module__,
        "__qualname__": user.__qualname__,
        "__doc__": user.__doc__,
        "stack": engine.stack,
    }
    return _Combined(user.__name__, (user, engine), namespace)


def _pair(combined: type) -> tuple[Any, tuple[type, ...]]:
    return combine, combined.__bases__


copyreg.pickle(_Combined, _pair)  # type: ignore[arg-type]


def _find_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The validated configuration among the arguments of a runner's constructor; the defaults when there is none."""
    from .config import RunnerConfig

    found = kwargs.get("config", next((arg for arg in args if isinstance(arg, Mapping)), None))
    return RunnerConfig.of({} if found is None else found)


def _checkpoint_stack(cls: type[Runner], config: Any) -> str | None:
    """The stack that wrote the checkpoint this run is going to resume from, if any."""
    return None
