"""Rows to elements, padded tensors and masks, and back: what a layout means for plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Number
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from danling.tensors import kernels
from danling.tensors.layout import Layout


def structure_of(
    shapes: Sequence[torch.Size], rank: int, ragged_dims: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ragged dims and static sizes of elements, inferred (`None`) or checked.

    Raises:
        ValueError: A static dim differs, or there is no element to tell the static sizes.
    """
    if not shapes:
        if ragged_dims is not None and len(ragged_dims) < rank:
            raise ValueError("an empty batch has no elements to take static sizes from")
        return ragged_dims or (), ()
    first = shapes[0]
    if rank == 0:
        return (), ()
    head_only = ragged_dims is None or ragged_dims == (0,)
    if head_only:
        if all(len(set(map(itemgetter(d), shapes))) == 1 for d in range(1, rank)):
            return (0,), tuple(first[1:])
    varying = tuple(d for d in range(rank) if len({shape[d] for shape in shapes}) > 1)
    if ragged_dims is None:
        ragged_dims = varying
    for d in varying:
        if d not in ragged_dims:
            i = next(i for i, shape in enumerate(shapes) if shape[d] != first[d])
            raise ValueError(
                f"element dim {d} is static (ragged_dims={ragged_dims}) but has size {first[d]} in element 0 "
                f"and {shapes[i][d]} in element {i}"
            )
    return ragged_dims, tuple(first[d] for d in range(rank) if d not in ragged_dims)


def pack_elements(elements: Sequence[Tensor], layout: Layout) -> Tensor:
    """Rows of all elements, one after another, `(R, *static)`."""
    if layout.dense:
        return torch.stack(list(elements))
    if layout.ragged_dims == (0,):
        return kernels.pack(elements)
    static = layout.static_sizes
    order = layout.permutation
    rows = [math.prod(t.shape[d] for d in layout.ragged_dims) for t in elements]
    moved = [t.permute(order).reshape(n, *static) for t, n in zip(elements, rows)]
    return kernels.pack(moved)


def fill_tensor(value: Any, dtype: torch.dtype) -> Tensor:
    """`value` as a one-element CPU tensor of `dtype`.

    Raises:
        ValueError: The dtype cannot hold the value.
    """
    if not _fake_modes():
        return _fill_tensor(value, dtype)
    with _disable_current_modes():
        _fill_tensor(value, dtype)
    return torch.full((), value, dtype=dtype, device="cpu")


def _fake_modes() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0


def _fill_tensor(value: Any, dtype: torch.dtype) -> Tensor:
    key = (value, type(value), dtype)
    found: Any = _fills.get(key)
    if found is None:
        try:
            found = torch.tensor(value, dtype=dtype, device="cpu")
            exact = found.dtype.is_complex or dtype.is_floating_point or found.item() == value
            if dtype.is_floating_point and dtype.itemsize > 1:
                exact = bool(found.isfinite()) or value in (float("inf"), float("-inf")) or value != value
        except (RuntimeError, OverflowError, ValueError, TypeError):
            exact = False
        if not exact:
            raise ValueError(f"padding_value {value!r} cannot be held by {dtype}; set nt.padding_value to one that can")
        if len(_fills) < 1024:
            _fills[key] = found
    return found


_fills: dict[Any, Tensor] = {}


def to_padded(values: Tensor, layout: Layout, fill: Any) -> Tensor:
    """Padded `(B, ...)` or `(e0, B, ...)` tensor of `layout.shape`, contiguous and freshly made."""
    if layout.dense:
        out = values
    else:
        segments = layout.segments
        sizes = segments.on("sizes", values.device) if segments.k > 1 else None
        offsets = segments.on("offsets", values.device)
        out = kernels.pad(values, offsets, sizes, list(segments.max_sizes), fill_tensor(fill, values.dtype))
    order = shape_order(layout)
    if order is None:
        return out.clone(memory_format=torch.contiguous_format) if out is values else out
    return out.permute(order).clone(memory_format=torch.contiguous_format)


def shape_order(layout: Layout) -> tuple[int, ...] | None:
    """Permutation from `(B, *packed element order)` to `.shape`, `None` for the identity."""

    def build() -> tuple[int, ...] | None:
        inverse = [0] * layout.rank
        for position, d in enumerate(layout.permutation):
            inverse[d] = position + 1
        order = (0, *inverse)
        if not layout.batch_first and layout.rank:
            order = (inverse[0], 0, *inverse[1:])
        return None if order == tuple(range(layout.rank + 1)) else order

    return layout.derive("order", build)


