"""From what a user passes to `update` to rows: aligned scores, targets and mask.

Nothing here reads a value from the device, and nothing filters: rows that do not count are marked by the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TASKS = ("binary", "multiclass", "multilabel", "regression", "ranking")


@dataclass(frozen=True)
class Spec:
    """What a row is: the task, and the number of classes, labels or outputs (None: as the data has)."""

    task: str | None
    width: int | None = None
    channel_dim: int | None = None

    @property
    def elementwise(self) -> bool:
        """Whether scores and targets have the same shape, each position counting for itself."""
        return self.task in ("binary", "multilabel")


class Rows(NamedTuple):
    """Aligned rows of one update.

    Attributes:
        scores: `(n,)` or `(n, width)`, as given.
        targets: `(n,)` or `(n, width)`, as given.
        mask: bool of the targets' shape, True where data is, or None if all is data.
        samples: number of samples the rows came from; each has `n // samples` rows.
        misfit: number of positions where two nested inputs differ in structure, when it must be read from the device.
    """

    scores: Tensor
    targets: Tensor
    mask: Tensor | None = None
    samples: int = 0
    misfit: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Return these rows with a function applied to scores, targets and mask."""
        mask = None if self.mask is None else function(self.mask)
        return Rows(function(self.scores), function(self.targets), mask)

    def part(self, start: int, stop: int | None = None) -> Rows:
        """Return some of these rows, without a copy."""
        return self.map(lambda t: t[start:stop])


def is_nested(x: Any) -> bool:
    """Whether `x` offers what is read of a NestedTensor: `concat`, `mask`, `tensor` (and `mask_value`)."""
    return hasattr(x, "concat") and hasattr(x, "mask_value") and hasattr(x, "mask")


def to_rows(spec: Spec, input: Any, target: Any, mask: Any = None, *, per_sample: bool = False) -> Rows:
    """Align one pair of predictions and targets.

    Args:
        spec: what the rows of this task look like.
        input: scores or labels: a tensor, a NestedTensor, or a sequence of numbers or tensors.
        target: targets, likewise.
        mask: bool, True where data is; for dense inputs only.
        per_sample: keep the rows of a sample together, all samples padded to the same number of rows.

    Raises:
        ValueError: shapes, lengths or mask do not fit together.
        TypeError: an input is of the wrong type or dtype.
    """
    if (
        mask is None
        and type(input) is Tensor
        and type(target) is Tensor
        and input.dim() == 2
        and target.dim() == 1
        and spec.task == "multiclass"
        and input.shape[0] == target.shape[0]
        and (input.shape[1] == spec.width or spec.width is None)
        and input.dtype.is_floating_point
        and not target.dtype.is_floating_point
        and input.device == target.device
    ):
        return Rows(input.detach(), target, None, input.shape[0])
    misfit = None
    if is_nested(input) or is_nested(target):
        if mask is not None:
            raise ValueError("mask is for dense inputs; a NestedTensor brings its own")
        input, target, mask, misfit = _unnest(spec, input, target, per_sample)
        if mask is None and spec.task is not None:  # packed: one row per position
            return _align(spec, input, target, None, packed=True)._replace(misfit=misfit)
    else:
        input, target = _tensor(input, "input"), _tensor(target, "target")
        if mask is not None:
            mask = _tensor(mask, "mask")
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, got {mask.dtype}")
    return _align(spec, input, target, mask)._replace(misfit=misfit)


def _tensor(x: Any, name: str) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    if hasattr(x, "__array__") and not isinstance(x, (list, tuple)):
        return torch.as_tensor(x)
    if isinstance(x, (bool, int, float)):
        return torch.tensor(x)
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes)):
        if any(isinstance(item, Tensor) for item in x):
            parts = [_tensor(item, name) for item in x]
            return torch.cat([p.reshape(1) if p.dim() == 0 else p for p in parts])
        try:
            return torch.tensor(x, dtype=None if len(x) else torch.float32)
        except (TypeError, ValueError) as e:
            raise TypeError(f"{name} must hold numbers or tensors: {e}") from None
    raise TypeError(f"{name} must be a tensor, a NestedTensor or a sequence of numbers, got {type(x).__name__}")


