"""Cross entropy over classes of which each rank holds a part, so that no rank ever holds the logits of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import Axis, sum_out


class SplitCrossEntropy(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` of logits whose classes are split over an axis, such as those of a head after `split_columns`.

    The loss is that of the whole logits, the same on every rank of the axis; ranks exchange three numbers per target.

    Args:
        ctx: a `ParallelContext`.
        axis: over which classes are split.
        **options: of `nn.CrossEntropyLoss`: `ignore_index`, `reduction`, `label_smoothing`, `weight` (of all classes).

    Raises:
        ValueError: `weight` together with `label_smoothing`.
    """

    def __init__(self, ctx: Any, axis: str = "tensor", **options: Any) -> None:
        super().__init__(**options)
        if self.weight is not None and self.label_smoothing:
            raise ValueError("SplitCrossEntropy takes weight or label_smoothing, not both")
        self.axis = Axis.of(ctx, axis)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input: `(N, classes / degree)` or `(N, classes / degree, ...)`.
            target: class indices, `(N)` or `(N, ...)`.
        """
        largest = input.detach().amax(1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.axis.group)
        shifted = input - largest.unsqueeze(1)
        classes = input.shape[1]
        index = target - self.axis.rank * classes
        here = (index >= 0) & (index < classes)
        picked = shifted.gather(1, index.clamp(0, classes - 1).unsqueeze(1)).squeeze(1) * here
        sums = sum_out(torch.stack((shifted.exp().sum(1), picked, shifted.sum(1))), self.axis)
        normaliser = sums[0].log()
        loss = normaliser - sums[1]
        if self.label_smoothing:
            even = normaliser - sums[2] / (classes * self.axis.degree)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * even
        counts = (target != self.ignore_index).to(loss.dtype)
        if self.weight is not None:
            counts = counts * self.weight[target.clamp(min=0)]
        loss = loss * counts
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / counts.sum()
