"""Broadcasting: NestedTensors with each other and with dense tensors, read at real positions only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.packing import to_packed

Operand = Any


def align(operands: list[Tensor], name: str = "op") -> tuple[Layout, list[Tensor]]:
    """Bring operands to the rows of one layout.

    Args:
        operands: Tensors, at least one of them nested. 0-d dense tensors stay as they are, so that type promotion does.
        name: The op, for messages.

    Returns:
        The common layout, whose static sizes are those of the first nested operand (the result's follow from what the op
        makes of the values), and for each operand a tensor that broadcasts against `(R, *static)`.

    Raises:
        ValueError: Sizes, batch sizes or batch orders that do not fit.
    """
    nested = [x for x in operands if isinstance(x, NestedTensor)]
    first = nested[0]._layout
    if all(x._layout is first for x in nested[1:]):
        layout = first
    else:
        layout = common_layout(nested, name)
    out: list[Tensor] = []
    for x in operands:
        if isinstance(x, NestedTensor):
            out.append(values_of(x) if x._layout is layout else expand_nested(x, layout))
        elif x.dim() == 0:
            out.append(x)
        else:
            out.append(expand_dense(x, layout, name))
    return layout, out


def common_layout(nested: list[NestedTensor], name: str) -> Layout:
    """The layout in which NestedTensors of one batch meet, element by element as torch broadcasts."""
    first = nested[0]._layout
    for x in nested[1:]:
        if x._layout.batch_size != first.batch_size:
            raise ValueError(f"{name}: batch sizes {first.batch_size} and {x._layout.batch_size} differ")
        if x._layout.batch_first != first.batch_first and min(x._layout.rank, first.rank) > 0:
            raise ValueError(f"{name}: one operand is batch_first and one is not; use transpose(0, 1) on one of them")
    rank = max(x._layout.rank for x in nested)
    batch_first = next(x._layout.batch_first for x in nested if x._layout.rank == rank)
    ragged = sorted({d + rank - x._layout.rank for x in nested for d in x._layout.ragged_dims})
    for x in nested:  # the common case: one operand has the lengths of the result already
        shift = rank - x._layout.rank
        if [d + shift for d in x._layout.ragged_dims] == ragged and all(
            _fits(y._layout, x._layout, rank) for y in nested if y is not x
        ):
            static = _static_sizes(nested, rank, ragged, name)
            return (
                x._layout.with_dims(tuple(ragged), static)
                if shift == 0
                else Layout(x._layout.segments, tuple(ragged), static, batch_first)
            )
    batch = first.batch_size
    columns = []
    for d in ragged:
        size = torch.ones(batch, dtype=torch.int64, device="cpu")
        for x in nested:
            own = d - (rank - x._layout.rank)
            if own < 0:
                continue
            column = x._layout.sizes[:, own]
            wrong = (size != column) & (size != 1) & (column != 1)
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{name}: element {i} has sizes {int(size[i])} and {int(column[i])} along element dim {d}"
                )
            size = torch.where(size == 1, column, size)
        columns.append(size)
    sizes = torch.stack(columns, 1) if columns else torch.empty(batch, 0, dtype=torch.int64, device="cpu")
    return Layout(Segments(sizes), tuple(ragged), _static_sizes(nested, rank, ragged, name), batch_first)


def _fits(other: Layout, layout: Layout, rank: int) -> bool:
    """Whether `other` meets `layout` without changing its lengths: equal ones, or no ragged dim and sizes of 1."""
    shift = rank - other.rank
    if [d + shift for d in other.ragged_dims] == [d + rank - layout.rank for d in layout.ragged_dims]:
        return other.segments == layout.segments
    ragged = {d + rank - layout.rank for d in layout.ragged_dims}
    return not other.ragged_dims and all(
        size == 1 for d, size in zip(other.static_dims, other.static_sizes) if d + shift in ragged
    )


def _static_sizes(nested: list[NestedTensor], rank: int, ragged: list[int], name: str) -> tuple[int, ...]:
    sizes = []
    for d in range(rank):
        if d in ragged:
            continue
        size = 1
        for x in nested:
            layout = x._layout
            own = d - (rank - layout.rank)
            if own >= 0:
                other = layout.static_sizes[layout.static_dims.index(own)]
                if size != 1 and other != 1 and size != other:
                    raise ValueError(f"{name}: static sizes {size} and {other} along element dim {d} do not broadcast")
                size = other if size == 1 else size
        sizes.append(size)
    return tuple(sizes)


def expand_nested(x: NestedTensor, layout: Layout) -> Tensor:
    """Values of `x` at the rows of `layout`; static dims it lacks have size 1."""
    own = x._layout
    values = values_of(x)
    shift = layout.rank - own.rank
    position = {d + shift: j for j, d in enumerate(own.static_dims)}
    static = [own.static_sizes[position[d]] if d in position else 1 for d in layout.static_dims]
    if tuple(d + shift for d in own.ragged_dims) == layout.ragged_dims and own.segments == layout.segments:
        return values.reshape(own.rows, *static)
    device = values.device
    segments = layout.segments
    element = segments.on("element", device)
    # Static dims of x that are ragged in the result are read by index, like its rows.
    read = [d for d in layout.ragged_dims if d in position and own.static_sizes[position[d]] > 1]
    kept = [1 + position[d] for d in layout.static_dims if d in position]
    unit = [1 + position[d] for d in layout.ragged_dims if d in position and d not in read]
    index = own.segments.on("offsets", device).index_select(0, element)
    inner = torch.zeros_like(index)
    sizes = own.segments.on("sizes", device)
    for j, d in enumerate(own.ragged_dims):
        size = sizes[:, j].index_select(0, element)
        at = segments.on(("coord", layout.ragged_dims.index(d + shift)), device)  # type: ignore[arg-type]
        inner = inner * size + at * (size != 1)
    index = index + inner
    for d in read:
        at = segments.on(("coord", layout.ragged_dims.index(d)), device)  # type: ignore[arg-type]
        index = index * own.static_sizes[position[d]] + at
    source = values.permute(0, *(1 + position[d] for d in read), *unit, *kept)
    source = source.flatten(0, len(read) + len(unit)) if read or unit else source
    return source.index_select(0, index).reshape(segments.rows, *static)


def expand_dense(x: Tensor, layout: Layout, name: str = "op") -> Tensor:
    """A dense operand, aligned with `layout.shape` by torch's rules, at the rows of `layout`.

    Raises:
        ValueError: It has more dims, or an extent along the batch or a ragged dim that is neither 1 nor the padded one.
    """
    rank = layout.rank
    missing = rank + 1 - x.dim()
    if missing < 0:
        raise ValueError(f"{name}: a dense operand of shape {tuple(x.shape)} has more dims than {tuple(layout.shape)}")
    shape = (1,) * missing + tuple(x.shape)
    batch_dim = layout.batch_dim
    segments = layout.segments
    over_batch = shape[batch_dim] != 1
    if over_batch and shape[batch_dim] != segments.batch_size:
        raise _misfit(x, layout, name, missing)
    over: list[int] = []  # ragged dims (by number) the operand varies along
    for j, d in enumerate(layout.ragged_dims):
        extent = shape[layout.shape_dim(d)]
        if extent != 1 or segments.max_sizes[j] == 1:
            if extent != segments.max_sizes[j]:
                raise _misfit(x, layout, name, missing)
            if extent != 1:
                over.append(j)
    static_dims = [layout.shape_dim(d) for d in layout.static_dims]
    static = [shape[d] for d in static_dims]
    x = x.reshape(shape)
    if over_batch and len(over) == segments.k and over:
        padded = layout.with_static(tuple(static))
        return to_packed(x, padded)
    ragged = [layout.shape_dim(d) for d in layout.ragged_dims]
    if not over:
        x = x.permute(batch_dim, *ragged, *static_dims).flatten(0, len(ragged))
        if not over_batch or layout.dense:
            return x
        return kernels.segment_expand(x, segments.on("offsets", x.device), segments.rows)
    device = x.device
    x = x.permute(batch_dim, *ragged, *static_dims)
    index = segments.on("element", device) if over_batch else None
    for j in range(segments.k):
        if j in over:
            at = segments.on(("coord", j), device)  # type: ignore[arg-type]
            index = at if index is None else index * segments.max_sizes[j] + at
    assert index is not None
    return x.flatten(0, segments.k).index_select(0, index)


def _misfit(x: Tensor, layout: Layout, name: str, missing: int) -> ValueError:
    hint = ""
    if missing and x.shape[0] == layout.batch_size:
        hint = "; for one row per element insert the ragged dim: x[:, None]"
    return ValueError(
        f"{name}: a dense operand of shape {tuple(x.shape)} does not fit {tuple(layout.shape)} "
        f"(ragged dims stretch only from 1 and never to another extent){hint}"
    )