def to_packed(padded: Tensor, layout: Layout) -> Tensor:
    """Real values of a dense tensor of `layout.shape` (or with larger ragged extents)."""
    order = shape_order(layout)
    if order is not None:
        inverse = [0] * len(order)
        for position, source in enumerate(order):
            inverse[source] = position
        padded = padded.permute(inverse)
    if layout.dense:
        return padded.clone() if order is None else padded.contiguous()
    segments = layout.segments
    sizes = segments.on("sizes", padded.device) if segments.k > 1 else None
    return kernels.unpad(padded, segments.on("offsets", padded.device), sizes, segments.rows)


def slice_element(values: Tensor, layout: Layout, i: int) -> Tensor:
    """Element `i` as a view of `values`."""
    segments = layout.segments
    if layout.dense:
        return values[i]
    bounds = segments.bounds
    return shape_element(values.narrow(0, bounds[i], bounds[i + 1] - bounds[i]), layout, i)


def shape_element(rows: Tensor, layout: Layout, i: int) -> Tensor:
    """Rows of element `i` in its own shape and dim order."""
    if layout.ragged_dims == (0,):
        return rows
    k = layout.segments.k
    sizes = layout.segments.table[i * k : (i + 1) * k]
    out = rows.unflatten(0, sizes) if k > 1 else rows
    inverse = [0] * layout.rank
    for position, d in enumerate(layout.permutation):
        inverse[d] = position
    return out.permute(inverse) if inverse != list(range(layout.rank)) else out


def make_mask(layout: Layout, device: torch.device, mask_value: bool) -> Tensor:
    """bool mask of the batch and the element dims up to the last ragged one."""
    segments = layout.segments
    batch = segments.batch_size
    if layout.dense:
        return torch.full((batch,), not mask_value, device=device)
    last = layout.ragged_dims[-1]
    rank = last + 1
    shape = [1] * rank
    mask: Tensor | None = None
    sizes = segments.on("sizes", device)
    for j, d in enumerate(layout.ragged_dims):
        view = list(shape)
        view[d] = segments.max_sizes[j]
        inside = torch.arange(view[d], device=device) < sizes[:, j, None]
        inside = inside.view(batch, *view)
        mask = inside if mask is None else mask & inside
    assert mask is not None
    full = [segments.max_sizes[layout.ragged_dims.index(d)] if d in layout.ragged_dims else 0 for d in range(rank)]
    for d in range(rank):
        if d not in layout.ragged_dims:
            full[d] = layout.static_sizes[layout.static_dims.index(d)]
    mask = mask.expand(batch, *full)
    if not layout.batch_first:
        mask = mask.transpose(0, 1)
    return mask.logical_not() if mask_value else mask.clone(memory_format=torch.contiguous_format)


def difference(found: Layout, wanted: Layout) -> str:
    """Say in words how one structure differs from another, and at which element."""
    if found.batch_size != wanted.batch_size:
        return f"has batch size {found.batch_size}, not {wanted.batch_size}"
    if found.rank != wanted.rank:
        return f"has elements of {found.rank} dims, not {wanted.rank}"
    if found.batch_first != wanted.batch_first and found.rank and wanted.rank:
        return f"has batch_first={found.batch_first}, not {wanted.batch_first}; use transpose(0, 1)"
    for i, (a, b) in enumerate(zip(found.element_shapes(), wanted.element_shapes())):
        if a != b:
            return f"has shape {tuple(a)} in element {i}, not {tuple(b)}"
    if found.ragged_dims == wanted.ragged_dims:
        return f"has static sizes {found.static_sizes}, not {wanted.static_sizes}"
    return f"has ragged dims {found.ragged_dims}, not {wanted.ragged_dims}"


def check_bool(name: str, value: Any) -> bool:
    """`value` if it is a bool, else `TypeError`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_number(name: str, value: Any) -> Any:
    """`value` as a number of Python, else `TypeError`."""
    if type(value) in _NUMBERS:
        return value
    if not isinstance(value, Number):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value.item() if hasattr(value, "item") else value  # numpy's, which a saved file must not hold


_NUMBERS = frozenset({int, float, complex, bool})


def check_index(index: int, size: int, what: str = "element") -> int:
    """A non-negative index below `size`, else `IndexError`."""
    if not -size <= index < size:
        raise IndexError(f"{what} index {index} is out of range for a batch of {size}")
    return index + size if index < 0 else index
