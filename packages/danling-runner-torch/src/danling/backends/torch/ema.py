"""An exponential moving average of the weights, kept beside the model and used for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return torch's `AveragedModel` over `model`, updated by ``ema = decay * ema + (1 - decay) * weights``.

    The first update copies the weights; buffers are copied at every update. Half and bfloat16 weights are averaged in
    float32, because ``1 - decay`` is below what they can resolve.

    Args:
        model: the unwrapped model.
        decay: in (0, 1).

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> ema = build_ema(layer, 0.9)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> ema.update_parameters(layer)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> ema.update_parameters(layer)
        >>> round(ema.module.weight.item(), 4)
        1.1
    """

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], _: Tensor | int) -> None:
        floating = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point() or a.is_complex()]
        if floating:
            old, new = (list(side) for side in zip(*floating, strict=True))
            torch._foreach_lerp_(old, [c.to(a.dtype) for a, c in floating], 1 - decay)
        for a, c in zip(averaged, current, strict=True):
            if not (a.is_floating_point() or a.is_complex()):
                a.copy_(c)

    ema = AveragedModel(model, multi_avg_fn=average)
    for parameter in ema.module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    ema.requires_grad_(False)
    return ema


class EMASchedule:
    """Decides at which updates an EMA object is updated, and how.

    Args:
        ema: anything with `update_parameters(model)` or `update(model)`.
        interval: applied updates between two updates of the average.
        start_step: the first applied update that counts.

    Raises:
        TypeError: the object has neither method.

    Example:
        >>> class Count:
        ...     calls = 0
        ...     def update(self, model):
        ...         self.calls += 1
        >>> count = Count()
        >>> schedule = EMASchedule(count, interval=2, start_step=3)
        >>> for step in range(1, 8):
        ...     _ = schedule.after_update(None, step)
        >>> count.calls  # after updates 3, 5 and 7
        3
    """

    def __init__(self, ema: Any, *, interval: int = 1, start_step: int = 0) -> None:
        update = getattr(ema, "update_parameters", None) or getattr(ema, "update", None)
        if not callable(update):
            raise TypeError(
                f"ema is a {type(ema).__name__}, which has neither update_parameters(model) nor update(model); "
                "torch.optim.swa_utils.AveragedModel has the first"
            )
        self.update = update
        self.interval = interval
        self.start_step = start_step

    def after_update(self, model: nn.Module | None, global_step: int) -> bool:
        """Update the average if this applied update (counted from 1) is due; return whether it was."""
        first = max(self.start_step, 1)
        if global_step < first or (global_step - first) % self.interval:
            return False
        self.update(model)
        return True


def ema_module(ema: Any) -> nn.Module:
    """Return the module that evaluates the average: `ema.module` if it has one, else the object itself.

    Raises:
        TypeError: neither is a module.
    """
    module = getattr(ema, "module", ema)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"ema is a {type(ema).__name__}: neither it nor its `module` is a torch.nn.Module to evaluate with"
        )
    return module