def _unnest(spec: Spec, input: Any, target: Any, per_sample: bool) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Return packed tensors where both sides are nested, else padded ones with a mask."""
    if is_nested(input) and is_nested(target):
        ours, theirs = _data_mask(input), _data_mask(target)
        ours, theirs = _common_mask(ours, theirs)
        if ours.shape != theirs.shape or input.concat.shape[0] != target.concat.shape[0]:
            raise ValueError(
                f"input and target have different lengths: masks of shape {tuple(ours.shape)} and "
                f"{tuple(theirs.shape)}, {input.concat.shape[0]} and {target.concat.shape[0]} positions in all"
            )
        misfit = None
        if ours.device.type == "cpu":
            if not torch.equal(ours, theirs.to("cpu")):
                raise ValueError(
                    f"input and target have different lengths: {_lengths(ours)} and {_lengths(theirs)} positions per "
                    "sample"
                )
        else:
            misfit = (ours != theirs.to(ours.device)).sum()
        if not per_sample:
            return input.concat.detach(), target.concat.detach(), None, misfit
        dense, labels = input.tensor.detach(), target.tensor.detach()
        return dense, labels, _broadcast(ours, labels, "target"), misfit
    nested, dense, name = (input, target, "target") if is_nested(input) else (target, input, "input")
    other = _tensor(dense, name)
    inside = _data_mask(nested)
    padded = nested.tensor.detach()
    scores, labels = (padded, other) if name == "target" else (other, padded)
    return scores, labels, _broadcast(inside, labels, "target"), None


def _common_mask(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Drop trailing dims of size 1 that only one of the masks has."""
    while ours.dim() > theirs.dim() and ours.shape[-1] == 1:
        ours = ours.squeeze(-1)
    while theirs.dim() > ours.dim() and theirs.shape[-1] == 1:
        theirs = theirs.squeeze(-1)
    return ours, theirs


def _data_mask(nested: Any) -> Tensor:
    """Return bool, True where data is, of shape (batch, ragged dims)."""
    mask = nested.mask
    return ~mask if nested.mask_value else mask


def _lengths(mask: Tensor) -> list[int]:
    return mask.reshape(mask.shape[0], -1).sum(1).tolist()


def _broadcast(mask: Tensor, like: Tensor, name: str) -> Tensor:
    """Expand a mask over the trailing dims of `like`."""
    if mask.shape == like.shape:
        return mask
    if mask.dim() < like.dim() and like.shape[: mask.dim()] == mask.shape:
        return mask.reshape(*mask.shape, *[1] * (like.dim() - mask.dim())).expand(like.shape)
    if mask.dim() == like.dim() + 1 and mask.shape[-1] == 1 and mask.shape[:-1] == like.shape:
        return mask.squeeze(-1)
    raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit {name} of shape {tuple(like.shape)}")


def _align(spec: Spec, input: Tensor, target: Tensor, mask: Tensor | None, packed: bool = False) -> Rows:
    if input.device != target.device:
        raise ValueError(f"input is on {input.device} and target on {target.device}; move one of them")
    if input.dtype.is_complex or target.dtype.is_complex:
        raise TypeError(f"input and target must be real, got {input.dtype} and {target.dtype}")
    if mask is not None and mask.device != input.device:
        mask = mask.to(input.device, non_blocking=True)
    if spec.task == "multiclass":
        if target.dtype.is_floating_point:
            raise TypeError(f"multiclass targets must be integers, got {target.dtype}")
        return _align_classes(spec, input, target, mask)
    if spec.task is None:
        return _align_freely(spec, input, target, mask)
    return _align_same(spec, input, target, mask)


def _align_classes(spec: Spec, input: Tensor, target: Tensor, mask: Tensor | None) -> Rows:
    if not input.dtype.is_floating_point:  # labels
        input, target = _match(input, target)
        mask = None if mask is None else _broadcast(mask, target, "target").reshape(-1)
        return Rows(input.reshape(-1), target.reshape(-1), mask, _samples(target))
    if input.dim() == target.dim() and target.dim() and target.shape[-1] == 1:
        mask = mask.squeeze(-1) if mask is not None and mask.dim() == target.dim() else mask
        target = target.squeeze(-1)
    if target.numel() == 0 and input.numel() == 0:
        return Rows(input.new_empty((0, spec.width or 1)), target.reshape(-1), None, 0)
    dim = class_dim(input.shape, target.shape, spec.width, spec.channel_dim)
    mask = None if mask is None else _broadcast(mask, target, "target").reshape(-1)
    scores = input.movedim(dim, -1).reshape(-1, input.shape[dim])
    return Rows(scores, target.reshape(-1), mask, _samples(target))


