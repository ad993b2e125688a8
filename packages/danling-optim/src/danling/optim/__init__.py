"""Optimizers and schedulers by name, a schedule that people extend in one method, and the step of the weights."""

from .groups import param_groups
from .lr_scheduler import LRScheduler
from .optimizers import OPTIMIZERS
from .schedulers import SCHEDULERS
from .step import OptimizerContainer, OptimizerStep, OptimizerStepResult

__all__ = [
    "OPTIMIZERS",
    "SCHEDULERS",
    "LRScheduler",
    "OptimizerContainer",
    "OptimizerStep",
    "OptimizerStepResult",
    "param_groups",
]
