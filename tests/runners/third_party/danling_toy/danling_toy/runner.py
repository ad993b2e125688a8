"""An engine of one's own: replicas that are kept equal by plain collectives instead of DistributedDataParallel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from danling.backends.torch import TorchRunner


def usable() -> tuple[bool, str]:
    """Whether the engine works on this machine, and why."""
    return dist.is_available(), "torch.distributed is part of this torch"


class ToyRunner(TorchRunner):
    """Averages all gradients of an update in one all-reduce per dtype.

    Everything else is the torch stack's: devices, process group, data, windows, updates, checkpoints. Claims every guarantee.
    """

    stack: ClassVar[str | None] = "toy"
    guarantees: ClassVar[frozenset[int]] = frozenset(range(1, 12))
    axes: ClassVar[frozenset[str]] = frozenset()
    # what the suite compares with; `bitwise`: the mean of two ranks has the bits of one loop over both
    conformance: ClassVar[dict[str, Any]] = {"dtype": "float64", "tolerance": 1e-9, "bitwise": True}

    def wrap_model(self) -> None:
        """Give every replica the parameters and buffers of rank 0, whatever it drew itself."""
        if self.distributed:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.data, src=0)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate with the factor of the window; with its last micro-batch, average over the data ranks.

        `super().backward` multiplies by `self.window.factor`, which is known before the first forward, and leaves out
        micro-batches that count for nothing.
        """
        super().backward(loss)
        if self.distributed and self.window.is_last:
            self.average_gradients()

    def average_gradients(self) -> None:
        """Replace each gradient by its mean over the data ranks; buffers become those of rank 0."""
        buckets: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                buckets.setdefault(parameter.dtype, []).append(parameter)
        for parameters in buckets.values():
            # A parameter without a gradient here may have one on another rank: every rank sends the same elements.
            gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
            bucket = self.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            bucket /= self.data_degree
            for parameter, mean in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = mean.view_as(parameter)
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)
