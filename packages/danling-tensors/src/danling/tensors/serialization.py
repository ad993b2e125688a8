"""Pickling and copying a NestedTensor: a version number, plain tensors and tuples, checked when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments

VERSION = 1


class Serialization:
    """How a NestedTensor travels: pickle, `torch.save`, worker queues, `copy`."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        x: Any = self
        layout = x._layout
        state = (
            VERSION,
            x._values.detach(),
            layout.segments.sizes,
            layout.ragged_dims,
            layout.static_sizes,
            layout.batch_first,
            x._flags[0],
            x._flags[1],
            bool(x.requires_grad),
            bool(getattr(x, "_is_param", False)),
        )
        return rebuild, state

    def __copy__(self) -> Any:
        from danling.tensors.nested_tensor import values_of, wrap

        x: Any = self
        return wrap(values_of(x), x._layout, x._flags)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from danling.tensors.nested_tensor import wrap

        x: Any = self
        if id(x) in memo:
            return memo[id(x)]
        if not x.is_leaf:
            raise RuntimeError(
                "only NestedTensors created by the user (graph leaves) can be deep-copied; use detach() or clone()"
            )
        copied = wrap(x._values.detach().clone(), x._layout, x._flags)
        if x.requires_grad:
            copied.requires_grad_()
        if getattr(x, "_is_param", False):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(x)] = copied
        if x.grad is not None:
            copied.grad = x.grad.detach().clone()
        return copied

    def share_memory_(self) -> Any:
        """Move values and sizes to shared memory and return self."""
        x: Any = self
        x._values.share_memory_()
        x._layout.segments.sizes.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the values are in shared memory."""
        return self._values.is_shared()  # type: ignore[attr-defined]


def rebuild(version: Any, *state: Any) -> Any:
    """Make a NestedTensor from its pickled state.

    Raises:
        ValueError: The state is of a newer version, or its parts contradict each other.
    """
    from danling.tensors.nested_tensor import wrap

    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"this is not the state of a NestedTensor: version {version!r}")
    if version > VERSION:
        raise ValueError(
            f"the NestedTensor was saved in version {version} of its format; this danling reads up to {VERSION}"
        )
    if len(state) != 9:
        raise ValueError(f"the state of a NestedTensor has {len(state)} parts, not 9")
    values, sizes, ragged_dims, static_sizes, batch_first, padding_value, mask_value, requires_grad, is_param = state
    _check(values, sizes, ragged_dims, static_sizes, batch_first, padding_value, mask_value)
    # Sizes are metadata: they stay on the CPU wherever map_location sends the values.
    segments = Segments(sizes.cpu().contiguous())
    layout = Layout(segments, tuple(ragged_dims), tuple(static_sizes), batch_first)
    if tuple(values.shape) != (layout.rows, *layout.static_sizes):
        raise ValueError(
            f"broken state of a NestedTensor: values {tuple(values.shape)} for {layout.rows} rows of {layout.static_sizes}"
        )
    out = wrap(values, layout, (padding_value, mask_value))
    if requires_grad:
        out.requires_grad_()
    if is_param:
        out._is_param = True  # type: ignore[attr-defined]
    return out


def _check(values: Any, sizes: Any, ragged_dims: Any, static_sizes: Any, *flags: Any) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"broken state of a NestedTensor: {what}")

    if not isinstance(values, Tensor) or not isinstance(sizes, Tensor):
        fail("values and sizes must be tensors")
    if sizes.dim() != 2 or sizes.dtype != torch.int64:
        fail(f"sizes must be (B, k) int64, got {tuple(sizes.shape)} {sizes.dtype}")
    for name, numbers in (("ragged_dims", ragged_dims), ("static_sizes", static_sizes)):
        if not isinstance(numbers, (tuple, list)) or not all(type(n) is int and n >= 0 for n in numbers):
            fail(f"{name} must be non-negative ints, got {numbers!r}")
    rank = len(ragged_dims) + len(static_sizes)
    if list(ragged_dims) != sorted(set(ragged_dims)) or any(d >= rank for d in ragged_dims):
        fail(f"ragged_dims {tuple(ragged_dims)} are not ascending dims of an element of rank {rank}")
    if sizes.shape[1] != len(ragged_dims):
        fail(f"sizes have {sizes.shape[1]} columns for {len(ragged_dims)} ragged dims")
    if sizes.numel() and int(sizes.min()) < 0:
        fail("a size is negative")
    batch_first, padding_value, mask_value = flags
    if not isinstance(batch_first, bool) or not isinstance(mask_value, bool):
        fail("batch_first and mask_value must be bools")
    if not isinstance(padding_value, (int, float, complex)):
        fail(f"padding_value must be a number, got {type(padding_value).__name__}")
