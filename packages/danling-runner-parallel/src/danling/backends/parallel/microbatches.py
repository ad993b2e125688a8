"""Cutting a batch into the microbatches of a pipeline, and putting the outputs together again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danling.runners.errors import ConfigError


class Plan(NamedTuple):
    """How a batch runs through the pipeline.

    Attributes:
        count: microbatches.
        size: rows of each.
        rows: rows of the batch that count; what follows up to `count * size` only fills up.
    """

    count: int  # type: ignore[assignment]
    size: int
    rows: int

    def kept(self, index: int) -> int:
        """Rows of a microbatch that count.

        >>> [Plan(count=3, size=2, rows=3).kept(index) for index in range(3)]
        [2, 1, 0]
        """
        return max(0, min(self.size, self.rows - index * self.size))


def plan_microbatches(rows: int, full: int | None, count: int | None, size: int) -> Plan:
    """Return how a batch is cut; all batches of a split are cut alike, whatever their number of rows.

    Args:
        rows: of the batch.
        full: rows of a full batch of the split, None when they are not known beforehand.
        count: number of microbatches, or None.
        size: rows of a microbatch where `count` is None.

    Raises:
        ConfigError: a full batch cannot be cut evenly.

    Example:
        >>> plan_microbatches(5, full=8, count=4, size=1)
        Plan(count=4, size=2, rows=5)
        >>> plan_microbatches(6, full=6, count=None, size=2)
        Plan(count=3, size=2, rows=6)
    """
    if full is not None and full % (count or size):
        if count:
            raise ConfigError(
                f"a batch of {full} rows cannot be cut into parallel.pipeline_n_microbatches = {count} equal microbatches"
            )
        raise ConfigError(
            f"a batch of {full} rows cannot be cut into microbatches of parallel.pipeline_microbatch_size = {size}"
        )
    full = max(rows, full or 0)
    return Plan(count, -(-full // count), rows) if count else Plan(-(-full // size), size, rows)


def has_rows(value: Any, rows: int) -> bool:
    """Whether a value is a batch of so many rows itself."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == rows
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return False
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
        return False
    return len(value) == rows


def take_rows(value: Any, rows: int, start: int, stop: int) -> Any:
    """Return rows of whatever in a batch has them; rows beyond the end repeat the last one.

    Args:
        value: a tensor, or mappings and sequences of tensors. What has another length is left as it is.
        rows: of the batch.
        start: the first row.
        stop: the first row that is not taken.

    Example:
        >>> take_rows({"x": torch.tensor([1, 2, 3]), "scale": 2.0, "ids": ["a", "b", "c"]}, 3, 2, 4)
        {'x': tensor([3, 3]), 'scale': 2.0, 'ids': ['c', 'c']}
    """
    if has_rows(value, rows):
        if stop <= rows:
            return value[start:stop]
        indices = [min(index, rows - 1) for index in range(start, stop)]
        if isinstance(value, list | tuple):
            return type(value)(value[index] for index in indices)
        return value[torch.tensor(indices, device=value.device) if isinstance(value, Tensor) else indices]
    if isinstance(value, Mapping):
        return {key: take_rows(item, rows, start, stop) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(take_rows(item, rows, start, stop) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(take_rows(item, rows, start, stop) for item in value)
    return value


def signature(value: Any) -> int:
    """A number that differs, as good as surely, between inputs whose tensors differ in shape or type.

    >>> x = torch.zeros(2, 3)
    >>> signature((x, {"mask": x})) == signature((x + 1, {"mask": x})), signature(x) == signature(x[:, :2])
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(_outline(value)).encode(), digest_size=7).digest(), "big")


def _outline(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, Mapping):
        return [(str(key), _outline(item)) for key, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_outline(item) for item in value]
    return type(value).__name__


def map_tensors(value: Any, function: Any) -> Any:
    """Apply a function to every tensor in a nested structure."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put the outputs of microbatches together, in the structure that each of them has.

    Args:
        outputs: one per microbatch.
        sizes: rows of each. What has these rows is concatenated, single numbers become their mean over the rows, and
            of anything else the first is taken.

    Example:
        >>> one = {"logits": torch.ones(2), "aux": torch.tensor(1.0)}
        >>> two = {"logits": torch.zeros(1), "aux": torch.tensor(4.0)}
        >>> merge_outputs([one, two], [2, 1])
        {'logits': tensor([1., 1., 0.]), 'aux': tensor(2.)}
    """
    first = outputs[0]
    if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point():
        shares = torch.tensor([size / sum(sizes) for size in sizes], dtype=first.dtype, device=first.device)
        return (torch.stack(list(outputs)) * shares).sum()
    if all(has_rows(output, size) for output, size in zip(outputs, sizes, strict=True)):
        if isinstance(first, Tensor):
            return torch.cat(list(outputs))
        return first if len(outputs) == 1 else type(first)([row for output in outputs for row in output])
    if isinstance(first, Mapping):
        merged = {key: merge_outputs([output[key] for output in outputs], sizes) for key in first}
        try:
            return type(first)(merged)  # type: ignore[call-arg]
        except TypeError:
            return merged
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(merge_outputs(items, sizes) for items in zip(*outputs, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(merge_outputs(items, sizes) for items in zip(*outputs, strict=True))
    return first
