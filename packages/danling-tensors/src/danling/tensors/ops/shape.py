"""Shape ops that change no value's place: view, transpose, squeeze, expand and their kin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like, names
from danling.tensors.ops.rows import flat_values, from_flat
from danling.tensors.ops.table import register


def unbind_static(x: NestedTensor, dim: int) -> tuple[NestedTensor, ...]:
    """`unbind` along a static dim.

    Raises:
        ValueError: The dim is ragged.
    """
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None or d in layout.ragged_dims:
        raise ValueError(f"unbind along ragged dim {dim} gives elements different numbers of pieces; index instead")
    v = layout.values_dim(d)
    derived = drop_dim(layout, d)
    return tuple(like(x, part, derived) for part in values_of(x).unbind(v))


def drop_dim(layout: Layout, d: int) -> Layout:
    """The layout without static element dim `d`."""
    ragged = tuple(r - (r > d) for r in layout.ragged_dims)
    static = tuple(s for e, s in zip(layout.static_dims, layout.static_sizes) if e != d)
    return layout.with_dims(ragged, static)


def ints_of(args: tuple[Any, ...]) -> list[int]:
    """Sizes or dims given one by one or as one sequence."""
    items = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple, torch.Size)) else args
    return [i if isinstance(i, torch.SymInt) else int(i) for i in items]  # type: ignore[misc]


# Views.
@register("shape", "view", "reshape")
def view(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if "dtype" in kwargs or (len(args) == 1 and isinstance(args[0], torch.dtype)):
        out = func(values_of(x), *args, **kwargs)
        return like(x, out, x._layout.with_static(tuple(out.shape[1:])))
    if not isinstance(x, NestedTensor):
        return func(x, *args, **kwargs)
    return view_as_target(
        x, ints_of((kwargs["shape"],) if "shape" in kwargs else kwargs.get("size", args)), names(func)
    )


@register("shape", "view_as", "reshape_as")
def view_as(func: Any, x: Any, other: Any) -> Any:
    if other is x and isinstance(x, NestedTensor) and not torch.is_grad_enabled():
        # A custom Function that returns its input asks for this, and gives the result a history of its own.
        return like(x, x._values.detach())
    if isinstance(x, NestedTensor) and isinstance(other, NestedTensor):
        if x._layout.batch_size == other._layout.batch_size and x._layout.numel == other._layout.numel:
            mine = [math.prod(s) for s in x._layout.element_shapes()]
            if mine == [math.prod(s) for s in other._layout.element_shapes()]:
                return from_flat(flat_values(x), other._layout, x._flags)
        raise ValueError(f"{names(func)}: the elements of {x._layout} do not have the sizes of {other._layout}")
    if isinstance(x, NestedTensor):
        return view_as_target(x, list(other.shape), names(func))
    return func(x, other.tensor)


def view_as_target(x: NestedTensor, target: list[int], name: str) -> Any:
    """`view` by the forms rows, element, keep (see the documentation of NestedTensor shapes)."""
    layout = x._layout
    if target == [-1]:
        return flat_values(x)
    leading = layout.ragged_dims == tuple(range(layout.segments.k))
    numel = math.prod(layout.static_sizes)
    if target and target[0] == -1 and layout.batch_first and leading and layout.rank:
        rest = target[1:]
        known = math.prod(r for r in rest if r != -1)
        if -1 not in rest and known == numel:
            return values_of(x).reshape(layout.rows, *rest)
    symbolic = layout.segments.symbolic
    if target and -1 not in target and target[0] != 1 and not symbolic and layout.batch_size and layout.numel:
        wanted = math.prod(target)
        if all(n * numel == wanted for n in layout.segments.lengths):
            flat = flat_values(x).reshape(layout.batch_size, *target)
            sizes = torch.empty(layout.batch_size, 0, dtype=torch.int64, device="cpu")
            return like(x, flat, Layout(Segments(sizes), (), tuple(target), layout.batch_first))
    bd = layout.batch_dim
    if len(target) > bd and target[bd] == layout.batch_size:
        out = view_element(x, target[:bd] + target[bd + 1 :], name)
        if out is not None:
            return out
    literal = math.prod(layout.shape[: layout.segments.k + 1])
    hint = ""
    if literal in target and layout.batch_first:
        hint = f"; {literal} stands for padded positions: write -1, or flatten(0, 1), for the real rows"
    raise ValueError(f"{name}: {target} does not describe the elements of {tuple(layout.shape)}{hint}")


def view_element(x: NestedTensor, element: list[int], name: str) -> NestedTensor | None:
    """Every element viewed as `element`, in which a ragged dim is -1 or its padded size; `None` when it does not fit.

    Raises:
        ValueError: A factor does not divide the size of some element.
    """
    layout = x._layout
    derived = layout.derive(("view", tuple(element)), lambda: _match(layout, element))
    if isinstance(derived, str):
        raise ValueError(f"{name}: {derived}")
    if derived is None:
        return None
    if derived.segments is layout.segments:
        return like(x, values_of(x).reshape(layout.rows, *derived.static_sizes), derived)
    return from_flat(flat_values(x), derived, x._flags)


def _match(layout: Layout, target: list[int]) -> Any:
    """The layout of elements viewed as `target`, `None` when it does not fit, or the reason as a string."""
    old: list[Any] = [0] * layout.rank
    for j, d in enumerate(layout.ragged_dims):
        old[d] = ("ragged", j)
    for d, size in zip(layout.static_dims, layout.static_sizes):
        old[d] = size
    table = layout.segments.sizes
    trouble: list[str] = []

    def search(i: int, j: int, ragged: list[tuple[int, Tensor | int]], static: list[int]) -> Any:
        if i == len(old) and j == len(target):
            return ragged, static
        if j < len(target) and i < len(old) and isinstance(old[i], tuple):
            number = old[i][1]
            top = layout.max_sizes[number]
            if target[j] in (-1, top):
                found = search(i + 1, j + 1, [*ragged, (j, number)], static)
                if found is not None:
                    return found
            column, high = table[:, number], i + 1  # merge with dims to the right
            while high < len(old):
                column = column * (table[:, old[high][1]] if isinstance(old[high], tuple) else old[high])
                high += 1
                if target[j] in (-1, int(column.max()) if len(column) else 0):
                    found = search(high, j + 1, [*ragged, (j, column)], static)
                    if found is not None:
                        return found
            for width in range(2, len(target) - j + 1):  # split by a factor
                part = target[j : j + width]
                holes = [h for h, size in enumerate(part) if size == -1]
                if len(holes) > 1:
                    continue
                options = holes or range(width)
                for hole in options:
                    factor = math.prod(size for h, size in enumerate(part) if h != hole)
                    if factor <= 0 or (part[hole] != -1 and part[hole] * factor != top):
                        continue
                    column = table[:, number]
                    uneven = (column % factor != 0).nonzero()
                    if len(uneven):
                        i0 = int(uneven[0])
                        trouble.append(f"element {i0} has size {int(column[i0])}, which {factor} does not divide")
                        continue
                    new = [size for h, size in enumerate(part) if h != hole]
                    found = search(i + 1, j + width, [*ragged, (j + hole, column // factor)], static + new)
                    if found is not None:
                        return found
            return None
        if j < len(target) and target[j] == -1 and i < len(old):  # static dims may lead a merged ragged dim
            column = torch.ones(layout.batch_size, dtype=torch.int64, device="cpu")
            for high in range(i, len(old)):
                column = column * (table[:, old[high][1]] if isinstance(old[high], tuple) else old[high])
                if any(isinstance(size, tuple) for size in old[i : high + 1]):
                    found = search(high + 1, j + 1, [*ragged, (j, column)], static)
                    if found is not None:
                        return found
        # Static dims: the shortest runs of old and new dims with one product; size 1 may appear or vanish anywhere.
        for low in range(i, len(old) + 1):
            run = old[i:low]
            if any(isinstance(size, tuple) for size in run):
                break
            product = math.prod(run)
            for high in range(j, len(target) + 1):
                if low == i and high == j:
                    continue
                part = target[j:high]
                if part.count(-1) > 1:
                    break
                known = math.prod(size for size in part if size != -1)
                if -1 in part:
                    if known == 0 or product % known or low == i:
                        continue
                    part = [product // known if size == -1 else size for size in part]
                elif known != product:
                    continue
                found = search(low, high, ragged, static + part)
                if found is not None:
                    return found
        return None

    found = search(0, 0, [], [])
    if found is None:
        return trouble[0] if trouble else None
    ragged, static = found
    dims = tuple(j for j, _ in ragged)
    if all(isinstance(c, int) for _, c in ragged) and [c for _, c in ragged] == list(range(layout.segments.k)):
        if _static_runs_kept(layout, dims, target, static):
            return Layout(layout.segments, dims, tuple(static), layout.batch_first)
    columns = [table[:, c] if isinstance(c, int) else c for _, c in ragged]
    sizes = (
        torch.stack(columns, 1).contiguous()
        if columns
        else torch.empty(layout.batch_size, 0, dtype=torch.int64, device="cpu")
    )
    return Layout(Segments(sizes), dims, tuple(static), layout.batch_first)


def _static_runs_kept(layout: Layout, dims: tuple[int, ...], target: list[int], static: list[int]) -> bool:
    """Whether static dims stay between the same ragged dims, so that rows keep their place."""

    def runs(ragged: tuple[int, ...], sizes: list[int], rank: int) -> list[int]:
        out, position = [1], 0
        for d in range(rank):
            if d in ragged:
                out.append(1)
            else:
                out[-1] *= sizes[position]
                position += 1
        return out

    return runs(layout.ragged_dims, list(layout.static_sizes), layout.rank) == runs(dims, static, len(target))


@register("shape", "flatten", "ravel")
def flatten(func: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    layout = x._layout
    ndim = layout.rank + 1
    for dim in (start_dim, end_dim):
        layout.element_dim(dim)  # raises when it is out of range
    start, end = start_dim % ndim, end_dim % ndim
    if start == 0 and end == ndim - 1 or names(func) == "ravel":
        return flat_values(x)
    if start > end:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    if start == end:
        return x
    if start <= layout.batch_dim <= end:
        last = layout.element_dim(end)
        leading = layout.ragged_dims == tuple(range(layout.segments.k))
        if start == 0 and layout.batch_first and leading and layout.ragged_dims and last == layout.ragged_dims[-1]:
            return values_of(x)
        raise ValueError(
            f"flatten({start_dim}, {end_dim}) would merge padded positions with the batch; it must end at the last ragged "
            "dim of elements whose ragged dims lead, or use .tensor"
        )
    d0, d1 = layout.element_dim(start), layout.element_dim(end)
    assert d0 is not None and d1 is not None
    inside = [layout.static_sizes[j] for j, d in enumerate(layout.static_dims) if d0 <= d <= d1]
    merged = -1 if any(d0 <= r <= d1 for r in layout.ragged_dims) else math.prod(inside)
    out = view_element(x, _element_target(layout, d0, d1, [merged]), "flatten")
    assert out is not None
    return out


@register("shape", "unflatten")
def unflatten(func: Any, x: Any, dim: int, sizes: Any) -> Any:
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None:
        raise ValueError("unflatten cannot split the batch dim")
    sizes = list(sizes)
    if d not in layout.ragged_dims:
        out = values_of(x).unflatten(layout.values_dim(d), sizes)
        ragged = tuple(r + (len(sizes) - 1) * (r > d) for r in layout.ragged_dims)
        return like(x, out, layout.with_dims(ragged, tuple(out.shape[1:])))
    out = view_element(x, _element_target(layout, d, d, sizes), "unflatten")
    if out is None:
        raise ValueError(f"unflatten: {sizes} does not divide ragged dim {dim}")
    return out


def _element_target(layout: Layout, first: int, last: int, sizes: list[int]) -> list[int]:
    """Element dims `first` to `last` replaced by `sizes`, the other ragged dims as -1."""
    static = dict(zip(layout.static_dims, layout.static_sizes))
    element = [static.get(e, -1) for e in range(layout.rank)]
    element[first : last + 1] = sizes
    return element


# Order of dims.
def permute_dims(x: NestedTensor, order: list[int], name: str) -> NestedTensor:
    """Permute `.shape` dims; the batch may end at index 0 or 1."""
    layout = x._layout
    ndim = layout.rank + 1
    order = [o + ndim if o < 0 else o for o in order]
    if sorted(order) != list(range(ndim)):
        raise RuntimeError(f"{name}: {order} is not a permutation of {ndim} dims")
    place = order.index(layout.batch_dim)
    if place > 1:
        raise ValueError(f"{name}: the batch dim can be at index 0 or 1, not {place}")
    element = [layout.element_dim(o) for o in order if o != layout.batch_dim]
    batch_first = place == 0 if layout.rank else layout.batch_first
    key = ("permute", tuple(element), batch_first)  # type: ignore[arg-type]
    derived, static_order, ragged_order = layout.derive(key, lambda: _permuted(layout, element, batch_first))
    values = values_of(x)
    if ragged_order is not None:
        values = values.index_select(0, _exchange(layout, derived, ragged_order, values.device))
    if static_order is not None:
        values = values.permute(static_order)
    return like(x, values, derived)


def _permuted(layout: Layout, element: list[Any], batch_first: bool) -> Any:
    ragged = tuple(j for j, d in enumerate(element) if d in layout.ragged_dims)
    static = [d for d in element if d not in layout.ragged_dims]
    numbers = [layout.ragged_dims.index(d) for d in element if d in layout.ragged_dims]
    sizes = tuple(layout.static_sizes[layout.static_dims.index(d)] for d in static)
    segments = layout.segments
    exchanged = numbers != sorted(numbers)
    if exchanged:
        segments = Segments(segments.sizes[:, numbers].contiguous())
    derived = Layout(segments, ragged, sizes, batch_first)
    static_order: Any = (0, *(layout.values_dim(d) for d in static))
    if static_order == tuple(range(len(static_order))):
        static_order = None
    return derived, static_order, numbers if exchanged else None


def _exchange(layout: Layout, derived: Layout, numbers: list[int], device: torch.device) -> Tensor:
    new = derived.segments
    element = new.on("element", device)
    sizes = layout.segments.on("sizes", device)
    row = torch.zeros_like(element)
    for j in range(layout.segments.k):
        at = new.on(("coord", numbers.index(j)), device)  # type: ignore[arg-type]
        row = row * sizes[:, j].index_select(0, element) + at
    return row + layout.segments.on("offsets", device).index_select(0, element)


@register("shape", "transpose", "t", "adjoint", "T", "mT", "H", "mH")
def transpose(func: Any, x: Any, dim0: Any = None, dim1: Any = None, **kwargs: Any) -> Any:
    dim0, dim1 = kwargs.get("axis0", dim0), kwargs.get("axis1", dim1)
    ndim = x._layout.rank + 1
    name = func.__self__.__name__ if names(func) == "__get__" else names(func)
    order = list(range(ndim))
    if name in ("t", "t_", "T"):
        if ndim > 2 and name != "T":
            raise RuntimeError("t() expects a tensor with <= 2 dimensions")
        order = order[::-1]
    else:
        if name in ("adjoint", "mT", "mH", "H"):
            dim0, dim1 = -2, -1
        a, b = dim0 % ndim, dim1 % ndim
        for dim in (dim0, dim1):
            x._layout.element_dim(dim)  # range check
        order[a], order[b] = order[b], order[a]
    out = permute_dims(x, order, name)
    return out.conj() if name in ("adjoint", "mH", "H") and out.is_complex() else out


@register("shape", "permute")
def permute(func: Any, x: Any, *dims: Any, **kwargs: Any) -> Any:
    return permute_dims(x, ints_of((kwargs["dims"],) if "dims" in kwargs else dims), "permute")


@register("shape", "movedim")
def movedim(func: Any, x: Any, source: Any, destination: Any) -> Any:
    ndim = x._layout.rank + 1
    src = [s % ndim for s in ([source] if isinstance(source, int) else source)]
    dst = [s % ndim for s in ([destination] if isinstance(destination, int) else destination)]
    order = [-1] * ndim
    for s, t in zip(src, dst):
        order[t] = s
    rest = iter(d for d in range(ndim) if d not in src)
    return permute_dims(x, [next(rest) if o < 0 else o for o in order], "movedim")


# Size-1 dims.
@register("shape", "squeeze")
def squeeze(func: Any, x: Any, dim: Any = None) -> Any:
    layout = x._layout
    if dim is None:
        gone = [d for d, size in zip(layout.static_dims, layout.static_sizes) if size == 1]
    else:
        gone = []
        for one in [dim] if isinstance(dim, int) else dim:
            d = layout.element_dim(one)
            if d is None or d in layout.ragged_dims:
                raise ValueError(
                    f"squeeze: dim {one} is {'the batch' if d is None else 'ragged'} and cannot be removed"
                )
            if layout.static_sizes[layout.static_dims.index(d)] == 1:
                gone.append(d)
    values = values_of(x)
    for d in sorted(gone, reverse=True):
        values = values.squeeze(layout.values_dim(d))
    for d in sorted(gone, reverse=True):
        layout = drop_dim(layout, d)
    return like(x, values, layout)


@register("shape", "unsqueeze")
def unsqueeze(func: Any, x: Any, dim: int) -> Any:
    layout = x._layout
    ndim = layout.rank + 2
    if not -ndim <= dim < ndim:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], but got {dim})")
    at = dim % ndim
    if at <= layout.batch_dim:
        raise ValueError(f"unsqueeze({dim}) would insert a dim at or before the batch dim")
    return insert_dim(x, at - 1)


def insert_dim(x: NestedTensor, d: int) -> NestedTensor:
    """A static dim of size 1 as element dim `d`."""
    layout = x._layout
    ragged = tuple(r + (r >= d) for r in layout.ragged_dims)
    before = sum(e < d for e in layout.static_dims)
    static = (*layout.static_sizes[:before], 1, *layout.static_sizes[before:])
    return like(x, values_of(x).unsqueeze(1 + before), layout.with_dims(ragged, static))


@register("shape", "expand", "expand_as", "broadcast_to")
def expand(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if names(func) == "expand_as":
        other = args[0] if args else kwargs["other"]
        if isinstance(other, NestedTensor):
            from danling.tensors.ops.broadcast import align

            layout, (mine, theirs) = align([x, other], "expand_as")
            if layout.segments != other._layout.segments or layout.rank != other._layout.rank:
                raise RuntimeError(f"expand_as: {x.shape} does not expand to the structure {other._layout}")
            return like(other, mine.expand_as(theirs))
        sizes = list(other.shape)
    else:
        sizes = ints_of((kwargs["size"],) if "size" in kwargs else args)
    layout = x._layout
    if len(sizes) != layout.rank + 1:
        raise ValueError(
            f"expand: {sizes} must name all {layout.rank + 1} dims; new dims before the batch are not possible"
        )
    target = list(layout.static_sizes)
    for dim, size in enumerate(sizes):
        d = layout.element_dim(dim)
        if d is None or d in layout.ragged_dims:
            if size not in (-1, layout.shape[dim]):
                raise RuntimeError(f"expand: dim {dim} has size {layout.shape[dim]} and cannot become {size}")
        else:
            j = layout.static_dims.index(d)
            if size != -1:
                if size != target[j] and target[j] != 1:
                    raise RuntimeError(f"expand: static dim {dim} has size {target[j]} and cannot become {size}")
                target[j] = size
    return like(x, values_of(x).expand(-1, *target), layout.with_static(tuple(target)))


@register("shape", "atleast_1d", "atleast_2d", "atleast_3d")
def atleast(func: Any, *xs: Any) -> Any:
    xs = tuple(xs[0]) if len(xs) == 1 and isinstance(xs[0], (list, tuple)) else xs
    want = int(names(func)[8])
    out = []
    for x in xs:
        if not isinstance(x, NestedTensor):
            out.append(func(x))
            continue
        rank = x._layout.rank  # every element gets the dims torch would give it
        if rank == 0:
            for _ in range(want):
                x = insert_dim(x, 0)
        elif rank == 1 and want > 1:
            x = insert_dim(x, 0)
            x = insert_dim(x, 2) if want == 3 else x
        elif rank == 2 and want == 3:
            x = insert_dim(x, 2)
        out.append(x)
    return out[0] if len(out) == 1 else tuple(out)


@register("shape", "broadcast_tensors")
def broadcast_tensors(func: Any, *xs: Any) -> Any:
    from danling.tensors.ops.broadcast import align
    from danling.tensors.ops.pointwise import rewrap

    xs = tuple(xs[0]) if len(xs) == 1 and isinstance(xs[0], (list, tuple)) else xs
    layout, values = align(list(xs), "broadcast_tensors")
    flags = next(x._flags for x in xs if isinstance(x, NestedTensor))
    full = torch.broadcast_shapes(*(v.shape for v in values), (layout.rows, *[1] * len(layout.static_sizes)))
    return tuple(rewrap(v.expand(full), layout, flags) for v in values)


@register("shape", "sum_to_size")
def sum_to_size(func: Any, x: Any, *size: Any) -> Any:
    target = ints_of(size)
    shape = list(x.shape)
    lead = len(shape) - len(target)
    if lead < 0:
        raise RuntimeError(f"size {target} is not expandable to size {shape}")
    dims = [d for d in range(len(shape)) if d < lead or (target[d - lead] == 1 and shape[d] != 1)]
    if any(target[d - lead] not in (1, shape[d]) for d in range(lead, len(shape))):
        raise RuntimeError(f"size {target} is not expandable to size {shape}")
    out = torch.sum(x, tuple(dims), True) if dims else x
    if lead:
        out = out.reshape(target) if not isinstance(out, NestedTensor) else out
    return out


__all__ = ["insert_dim", "permute_dims", "unbind_static", "view_as_target"]
