"""Optimizers and schedulers by name, a schedule that people extend in one method, and the step of the weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .groups import param_groups
from .lr_scheduler import LRScheduler
from .step import OptimizerContainer, OptimizerStep, OptimizerStepResult

if TYPE_CHECKING:
    from .optimizers import OPTIMIZERS
    from .schedulers import SCHEDULERS

__all__ = [
    "OPTIMIZERS",
    "SCHEDULERS",
    "LRScheduler",
    "OptimizerContainer",
    "OptimizerStep",
    "OptimizerStepResult",
    "param_groups",
]

# The registries bring chanfig and YAML with them, most of the time that importing everything takes.
_REGISTRIES = {"OPTIMIZERS": ".optimizers", "SCHEDULERS": ".schedulers"}


def __getattr__(name: str) -> Any:
    if name not in _REGISTRIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registry = globals()[name] = getattr(import_module(_REGISTRIES[name], __name__), name)
    return registry


def __dir__() -> list[str]:
    return sorted({*globals(), *_REGISTRIES})
