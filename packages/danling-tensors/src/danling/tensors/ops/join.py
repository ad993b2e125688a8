"""Joining and splitting batches: cat, stack, split and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import first_nested, like, names
from danling.tensors.ops.rows import take_elements
from danling.tensors.ops.shape import insert_dim
from danling.tensors.ops.table import register
from danling.tensors.packing import difference, to_packed


def _sequence(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (list, tuple)) else list(args)


@register("join", "cat")
def cat(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    dim = kwargs.get("axis", dim)
    if isinstance(tensors, NestedTensor):
        return tensors
    tensors = [t for t in tensors if isinstance(t, NestedTensor) or t.shape != (0,)]
    first = first_nested(*tensors)
    d = first._layout.element_dim(dim)
    if d is None:
        return _cat_batch(first, tensors)
    if any(isinstance(t, NestedTensor) and d in t._layout.ragged_dims for t in tensors):
        return _cat_ragged(first, tensors, d)
    return _cat_static(first, tensors, d)


def _cat_batch(first: NestedTensor, tensors: Sequence[Tensor]) -> NestedTensor:
    layout = first._layout
    nested = []
    for t in tensors:
        if not isinstance(t, NestedTensor):
            if t.dim() != layout.rank + 1:
                raise ValueError(
                    f"cat: a dense operand {tuple(t.shape)} must have {layout.rank + 1} dims, elements first"
                )
            from danling.tensors.ops.grouped import nested_from_dense

            t = nested_from_dense(t.movedim(layout.batch_dim, 0), layout.ragged_dims, first)
        nested.append(t)
    # The empty batch of NestedTensor([]) fits every other one.
    known = [t for t in nested if t._layout.batch_size or t._layout.rank == layout.rank and t._layout.rank] or nested
    head = known[0]._layout
    ragged = tuple(sorted({d for t in known for d in t._layout.ragged_dims}))
    for t in known:
        own = t._layout
        if own.rank != head.rank:
            raise ValueError(f"cat: elements of rank {head.rank} and {own.rank}")
        if own.batch_first != head.batch_first and head.rank:
            raise ValueError("cat: one operand is batch_first and one is not; use transpose(0, 1) on one of them")
        for d in range(own.rank):
            if d not in ragged:
                a = head.static_sizes[head.static_dims.index(d)]
                b = own.static_sizes[own.static_dims.index(d)]
                if a != b:
                    raise ValueError(f"cat: static element dim {d} has size {a} in one operand and {b} in another")
    parts = [_with_ragged(t, ragged) for t in known]
    every = [p._layout.segments for p in parts]
    if any(s.symbolic for s in every):
        from danling.tensors.tracing import one_after_another

        segments: Segments = one_after_another(every, parts[0]._values.device)
    else:
        segments = Segments(torch.cat([s.sizes for s in every]))
    values = torch.cat([values_of(p) for p in parts])
    return like(first, values, parts[0]._layout.replace(segments=segments, batch_first=layout.batch_first))


def _with_ragged(x: NestedTensor, ragged: tuple[int, ...]) -> NestedTensor:
    """The same elements with further dims declared ragged."""
    layout = x._layout
    if layout.ragged_dims == ragged:
        return x
    sizes = layout.sizes[:, list(ragged)].contiguous()
    static = tuple(s for d, s in zip(layout.static_dims, layout.static_sizes) if d not in ragged)
    target = Layout(Segments(sizes), ragged, static, layout.batch_first)
    from danling.tensors.ops.rows import flat_values, from_flat

    return from_flat(flat_values(x), target, x._flags)


def _cat_ragged(first: NestedTensor, tensors: Sequence[Tensor], d: int) -> NestedTensor:
    """Lengths add: the rows of all operands, interleaved element by element."""
    layout = next(t._layout for t in tensors if isinstance(t, NestedTensor) and d in t._layout.ragged_dims)
    nested = []
    for t in tensors:
        if not isinstance(t, NestedTensor):
            if t.dim() != layout.rank + 1 or t.shape[layout.batch_dim] != layout.batch_size:
                raise ValueError(
                    f"cat: a dense operand {tuple(t.shape)} does not fit a batch of shape {tuple(layout.shape)}"
                )
            t = _dense_rows(t, layout, d, first)
        nested.append(t)
    ragged = tuple(sorted({r for t in nested for r in t._layout.ragged_dims}))
    parts = [_with_ragged(t, ragged) for t in nested]
    head = parts[0]._layout
    j = ragged.index(d)
    others = [i for i in range(len(ragged)) if i != j]
    for p in parts[1:]:
        own = p._layout
        if own.batch_size != head.batch_size or own.rank != head.rank or own.batch_first != head.batch_first:
            raise ValueError(f"cat: an operand {difference(own, head)}")
        if own.static_sizes != head.static_sizes:
            raise ValueError(f"cat: static sizes {head.static_sizes} and {own.static_sizes} differ")
        if others:
            wrong = (own.segments.sizes[:, others] != head.segments.sizes[:, others]).any(1)
            if bool(wrong.any()):
                raise ValueError(f"cat: element {int(wrong.nonzero()[0])} differs in another ragged dim")
    every = [p._layout.segments for p in parts]
    if any(s.symbolic for s in every):
        from danling.tensors.tracing import added

        new: Segments = added(every, parts[0]._values.device)
    else:
        sizes = head.segments.sizes.clone()
        for s in every[1:]:
            sizes[:, j] += s.sizes[:, j]
        new = Segments(sizes)
    values = torch.cat([values_of(p) for p in parts])
    device = values.device
    element = new.on("element", device)
    at = [new.on(("coord", i), device) for i in range(new.k)]  # type: ignore[arg-type]
    row = torch.zeros_like(element)
    base, before = 0, torch.zeros_like(element)
    for p in parts:
        segments = p._layout.segments
        extents = segments.on("sizes", device)[element]
        here = (at[j] >= before) & (at[j] < before + extents[:, j])
        inner = torch.zeros_like(element)
        for i in range(new.k):
            inner = inner * extents[:, i] + (at[i] - before if i == j else at[i])
        row = torch.where(here, inner + segments.on("offsets", device)[element] + base, row)
        before = before + extents[:, j]
        base += segments.rows
    return like(first, values.index_select(0, row), head.replace(segments=new))


def _dense_rows(t: Tensor, layout: Layout, d: int, first: NestedTensor) -> NestedTensor:
    """A dense `(B, ..., K, ...)` operand: K more rows in every element."""
    t = t.movedim(layout.batch_dim, 0)
    if layout.segments.symbolic and layout.segments.k == 1:
        from danling.tensors.tracing import uniform

        static = tuple(t.shape[e + 1] for e in layout.static_dims)
        same = Layout(uniform(t.shape[0], t.shape[d + 1], t.device), layout.ragged_dims, static, True)
        return wrap(to_packed(t, same), same.replace(batch_first=layout.batch_first), first._flags)
    sizes = layout.sizes[:, list(layout.ragged_dims)].clone()
    sizes[:, layout.ragged_dims.index(d)] = t.shape[d + 1]
    own = Layout(Segments(sizes), layout.ragged_dims, tuple(t.shape[e + 1] for e in layout.static_dims), True)
    return wrap(to_packed(t, own), own.replace(batch_first=layout.batch_first), first._flags)


def _cat_static(first: NestedTensor, tensors: Sequence[Tensor], d: int) -> NestedTensor:
    from danling.tensors.ops.broadcast import expand_dense

    layout = first._layout
    parts = []
    for t in tensors:
        if isinstance(t, NestedTensor):
            own = t._layout
            if own.segments != layout.segments or own.ragged_dims != layout.ragged_dims:
                raise ValueError(f"cat: operands must agree in their ragged sizes: {layout} and {own}")
            parts.append(values_of(t))
            continue
        shape = list(layout.shape)
        shape[layout.shape_dim(d)] = t.shape[layout.shape_dim(d)]
        if list(t.shape) != shape:
            raise ValueError(f"cat: a dense operand has shape {tuple(t.shape)}, which does not fit {tuple(shape)}")
        parts.append(expand_dense(t, layout, "cat"))
    rows = [p.expand(layout.rows, *p.shape[1:]) for p in parts]
    out = torch.cat(rows, layout.values_dim(d))
    return like(first, out, layout.with_static(tuple(out.shape[1:])))


@register("join", "stack")
def stack(func: Any, tensors: Any, dim: int = 0) -> Any:
    tensors = list(tensors)
    first = first_nested(*tensors)
    layout = first._layout
    ndim = layout.rank + 2
    at = dim + ndim if dim < 0 else dim
    if not 0 <= at < ndim:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], but got {dim})")
    if at <= layout.batch_dim:
        raise ValueError(f"stack(dim={dim}) would put a dim at or before the batch")
    from danling.tensors.ops.broadcast import expand_dense

    parts: list[Tensor] = []
    for t in tensors:
        if isinstance(t, NestedTensor):
            if t._layout != layout:
                raise ValueError(f"stack needs equal structures, but an operand {difference(t._layout, layout)}")
            parts.append(insert_dim(t, at - 1))
        else:
            parts.append(insert_dim(like(first, expand_dense(t, layout, "stack")), at - 1))
    return torch.cat(parts, at)


@register("join", "hstack", "vstack", "dstack", "column_stack")
def hstack(func: Any, tensors: Any) -> Any:
    # Elements are stacked as torch stacks them; an element dim e is dim e + 1 of the batch.
    name = names(func)
    parts = []
    for t in tensors:
        if not isinstance(t, NestedTensor):
            raise ValueError(f"{name} of NestedTensors takes NestedTensors only; use cat for dense operands")
        rank = t._layout.rank
        if name == "hstack" and rank == 0:
            t = insert_dim(t, 0)
        elif name == "vstack":
            t = torch.atleast_2d(t)
        elif name == "dstack":
            t = torch.atleast_3d(t)
        elif name == "column_stack":
            if rank == 0:
                t = insert_dim(t, 0)
            if rank <= 1:
                t = insert_dim(t, 1)
        parts.append(t)
    layout = parts[0]._layout
    d = {"hstack": 0 if layout.rank == 1 else 1, "vstack": 0, "dstack": 2, "column_stack": 1}[name]
    return torch.cat(parts, layout.shape_dim(d))


@register("join", "meshgrid")
def meshgrid(func: Any, *tensors: Any, indexing: str | None = None) -> Any:
    """Coordinates of each element's own grid; dense operands are shared by all elements."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    first = first_nested(*tensors)
    ranks = [t._layout.rank if isinstance(t, NestedTensor) else t.dim() for t in tensors]
    if indexing not in (None, "ij", "xy") or max(ranks) > 1 or len({t.dtype for t in tensors}) > 1:
        func(*(t.concat[:0] if isinstance(t, NestedTensor) else t for t in tensors), indexing=indexing)
        raise RuntimeError(f"meshgrid takes elements of 0 or 1 dims, got {ranks}")
    like_first = first._layout
    grids = []
    for at, (t, rank) in enumerate(zip(tensors, ranks)):
        if not isinstance(t, NestedTensor):
            none = torch.empty(like_first.batch_size, 0, dtype=torch.int64, device="cpu")
            shared = Layout(Segments(none), (), tuple(t.shape), like_first.batch_first)
            t = like(first, t.expand(like_first.batch_size, *t.shape), shared)
        elif not rank:
            t = like(t, values_of(t), t._layout.replace(batch_first=like_first.batch_first))
        for d in range(len(tensors)):
            if d != at or not rank:
                t = insert_dim(t, d)
        grids.append(t)
    out = torch.broadcast_tensors(*grids)
    if indexing == "xy" and len(tensors) > 1:
        dims = (out[0]._layout.shape_dim(0), out[0]._layout.shape_dim(1))  # type: ignore[attr-defined]
        return tuple(grid.transpose(*dims) for grid in out)
    return tuple(out)


