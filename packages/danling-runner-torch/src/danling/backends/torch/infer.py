"""Turning a batch of outputs into one entry per sample, and putting the entries of all ranks in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def count_samples(batch: Any) -> int | None:
    """Return how many samples a batch holds: the first size found in it, or None.

    Example:
        >>> count_samples({"input": torch.zeros(3, 2), "name": "x"}), count_samples((["a", "b"],)), count_samples(5)
        (3, 2, None)
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        return next((n for value in batch.values() if (n := count_samples(value)) is not None), None)
    if isinstance(batch, (str, bytes)) or not isinstance(batch, Sequence):
        return None
    inner = next((n for value in batch if (n := count_samples(value)) is not None), None)
    return len(batch) if inner is None else inner


def split_output(output: Any, size: int | None) -> list[Any]:
    """Split a model's output by sample, detached and on the host.

    A tensor is split by rows (``(B, 1)`` is read as ``(B,)``; one number per sample gives Python numbers), mappings and
    sequences are split inside and keep their structure, a ragged batch gives its elements. What has no batch dimension
    of `size` is one entry.

    Args:
        output: whatever the model returned.
        size: samples in the batch, or None when unknown.

    Example:
        >>> split_output({"logits": torch.tensor([[1.0], [2.0]]), "hidden": torch.zeros(2, 3)}, 2)[1]["logits"]
        2.0
        >>> split_output(torch.tensor(3.0), 4)
        [3.0]
    """
    output = to_host(output)
    length = _batch_length(output, size)
    return [output] if length is None else [_take(output, i) for i in range(length)]


def to_host(value: Any) -> Any:
    """Detach every tensor in `value` and bring it to the CPU; containers keep their types."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.item() if value.dim() == 0 and _is_plain(value) else value
    if isinstance(value, Mapping):
        items = {key: to_host(item) for key, item in value.items()}
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_host(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(item) for item in value)
    return value


def _is_plain(value: Tensor) -> bool:
    return type(value) is Tensor or type(value) is torch.nn.Parameter


def _batch_length(value: Any, size: int | None) -> int | None:
    """Return the number of samples if every part of `value` agrees on it (and on `size`), else None."""
    if isinstance(value, Tensor):
        length = len(value) if value.dim() else None
    elif isinstance(value, Mapping):
        return _common([_batch_length(item, size) for item in value.values()])
    elif isinstance(value, (list, tuple)):
        if not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in value):
            length = len(value) if size is not None and len(value) == size else None
        else:
            return _common([_batch_length(item, size) for item in value])
    else:
        return None
    return length if size is None or length == size else None


def _common(lengths: list[int | None]) -> int | None:
    known = {length for length in lengths if length is not None}
    return known.pop() if len(known) == 1 else None


def _take(value: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        row = value[index]
        if _is_plain(value) and (row.dim() == 0 or (row.dim() == 1 and row.numel() == 1)):
            return row.item()
        return row.clone() if _is_plain(value) else row
    if isinstance(value, Mapping):
        return {key: _take(item, index) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(item, index) for item in value))
    if isinstance(value, (list, tuple)):
        if not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in value):
            return value[index]
        return type(value)(_take(item, index) for item in value)
    return value


def merge_in_order(shares: Sequence[Sequence[tuple[int, Any]]]) -> list[Any]:
    """Merge each rank's ``(dataset index, entry)`` pairs into dataset order, every index once.

    Example:
        >>> merge_in_order([[(0, "a"), (2, "c")], [(1, "b"), (2, "again")]])
        ['a', 'b', 'c']
    """
    merged: dict[int, Any] = {}
    for share in shares:
        for index, entry in share:
            merged.setdefault(index, entry)
    return [merged[index] for index in sorted(merged)]
