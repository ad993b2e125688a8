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
        choice = resolve_stack(config, checkpoint_stack=_checkpoint_stack(config) if config.stack == "auto" else None)
        runner: Runner = super().__new__(combine(cls, load_engine(choice.name)))
        runner.__dict__["stack_reason"] = choice.reason
        return runner


@cache
def combine(user: type, engine: type[BaseRunner]) -> type:
    """The class with bases (``user``, ``engine``): one and the same for a pair."""
    namespace = {
        "__module__": user.__module__,
        "__qualname__": user.__qualname__,
        "__doc__": user.__doc__,
        "stack": engine.stack,
    }
    return _metaclass(type(user))(user.__name__, (user, engine), namespace)


@cache
def _metaclass(base: type) -> type:
    """The metaclass of combined classes, which lets them pickle by reference to their pair."""
    metaclass = type(f"Combined{base.__name__}", (base,), {})
    copyreg.pickle(metaclass, _pair)  # type: ignore[arg-type]
    return metaclass


def _pair(combined: type) -> tuple[Any, tuple[type, ...]]:
    return combine, combined.__bases__


def _find_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The validated configuration among the arguments of a runner's constructor; the defaults when there is none."""
    from .config import RunnerConfig

    found = kwargs.get("config", next((arg for arg in args if isinstance(arg, Mapping)), None))
    return RunnerConfig.of({} if found is None else found)


def _checkpoint_stack(config: Any) -> str | None:
    """The stack that wrote the checkpoint this run is going to resume from, if any; the manifest alone is read."""
    from .errors import CheckpointError
    from .locate import list_checkpoints, resolve
    from .manifest import read_manifest
    from .workspace import Workspace

    try:
        if config.resume:
            return read_manifest(resolve(config.resume)).get("stack")
        if config.auto_resume:
            full = [
                info for info in list_checkpoints(Workspace.from_config(config).checkpoint_dir) if info.kind == "full"
            ]
            return full[-1].manifest.get("stack") if full else None
    except CheckpointError:  # reported when it is loaded
        pass
    return None