@register("join", "split", "split_with_sizes", "hsplit", "vsplit", "dsplit", "chunk", "tensor_split")
def split(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    size, dim = _split_arguments(name, *args, **kwargs)
    layout = x._layout
    if name in ("hsplit", "vsplit", "dsplit"):  # named after the dims of one element
        dim = layout.shape_dim({"hsplit": min(1, layout.rank - 1), "vsplit": 0, "dsplit": 2}[name])
    d = layout.element_dim(dim)
    if d is None:
        pieces = func(torch.arange(layout.batch_size, device="cpu"), size)
        return type(pieces)(take_elements(x, p.tolist()) for p in pieces)
    if d not in layout.ragged_dims:
        v = layout.values_dim(d)
        base = {"hsplit": torch.tensor_split, "vsplit": torch.tensor_split, "dsplit": torch.tensor_split}.get(
            name, func
        )
        pieces = base(values_of(x), size, v)
        return type(pieces)(like(x, p, layout.with_static(tuple(p.shape[1:]))) for p in pieces)
    if name in ("split", "chunk"):
        func(torch.empty(1, device="cpu"), size)  # raises what torch does of a number it cannot cut by
    head = (slice(None),) * (d + 1)
    column = layout.segments.sizes[:, layout.ragged_dims.index(d)]
    if name == "chunk" or (isinstance(size, int) and name in ("tensor_split", "hsplit", "vsplit", "dsplit")):
        return _even(x, d, int(size), column, name)
    if isinstance(size, int):
        top = max(int(column.max()) if len(column) else 0, 1)
        bounds = [(a, a + size) for a in range(0, top, size)]
    elif name in ("split", "split_with_sizes"):
        bounds, start = [], 0
        for n in size:
            bounds.append((start, start + n))
            start += n
        top = int(column.max()) if len(column) else 0
        if start != top:
            raise ValueError(f"{name}: sizes {list(size)} add up to {start}, the longest element has {top}")
    else:
        edges = [int(s) for s in size]
        return tuple(x[(*head, slice(a, b))] for a, b in zip([None, *edges], [*edges, None]))
    return tuple(x[(*head, slice(a, b))] for a, b in bounds)


def _split_arguments(name: str, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    keys = (
        "split_size_or_sections",
        "split_size",
        "split_sizes",
        "chunks",
        "indices_or_sections",
        "sections",
        "indices",
    )
    size = args[0] if args else next(kwargs[k] for k in (*keys, "tensor_indices_or_sections") if k in kwargs)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if isinstance(size, Tensor):
        size = size.tolist()
    return size, dim


def _even(x: NestedTensor, d: int, count: int, column: Tensor, name: str) -> tuple[NestedTensor, ...]:
    """Each element cut into `count` pieces as torch cuts it."""
    from danling.tensors.ops.indexing import _from_start

    j = x._layout.ragged_dims.index(d)
    if name == "chunk":
        step = (column + count - 1) // count
        pieces = torch.where(step > 0, (column + step - 1) // step.clamp_min(1), count)
        if bool((pieces != count).any()):
            i = int((pieces != count).nonzero()[0])
            raise ValueError(f"chunk: element {i} of size {int(column[i])} gives {int(pieces[i])} pieces, not {count}")
        starts = [torch.minimum(step * n, column) for n in range(count + 1)]
    else:
        small, extra = column // count, column % count
        starts = [small * n + torch.minimum(extra, torch.tensor(n, device="cpu")) for n in range(count + 1)]
    device = x._values.device
    return tuple(_from_start(x, j, b - a, a.to(device), 1) for a, b in zip(starts, starts[1:]))


@register("join", "unbind")
def unbind(func: Any, x: Any, dim: int | None = None) -> Any:
    return x.unbind() if dim is None else x.unbind(dim)
