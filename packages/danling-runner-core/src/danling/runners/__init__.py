"""The life of an experiment: configuration, training loop, results, checkpoints, logs.

Every public name is resolved on first use (PEP 562), so ``import danling.runners`` loads neither torch nor chanfig. The
concrete runners (`TorchRunner`, `ParallelRunner`, `DeepSpeedRunner`, `AccelerateRunner`) come from packages of their
own and are found through the entry-point group ``danling.runners``; asking for one that is not installed raises an
`ImportError` that names the ``pip install``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_runner import BaseRunner as BaseRunner
    from .config import RunnerConfig as RunnerConfig
    from .decorators import on_local_main_process as on_local_main_process
    from .decorators import on_main_process as on_main_process
    from .discovery import stacks as stacks
    from .errors import CheckpointError as CheckpointError
    from .errors import CheckpointNotFoundError as CheckpointNotFoundError
    from .errors import ConfigError as ConfigError
    from .errors import ResumeError as ResumeError
    from .errors import RunBusyError as RunBusyError
    from .errors import StackError as StackError
    from .results import Results as Results
    from .runner import Runner as Runner
    from .state import RunnerMode as RunnerMode
    from .state import RunnerState as RunnerState
    from .store import CheckpointStore as CheckpointStore
    from .supervisor import Supervisor as Supervisor
    from .trackers import read_metrics as read_metrics
    from .workspace import Workspace as Workspace

_MODULES = {
    "base_runner": ("BaseRunner",),
    "config": ("RunnerConfig",),
    "decorators": ("on_local_main_process", "on_main_process"),
    "discovery": ("stacks",),
    "errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "ResumeError",
        "RunBusyError",
        "StackError",
    ),
    "results": ("Results",),
    "runner": ("Runner",),
    "state": ("RunnerMode", "RunnerState"),
    "store": ("CheckpointStore",),
    "supervisor": ("Supervisor",),
    "trackers": ("read_metrics",),
    "workspace": ("Workspace",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_ENGINES = {
    "TorchRunner": "torch",
    "ParallelRunner": "parallel",
    "DeepSpeedRunner": "deepspeed",
    "AccelerateRunner": "accelerate",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _ENGINES:
        value = import_module(f"{__name__}.discovery").engine_by_class_name(name, _ENGINES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
