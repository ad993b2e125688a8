"""Schedulers by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from .lr_scheduler import LRScheduler, arguments_of
from .registry import Component, ComponentRegistry

# Curve name -> torch's scheduler of the same name, which means something else.
CURVES = {
    "linear": "linear_lr",
    "cosine": "cosine_annealing_lr",
    "constant": "constant_lr",
    "polynomial": "polynomial_lr",
    "exponential": "exponential_lr",
    "inverse_sqrt": None,
    "wsd": None,
}
SHORT = {
    "step": "StepLR",
    "multistep": "MultiStepLR",
    "cosine_annealing": "CosineAnnealingLR",
    "cosine_warm_restarts": "CosineAnnealingWarmRestarts",
    "reduce_on_plateau": "ReduceLROnPlateau",
    "cyclic": "CyclicLR",
    "one_cycle": "OneCycleLR",
    "lambda": "LambdaLR",
    "multiplicative": "MultiplicativeLR",
    "sequential": "SequentialLR",
    "chained": "ChainedScheduler",
}


class SchedulerRegistry(ComponentRegistry):
    """Builds schedulers by name.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SCHEDULERS.build(optimizer, type="cosine", total_steps=100, warmup_steps=10)
        >>> scheduler.strategy, scheduler.warmup_steps
        ('cosine', 10)
        >>> "total_steps" in SCHEDULERS.accepts("cosine"), "total_steps" in SCHEDULERS.accepts("step")
        (True, False)
    """

    def _is_subject(self, value: Any) -> bool:
        # `chained` takes schedulers first: only an optimizer is taken for the optimizer.
        return isinstance(value, torch.optim.Optimizer)


SCHEDULERS = SchedulerRegistry("scheduler", "optimizer")


def _register() -> None:
    for name in dir(torch_schedulers):
        kind = getattr(torch_schedulers, name)
        if not isinstance(kind, type) or name.startswith("_") or kind is torch_schedulers.LRScheduler:
            continue
        if issubclass(kind, torch_schedulers.LRScheduler):
            SCHEDULERS.set(_snake(name), Component(kind, "optimizer"))
    for short, name in SHORT.items():
        SCHEDULERS.alias(short, name)
    for curve, namesake in CURVES.items():
        SCHEDULERS.set(
            curve,
            Component(
                functools.partial(LRScheduler, strategy=curve),
                "optimizer",
                accepts=arguments_of(LRScheduler, curve),
                namesake=namesake if namesake in SCHEDULERS else None,
            ),
        )


def _snake(name: str) -> str:
    """Return a class name in lower case with underscores: `ReduceLROnPlateau` gives `reduce_lr_on_plateau`."""
    letters = []
    for i, letter in enumerate(name):
        starts = letter.isupper() and i > 0
        if starts and (name[i - 1].islower() or (i + 1 < len(name) and name[i + 1].islower())):
            letters.append("_")
        letters.append(letter.lower())
    return "".join(letters)


_register()