def class_dim(scores: Sequence[int], targets: Sequence[int], classes: int | None, given: int | None) -> int:
    """Return the dim of `scores` that holds the classes.

    It is `given`, or the one of dim 1 and the last dim whose removal gives the shape of the targets and whose size is
    the number of classes.

    Raises:
        ValueError: neither dim fits, or both do.
    """
    scores, targets, ndim = tuple(scores), tuple(targets), len(scores)
    if given is not None:
        if not -ndim <= given < ndim:
            raise ValueError(f"channel_dim={given} is out of range for input of shape {scores}")
        given %= ndim
        if scores[:given] + scores[given + 1 :] != targets or (classes is not None and scores[given] != classes):
            raise ValueError(
                f"input of shape {scores} with channel_dim={given} does not fit target of shape {targets}"
                + ("" if classes is None else f" and {classes} classes")
            )
        return given
    fits = [
        dim
        for dim in sorted({min(1, ndim - 1), ndim - 1})
        if dim >= 0 and scores[:dim] + scores[dim + 1 :] == targets and (classes is None or scores[dim] == classes)
    ]
    if len(fits) == 1:
        return fits[0]
    expected = "" if classes is None else f" with {classes} classes"
    if fits:
        raise ValueError(
            f"the class dim of input of shape {scores} for target of shape {targets}{expected} may be {fits[0]} or "
            f"{fits[1]}; say which with channel_dim"
        )
    raise ValueError(
        f"input of shape {scores} and target of shape {targets} do not fit{expected}: without its class dim, 1 or "
        "last, input must have the shape of target; name another class dim with channel_dim"
    )


def _align_same(spec: Spec, input: Tensor, target: Tensor, mask: Tensor | None) -> Rows:
    if spec.task == "regression" and not (input.dtype.is_floating_point and target.dtype.is_floating_point):
        raise TypeError(f"regression needs floating point input and target, got {input.dtype} and {target.dtype}")
    if spec.task in ("multilabel", "ranking") or (spec.task == "regression" and spec.width not in (None, 1)):
        width = spec.width
        if input.numel() == 0 and target.numel() == 0:
            width = width or 1
            return Rows(input.new_empty((0, width)), target.new_empty((0, width)), None, 0)
        if input.shape != target.shape:
            raise ValueError(f"input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)} differ")
        if input.dim() == 0 or (width is not None and input.shape[-1] != width):
            raise ValueError(f"input of shape {tuple(input.shape)} must have {width} as its last dim")
        width = input.shape[-1]
        if mask is not None:
            mask = _broadcast(mask, target, "target").reshape(-1, width)
        samples = target.shape[0] if target.dim() > 1 else 1
        return Rows(input.reshape(-1, width), target.reshape(-1, width), mask, samples)
    if mask is not None:
        mask = _broadcast(mask, target, "target").reshape(-1)
    input, target = _match(input, target)
    return Rows(input.reshape(-1), target.reshape(-1), mask, _samples(target))


def _align_freely(spec: Spec, input: Tensor, target: Tensor, mask: Tensor | None) -> Rows:
    """Align for callables that belong to no task: rows as given, flattened only where a mask demands it."""
    if input.numel() == target.numel():
        input, target = _match(input, target)
        if mask is None:
            if target.dim() == 0:
                input, target = input.reshape(1), target.reshape(1)
            return Rows(input, target, None, _samples(target))
        return Rows(input.reshape(-1), target.reshape(-1), _broadcast(mask, target, "target").reshape(-1))
    if input.shape[:1] == target.shape and mask is None:
        return Rows(input, target, None, _samples(target))
    return _align_classes(spec, input, target, mask)


def _match(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Give both the target's shape where they differ in dims of size 1, or one of them is flat."""
    if input.shape == target.shape:
        return input, target
    squeezed = [tuple(size for size in t.shape if size != 1) for t in (input, target)]
    if squeezed[0] == squeezed[1] or (input.numel() == target.numel() and 1 in (input.dim(), target.dim())):
        return input.reshape(target.shape), target
    raise ValueError(f"input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)} do not fit")


def _samples(target: Tensor) -> int:
    return target.shape[0] if target.dim() else 1


def rows_per_sample(rows: Rows) -> int:
    """Return how many rows each sample has."""
    return math.ceil(rows.targets.shape[0] / rows.samples) if rows.samples else 1
