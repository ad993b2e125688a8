"""How much each micro-batch counts in the mean of its window: the number of terms that its loss averages over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .infer import count_samples

SEQUENCES = (list, tuple)
_FEW = 256  # elements that a list counts faster than an operation on the tensor is called

Weight = Any  # a number, a 0-d tensor on the batch's device, or None: losses are added


def target_of(batch: Any) -> Any:
    """The target in a batch: item `target` of a mapping, item 1 of a sequence, else None.

    >>> target_of({"input": 1, "target": 2}), target_of((3, 4)), target_of(5)
    (2, 4, None)
    """
    if type(batch) in SEQUENCES and len(batch) > 1:
        return batch[1]
    if isinstance(batch, Mapping):
        return batch.get("target")
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return batch[1] if len(batch) > 1 else None
    return None


def samples_in(batch: Any) -> int:
    """Samples in a batch; 1 when nothing in it has a length."""
    if type(batch) in (list, tuple) and batch and type(batch[0]) is Tensor and batch[0].dim():
        return batch[0].shape[0]
    count = count_samples(batch)
    return 1 if count is None else count


def tokens_in(batch: Any) -> Any:
    """Tokens in a batch that tells: the packed length of a ragged input, or the sum of an attention mask; else 0."""
    if type(batch) in SEQUENCES and batch and type(batch[0]) is Tensor:
        return 0
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor):
            return count_elements(mask, 0)
        source = batch.get("input")
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and batch:
        source = batch[0]
    else:
        source = batch
    if type(source) is Tensor:
        return 0
    packed = getattr(source, "concat", None)
    return len(packed) if isinstance(packed, Tensor) and packed.dim() else 0


def measure(batch: Any) -> tuple[int, Any]:
    """Samples and tokens in a batch."""
    if type(batch) in SEQUENCES and batch and type(batch[0]) is Tensor and batch[0].dim():
        return len(batch[0]), 0
    return samples_in(batch), tokens_in(batch)


def count_elements(tensor: Tensor, ignored: int) -> int | Tensor:
    """Elements that differ from `ignored`: a number for tensors on the host, else a tensor nobody has waited for."""
    if not tensor.is_cpu:
        return (tensor != ignored).sum()
    if tensor.dim() == 1 and len(tensor) <= _FEW:
        return len(tensor) - tensor.tolist().count(ignored)
    return int(np.count_nonzero(tensor.numpy() != ignored))


class WeightRule:
    """How the weight of a batch is found, chosen once per run.

    The first rule that applies: the item `loss_weight` of a batch; the runner's overridden `loss_weight`; nothing for a
    criterion that sums; targets not ignored, or their class weights; target elements; rows or samples.

    Args:
        criterion: what computes the loss.
        override: the user's own rule.

    Attributes:
        given: whether batches have the key `loss_weight`; None before the first.
        of_target: the same for batches that are a tensor and a target without `loss_weight`; None where more is needed.

    Examples:
        >>> batch = (torch.zeros(3, 5), torch.tensor([0, -100, 2]))
        >>> WeightRule(nn.CrossEntropyLoss())(batch), WeightRule(nn.MSELoss())((None, torch.zeros(3, 2)))
        (2, 6)
        >>> WeightRule(nn.CrossEntropyLoss(reduction="sum"))(batch) is None
        True
        >>> WeightRule(lambda prediction, target: 0)(batch), WeightRule(None)({"loss_weight": 7})
        (3, 7)

    Raises:
        ValueError: when called, for a batch without `loss_weight` after one that had it, or the reverse; and for a weight
            of the user's that is none.
    """

    __slots__ = ("of_target", "_override", "_adds", "given")

    def __init__(self, criterion: Any, override: Callable[[Any], Weight] | None = None) -> None:
        self._override = override
        self._adds = getattr(criterion, "reduction", None) == "sum"
        self.of_target = None if override or self._adds else _target_rule(criterion)
        self.given: bool | None = None

    def __call__(self, batch: Any) -> Weight:
        """Return the weight of a batch."""
        has = type(batch) not in SEQUENCES and isinstance(batch, Mapping) and "loss_weight" in batch
        if has is not self.given:
            if self.given is not None:
                raise ValueError(
                    "some batches have the key 'loss_weight' and others have not: give it to all or to none"
                )
            self.given = has
        if has:
            weight = batch["loss_weight"]
            return _checked(weight.sum() if isinstance(weight, Tensor) else weight)
        if self._override is not None:
            return _checked(self._override(batch))
        if self._adds:
            return None
        target = None if self.of_target is None else _packed(batch)
        return samples_in(batch) if target is None else self.of_target(target)  # type: ignore[misc]


def _checked(weight: Weight) -> Weight:
    """A weight of the user's; those on a device are not looked at, which would wait for it."""
    if isinstance(weight, Tensor) and weight.dim() == 0:
        weight = _host(weight)
        if isinstance(weight, Tensor):
            return weight
    if weight is None or isinstance(weight, Real) and 0 <= float(weight) < math.inf:
        return weight
    shown = f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
    raise ValueError(f"a loss_weight is a number of at least 0, a tensor without dimensions or None, got {shown}")


def _host(weight: Weight) -> Weight:
    return weight.item() if isinstance(weight, Tensor) and weight.device.type == "cpu" else weight


def _target_rule(criterion: Any) -> Callable[[Tensor], Weight] | None:
    """How targets are weighed; None where samples are."""
    if getattr(criterion, "reduction", None) != "mean" or isinstance(criterion, nn.CTCLoss):
        return None
    ignored = getattr(criterion, "ignore_index", None)
    if not isinstance(ignored, int):
        return Tensor.numel
    if isinstance(getattr(criterion, "weight", None), Tensor):
        return lambda target: _class_weights(target, ignored, criterion.weight)
    return partial(_count_classes, ignored)


def _packed(batch: Any) -> Tensor | None:
    target = batch[1] if type(batch) in SEQUENCES and len(batch) > 1 else target_of(batch)
    if type(target) is Tensor:
        return target
    packed = getattr(target, "concat", target)
    return packed if isinstance(packed, Tensor) else None


def _rows(target: Tensor) -> float:
    """Rows of class probabilities: the class dimension is the second, or the only one."""
    classes = target.shape[1] if target.dim() > 1 else target.shape[0]
    return target.numel() / classes


def _count_classes(ignored: int, target: Tensor) -> Weight:
    return _rows(target) if target.is_floating_point() else count_elements(target, ignored)


def _class_weights(target: Tensor, ignored: int, classes: Tensor) -> Weight:
    if target.is_floating_point():
        return _rows(target)
    kept = target != ignored
    each = classes.to(target.device)[torch.where(kept, target, 0)]
    return _host((each.double() * kept).sum())
