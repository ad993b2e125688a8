"""Index maps over rows and values: the machinery of slicing, gathering, viewing and joining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments, int64_tensor
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import like


def coords(layout: Layout, device: torch.device) -> list[Tensor]:
    """For each element dim the coordinate of every value, each broadcastable to `values`."""
    n = len(layout.static_sizes)
    out: list[Tensor] = [torch.empty(0, device="cpu")] * layout.rank
    for j, d in enumerate(layout.ragged_dims):
        out[d] = layout.segments.on(("coord", j), device).view(-1, *[1] * n)  # type: ignore[arg-type]
    for j, d in enumerate(layout.static_dims):
        shape = [1] * (n + 1)
        shape[1 + j] = -1
        out[d] = torch.arange(layout.static_sizes[j], device=device).view(shape)
    return out


def owner(layout: Layout, device: torch.device) -> Tensor:
    """The element of every row, broadcastable to `values`."""
    return layout.segments.on("element", device).view(-1, *[1] * len(layout.static_sizes))


def flat_position(layout: Layout, element: Tensor, at: Sequence[Tensor]) -> Tensor:
    """Where in `values.reshape(-1)` the value with these coordinates lies."""
    device = element.device
    segments = layout.segments
    row: Tensor = torch.zeros_like(element)
    sizes = segments.on("sizes", device)
    for j, d in enumerate(layout.ragged_dims):
        row = row * sizes[:, j][element] + at[d]
    position = row + segments.on("offsets", device)[element]
    for j, d in enumerate(layout.static_dims):
        position = position * layout.static_sizes[j] + at[d]
    return position


def take_elements(x: NestedTensor, index: Sequence[int]) -> NestedTensor:
    """The elements with the given (non-negative) indices, in that order."""
    layout, values = x._layout, values_of(x)
    segments = layout.segments
    count = len(index)
    if count and all(b - a == 1 for a, b in zip(index, index[1:])) or not count:
        first = index[0] if count else 0
        bounds = segments.bounds
        low, high = (bounds[first], bounds[first + count]) if count else (0, 0)
        new = Segments(segments.sizes[first : first + count].clone())
        return like(x, values[low:high], layout.replace(segments=new))
    chosen = int64_tensor(list(index))
    new = Segments(segments.sizes.index_select(0, chosen))
    start = segments.offsets[:-1].index_select(0, chosen).to(values.device)
    owner_ = new.on("element", values.device)
    rows = start.index_select(0, owner_) + new.on("row", values.device)
    return like(x, values.index_select(0, rows), layout.replace(segments=new))


def remap_ragged(
    x: NestedTensor, j: int, counts: Tensor, source: Callable[[Tensor, Tensor], Tensor], fill: Any = None
) -> NestedTensor:
    """New sizes along ragged dim number `j`, each new coordinate read from an old one.

    Args:
        x: The tensor.
        j: Number of the ragged dim.
        counts: CPU int64 `(B,)` new sizes.
        source: `source(coordinate, size)` of every new row gives the coordinate to read, with the old size at hand.
        fill: When given, coordinates outside the element give this value.
    """
    layout, values = x._layout, values_of(x)
    segments, device = layout.segments, values.device
    sizes = segments.sizes.clone()
    sizes[:, j] = counts
    new = Segments(sizes)
    element = new.on("element", device)
    old = segments.on("sizes", device)
    row = torch.zeros_like(element)
    outside = None
    for i in range(segments.k):
        at = new.on(("coord", i), device)  # type: ignore[arg-type]
        size = old[:, i].index_select(0, element)
        if i == j:
            at = source(at, size)
            if fill is not None:
                outside = (at < 0) | (at >= size)
                at = torch.where(outside, 0, at)
        row = row * size + at
    row = row + segments.on("offsets", device).index_select(0, element)
    if outside is not None:
        row = torch.where(outside, 0, row)
        out = values.index_select(0, row) if values.shape[0] else values.new_zeros(len(row), *values.shape[1:])
        shape = [-1] + [1] * (values.dim() - 1)
        out = torch.where(outside.view(shape), torch.as_tensor(fill, dtype=values.dtype, device=device), out)
    else:
        out = values.index_select(0, row)
    return like(x, out, layout.replace(segments=new))


def flat_values(x: NestedTensor) -> Tensor:
    """All real values, element by element, each row-major."""
    layout, values = x._layout, values_of(x)
    if layout.ragged_dims == tuple(range(len(layout.ragged_dims))):
        return values.reshape(-1)
    return values.reshape(-1).index_select(0, row_major(layout, values.device))


def row_major(layout: Layout, device: torch.device) -> Tensor:
    """For each value in row-major element order, where it lies in `values.reshape(-1)`."""

    def build() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            numel = layout.numel
            if numel == 0:
                return torch.empty(0, dtype=torch.int64, device=device)
            at = coords(layout, device)
            element = owner(layout, device)
            sizes = layout.sizes.to(device)
            inner = torch.zeros_like(element)
            for d in range(layout.rank):
                inner = inner * sizes[:, d][element] + at[d]
            counts = sizes.prod(1) if layout.rank else torch.ones(layout.batch_size, dtype=torch.int64, device=device)
            start = torch.zeros(layout.batch_size + 1, dtype=torch.int64, device=device)
            torch.cumsum(counts, 0, out=start[1:])
            position = (inner + start[element]).expand(layout.rows, *layout.static_sizes).reshape(-1)
            index = torch.empty_like(position)
            index[position] = torch.arange(numel, device=device)
            return index

    return layout.derive(("row major", device), build)


def from_flat(flat: Tensor, layout: Layout, flags: Any) -> NestedTensor:
    """The inverse of `flat_values` under another (or the same) layout."""
    shape = (layout.rows, *layout.static_sizes)
    if layout.ragged_dims != tuple(range(len(layout.ragged_dims))):
        index = row_major(layout, flat.device)
        inverse = torch.empty_like(index)
        inverse[index] = torch.arange(len(index), device=flat.device)
        flat = flat.index_select(0, inverse)
    return wrap(flat.reshape(shape), layout, flags)


def positions(x: NestedTensor) -> NestedTensor:
    """A NestedTensor of the same layout that holds where each value lies in `values.reshape(-1)`."""
    layout = x._layout
    index = torch.arange(layout.numel, device=x._values.device).view(layout.rows, *layout.static_sizes)
    return wrap(index, layout, x._flags)
