"""Diagonals and triangles of ragged matrices, by coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import values_of, wrap
from danling.tensors.ops.base import like, names
from danling.tensors.ops.rows import coords, flat_position, flat_values, owner
from danling.tensors.ops.table import register


@register("shape", "tril", "triu")
def triangle(func: Any, x: Any, diagonal: int = 0) -> Any:
    layout, values = x._layout, values_of(x)
    if layout.rank < 2:
        raise RuntimeError(f"{names(func)}: input tensor must have at least 2 dimensions")
    at = coords(layout, values.device)
    offset = at[layout.rank - 1] - at[layout.rank - 2]
    keep = offset <= diagonal if names(func).startswith("tril") else offset >= diagonal
    if names(func).endswith("_"):
        values.masked_fill_(~keep, 0)
        return x
    return like(x, torch.where(keep, values, torch.zeros((), dtype=values.dtype, device=values.device)))


@register("shape", "diagonal", "diag", "linalg_diagonal")
def diagonal(func: Any, x: Any, offset: int = 0, dim1: int | None = None, dim2: int | None = None, **kw: Any) -> Any:
    layout = x._layout
    name = names(func)
    offset = kw.get("diagonal", offset)
    if name == "diag":
        if layout.rank == 1:
            return torch.diag_embed(x, offset)
        if layout.rank != 2:
            raise RuntimeError("diag(): Supports 1D or 2D tensors")
    if name != "diagonal" or dim1 is None:
        dim1, dim2 = (-2, -1) if name != "diagonal" or layout.rank == 0 else (0, 1)
    if dim1 is None or dim2 is None:
        raise ValueError("diagonal needs dim1 and dim2")
    a, b = layout.element_dim(dim1), layout.element_dim(dim2)
    if a is None or b is None:
        raise ValueError("diagonal across the batch dim would read padding; give dim1 and dim2 inside the elements")
    if a == b:
        raise RuntimeError("diagonal dimensions cannot be identical")
    values = values_of(x)
    if a not in layout.ragged_dims and b not in layout.ragged_dims:
        out = values.diagonal(offset, layout.values_dim(a), layout.values_dim(b))
        ragged = tuple(r - (r > a) - (r > b) for r in layout.ragged_dims)
        return like(x, out, layout.with_dims(ragged, tuple(out.shape[1:])))
    sizes = layout.sizes
    length = torch.minimum(sizes[:, a] - max(-offset, 0), sizes[:, b] - max(offset, 0)).clamp_min(0)
    rest = [d for d in range(layout.rank) if d not in (a, b)]
    kept = [d for d in rest if d in layout.ragged_dims]
    new_rank = len(rest) + 1
    ragged = (*(rest.index(d) for d in kept), new_rank - 1)
    static = tuple(layout.static_sizes[layout.static_dims.index(d)] for d in rest if d not in kept)
    segments = Segments(torch.stack([*(sizes[:, d] for d in kept), length], 1))
    target = Layout(segments, ragged, static, layout.batch_first)
    device = values.device
    own = coords(target, device)
    at: list[Tensor] = [own[0]] * layout.rank
    for i, d in enumerate(rest):
        at[d] = own[i]
    at[a], at[b] = own[-1] + max(-offset, 0), own[-1] + max(offset, 0)
    where = flat_position(layout, owner(target, device), at)
    where = where.expand(target.rows, *target.static_sizes)
    return like(x, values.reshape(-1)[where], target)


@register("shape", "trace")
def trace(func: Any, x: Any) -> Any:
    if x._layout.rank != 2:
        raise RuntimeError(f"trace: expected a matrix, but got elements with {x._layout.rank} dims")
    return torch.sum(torch.diagonal(x, 0, x._layout.shape_dim(0), x._layout.shape_dim(1)), -1)


@register("shape", "diag_embed", "diagflat")
def diag_embed(func: Any, x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    layout = x._layout
    if names(func) == "diagflat":
        if layout.rank != 1:
            lengths = [int(s.numel()) for s in layout.element_shapes()]
            flat = Layout.from_lengths(lengths, (), 0, layout.batch_first)
            x = wrap(flat_values(x), flat, x._flags)
            layout = flat
        dim1, dim2 = -2, -1
    last = layout.rank - 1
    if last < 0:
        raise RuntimeError("diag_embed needs elements with at least one dim")
    if dim1 % (layout.rank + 2) != layout.rank or dim2 % (layout.rank + 2) != layout.rank + 1:
        raise ValueError("diag_embed of a NestedTensor fills the last two dims; use movedim afterwards")
    values = values_of(x)
    if last not in layout.ragged_dims:
        out = torch.diag_embed(values, offset)
        return like(x, out, layout.with_dims(layout.ragged_dims, tuple(out.shape[1:])))
    sizes = layout.sizes
    side = sizes[:, last] + abs(offset)
    kept = [d for d in layout.ragged_dims if d != last]
    segments = Segments(torch.stack([*(sizes[:, d] for d in kept), side, side], 1))
    target = Layout(segments, (*kept, last, last + 1), layout.static_sizes, layout.batch_first)
    where_at = coords(layout, values.device)
    at = [*where_at, where_at[last] + max(offset, 0)]
    at[last] = where_at[last] + max(-offset, 0)
    where = flat_position(target, owner(layout, values.device), at).expand(values.shape)
    out = values.new_zeros(target.numel).index_put((where.reshape(-1),), values.reshape(-1))
    return like(x, out.view(target.rows, *target.static_sizes), target)


@register("in-place", "fill_diagonal_")
def fill_diagonal_(func: Any, x: Any, fill_value: Any, wrap: bool = False) -> Any:
    layout, values = x._layout, values_of(x)
    if layout.rank < 2:
        raise RuntimeError("dimensions must larger than 1")
    at = coords(layout, values.device)
    if wrap and layout.rank == 2:
        columns = layout.sizes.to(values.device)[:, 1][owner(layout, values.device)]
        on = at[0] % (columns + 1) == at[1]
    else:
        on = at[0] == at[1]
        for other in at[2:]:
            on = on & (at[0] == other)
    values.masked_fill_(on.expand_as(values), fill_value)
    return x
