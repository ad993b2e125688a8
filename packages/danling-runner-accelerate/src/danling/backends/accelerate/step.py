"""One update through an Accelerator: unscale, check, clip, step, schedule, clear, in danling's order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from danling.optim import OptimizerStep
from danling.optim.step import OptimizerStepResult


class AcceleratedStep:
    """The update of a prepared optimizer together with its scheduler.

    Args:
        accelerator: it clips, and holds the gradient scaler of fp16.
        optimizer: prepared by it.
        scheduler: not prepared; it moves once per update.
        interval: `"step"` or `"epoch"`: when the scheduler moves.
        clip_value: largest magnitude of a gradient element.
        clip_norm: largest norm of all gradients together.
        skip_nonfinite: skip updates with infinite or NaN gradients; with fp16 the scaler always does.
        reduce_flag: makes the verdict about them common to ranks that hold parts of the gradients.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        scheduler: Any,
        *,
        interval: str,
        clip_value: float | None,
        clip_norm: float | None,
        skip_nonfinite: bool,
        reduce_flag: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_value = clip_value
        self.clip_norm = clip_norm
        self.skip_nonfinite = skip_nonfinite
        self.reduce_flag = reduce_flag
        self._plain = OptimizerStep(optimizer, scheduler, interval=interval)

    def step(self) -> OptimizerStepResult:
        """Update the weights from the gradients that are there; a skipped update only clears them."""
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        # With a scaler the verdict is its own, taken when gradients are unscaled.
        checks = self.skip_nonfinite and scaler is None
        clips_by_norm_alone = self.clip_norm is not None and self.clip_value is None
        if checks and not clips_by_norm_alone and self._is_nonfinite():
            return self._skip(None if self.clip_norm is None else torch.tensor(torch.nan))
        norm = self._clip()
        if checks and clips_by_norm_alone and not bool(norm.isfinite()):  # type: ignore[union-attr]
            return self._skip(norm)
        self.optimizer.step()
        if scaler is not None and accelerator.optimizer_step_was_skipped:
            return self._skip(norm)
        if self._plain.interval == "step":
            self._plain.step_scheduler()
        self.optimizer.zero_grad()
        return OptimizerStepResult(True, norm)

    def step_scheduler(self, metric: Any = None) -> None:
        """Move the scheduler; `metric` goes to one that follows a metric."""
        self._plain.step_scheduler(metric)

    def _is_nonfinite(self) -> bool:
        found = self._plain.has_nan_inf_grad()
        return bool(found if self.reduce_flag is None else self.reduce_flag(found.float()))

    def _clip(self) -> Tensor | None:
        if self.clip_value is None and self.clip_norm is None:
            return None
        unique = {id(p): p for p in chain.from_iterable(group["params"] for group in self.optimizer.param_groups)}
        parameters = list(unique.values())
        if self.clip_value is not None:
            self.accelerator.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is None:
            return None
        if self.clip_value is not None:  # unscaled above, and a second time is an error
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        else:
            norm = self.accelerator.clip_grad_norm_(parameters, self.clip_norm)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()

    def _skip(self, norm: Tensor | None) -> OptimizerStepResult:
        self.optimizer.zero_grad()
        return OptimizerStepResult(False, norm)
