"""The commonest step of training in one function: one process, one tensor in, one tensor out, every hook as it comes.

Between the operations of a small model each call of a method costs about a microsecond. `Training.train_step` and the hooks
below it stay the rule; this is the same sequence without the calls, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .runner import TorchRunner
    from .window import Window

FUSED = (
    "train_step",
    "to_device",
    "train_context",
    "forward_context",
    "forward",
    "_loss",
    "train_metrics",
    "advance",
    "backward",
    "backpropagate",
    "record_loss",
)


def is_plain(runner: TorchRunner) -> bool:
    """Whether nothing between a batch and its gradients is special in this run."""
    from .runner import TorchRunner

    own = type(runner)
    return (
        runner.world_size == 1
        and runner.ft is None
        and runner.accum_steps == 1
        and runner.device.type == "cpu"
        and runner.precision.dtype is None
        and runner.grad_scaler is None
        and runner.criterion is not None
        and all(getattr(own, name) is getattr(TorchRunner, name) for name in FUSED)
        and not any(name in runner.__dict__ for name in FUSED)
    )


def plain_window(runner: TorchRunner, otherwise: Callable[[Window], None]) -> Callable[[Window], None]:
    """Return what trains on a window of one micro-batch.

    Args:
        runner: of which `is_plain` holds.
        otherwise: takes the windows whose batch is no pair of tensors or has no weight.
    """
    meter = runner._meters[True]["loss"]

    def train(window: Window) -> None:
        batch, weight = window.batches[0], window.weights[0]
        if type(batch) not in (list, tuple) or len(batch) != 2 or not weight or isinstance(weight, Tensor):
            return otherwise(window)
        source, target = batch
        if type(source) is not Tensor or type(target) is not Tensor:
            return otherwise(window)
        prediction = runner.model(source)
        loss: Any = runner.criterion(prediction, target)
        metrics = runner._train_metrics
        if metrics is not None:
            metrics.update(prediction, target)
        runner.check_loss(loss)
        loss.backward()
        runner.step()
        meter.update(loss.item(), weight)

    return train
