"""One update by a DeepSpeed engine, reported as danling's own is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.optim import OptimizerStep
from danling.optim.step import OptimizerStepResult


class EngineStep:
    """The update of an engine together with the scheduler, which stays danling's.

    Args:
        engine: whose gradients are reduced.
        optimizer: the one that the engine carries.
        scheduler: it moves once per applied update.
        interval: `"step"` or `"epoch"`: when the scheduler moves.
        skip_nonfinite: skip updates with infinite or NaN gradients where the engine does not look for them.

    Attributes:
        engine_looks: whether the engine skips such updates, whatever it is told here.
    """

    def __init__(self, engine: Any, optimizer: Any, scheduler: Any, *, interval: str, skip_nonfinite: bool) -> None:
        self.engine = engine
        reports = hasattr(engine.optimizer, "overflow")  # with ZeRO, and in reduced precision
        self.engine_looks = reports and not (
            engine.bfloat16_enabled()
            and engine.zero_optimization_stage() in (1, 2)
            and not engine.optimizer.check_grad_overflow
        )
        self._skips_itself = skip_nonfinite and not reports
        self._measures = not reports and (skip_nonfinite or engine.gradient_clipping() > 0)
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad] if self._measures else []
        self._schedule = OptimizerStep(optimizer, scheduler, interval=interval)
        self._follows_steps = scheduler is not None and interval == "step"

    def step(self) -> OptimizerStepResult:
        """Update the weights from the gradients that are there; a skipped update only clears them."""
        engine = self.engine
        norm = None
        if self._measures:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            if self._skips_itself and not bool(norm.isfinite()):
                engine.zero_grad()
                return OptimizerStepResult(False, norm)
        engine.step()
        if norm is None:
            norm = engine.get_global_grad_norm()
            if norm is not None and not isinstance(norm, Tensor):
                norm = torch.tensor(float(norm))
        if not engine.was_step_applied():
            return OptimizerStepResult(False, norm)
        if self._follows_steps:
            self._schedule.step_scheduler()
        return OptimizerStepResult(True, norm)

    def step_scheduler(self, metric: Any = None) -> None:
        """Move the scheduler; `metric` goes to one that follows a metric."""
        self._schedule.step_scheduler(metric)
