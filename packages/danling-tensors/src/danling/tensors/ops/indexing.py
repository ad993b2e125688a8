"""Reading and writing by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, LengthsError, Segments, require
from danling.tensors.nested_tensor import NestedTensor, rebind, values_of, wrap
from danling.tensors.ops.base import at_element, like, names, tensor_of
from danling.tensors.ops.broadcast import align
from danling.tensors.ops.rearrange import fixed_ragged
from danling.tensors.ops.rows import coords, flat_values, owner, positions, remap_ragged, take_elements
from danling.tensors.ops.shape import drop_dim, insert_dim
from danling.tensors.ops.table import register
from danling.tensors.packing import check_index, slice_element


def read(x: NestedTensor, index: Any) -> Any:
    """`x[index]`; indices address the batch, then element dims."""
    layout = x._layout
    parts = _expand(tuple(map(_plain, index if isinstance(index, tuple) else (index,))), layout.rank)
    if not parts:
        return x
    head, rest = parts[0], parts[1:]
    if head is None:
        raise ValueError("x[None] would put a dim before the batch")
    if isinstance(head, NestedTensor) and head.dtype == torch.bool or _is_mask(head, layout):
        if rest:
            raise ValueError("a mask over the batch takes no further indices")
        return filter_rows(x, head)
    if rest and _is_list(head):
        lists = sum(map(_is_list, rest))
        if _is_list(rest[0]) or lists and type(rest[0]) is int:
            return _rows_at(x, tensor_of(head), tensor_of(rest[0]), rest[1:])
        if lists:
            raise IndexError(
                "lists of positions along the batch and along a later dim: choose the elements first, x[b][..., k]"
            )
    if type(head) is int or isinstance(head, Tensor) and head.dim() == 0 and head.dtype != torch.bool:
        element = slice_element(values_of(x), layout, check_index(int(head), layout.batch_size))
        return element[tuple(rest)] if rest else element
    x = _choose(x, head)
    return _inside(x, rest) if rest else x


def _plain(index: Any) -> Any:
    """One entry of an index as Python or torch has it; arrays and numbers of numpy included.

    Raises:
        TypeError: Nothing that indexes.
    """
    if index is None or index is Ellipsis or isinstance(index, (int, slice, NestedTensor)):
        return index
    if isinstance(index, (list, tuple, range)):
        return list(index) if all(type(i) is int for i in index) else tensor_of([_number(i) for i in index])
    if hasattr(index, "__array_interface__") and index.ndim:
        index = torch.as_tensor(index, device="cpu")
    if not isinstance(index, Tensor):
        return _number(index)
    return index.bool() if index.dtype == torch.uint8 else index  # a mask, as in torch


def _number(i: Any) -> Any:
    if isinstance(i, (bool, list, tuple, Tensor)):
        return i
    try:
        return i.__index__()
    except (AttributeError, TypeError):
        raise TypeError(
            "an index is made of ints, slices, ..., None, and lists or tensors of ints or bools, "
            f"got {type(i).__name__}"
        ) from None


def _is_list(index: Any) -> bool:
    """Whether an entry of an index is a list of positions or a dense tensor of them."""
    return (
        isinstance(index, list) or isinstance(index, Tensor) and not isinstance(index, NestedTensor) and index.dim() > 0
    )


def _expand(index: tuple[Any, ...], rank: int) -> list[Any]:
    count = sum(1 for i in index if i is not None and i is not Ellipsis)
    for i in index:  # a mask takes as many dims as it has
        if isinstance(i, Tensor) and i.dtype == torch.bool and i.dim() > 1 and not isinstance(i, NestedTensor):
            count += i.dim() - 1
    if count > rank + 1:
        raise IndexError(f"too many indices: {count} for {rank + 1} dims")
    spots = [j for j, i in enumerate(index) if i is Ellipsis]
    if len(spots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if not spots:
        return list(index)
    j = spots[0]
    return [*index[:j], *[slice(None)] * (rank + 1 - count), *index[j + 1 :]]


def _is_mask(index: Any, layout: Layout) -> bool:
    if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8) or index.dim() < 2:
        return False
    last = layout.ragged_dims[-1] if layout.ragged_dims else -1
    wanted = tuple(layout.shape[: last + 2])
    if tuple(index.shape) != wanted and tuple(index.shape) != tuple(layout.shape):
        raise IndexError(
            f"the mask has shape {tuple(index.shape)}, which is neither {wanted} nor {tuple(layout.shape)}"
        )
    return True


def _choose(x: NestedTensor, index: Any) -> NestedTensor:
    """The batch part of an index."""
    batch = x._layout.batch_size
    if isinstance(index, slice):
        if index == slice(None):
            return x
        return take_elements(x, range(*index.indices(batch)))
    if isinstance(index, NestedTensor):
        raise IndexError("a NestedTensor index along the batch must be boolean")
    items = tensor_of(index)
    if items.dim() != 1:
        raise IndexError(f"an index along the batch must be an int, a slice or 1-D, got {items.dim()} dims")
    if items.dtype == torch.bool:
        if len(items) != batch:
            raise IndexError(f"a boolean index of {len(items)} entries does not fit a batch of {batch}")
        return take_elements(x, items.nonzero()[:, 0].tolist())
    if items.is_floating_point() and items.numel():
        raise IndexError("indices must be integers or booleans")
    return take_elements(x, [check_index(int(i), batch) for i in items.tolist()])


def _inside(x: NestedTensor, rest: list[Any]) -> Any:
    """The element part of an index: applied from the last dim to the first, so that dims keep their numbers."""
    if any(isinstance(i, Tensor) and i.dtype == torch.bool and i.dim() > 1 for i in rest):
        raise IndexError("a boolean mask over element dims must cover the batch too: index with a NestedTensor mask")
    lists = [i for i in rest if isinstance(i, (list, tuple)) or isinstance(i, Tensor) and i.dim() > 0]
    if len(lists) > 1:
        return _many_lists(x, rest)
    d = sum(1 for i in rest if i is not None)
    out: Any = x
    for i in reversed(rest):
        if i is not None:
            d -= 1
        if not isinstance(out, NestedTensor):  # dense already: (B, ...) without the dims that are gone
            out = _dense_step(out, d, i)
            continue
        out = _step(out, d, i)
    return out


def _dense_step(out: Tensor, d: int, i: Any) -> Tensor:
    head = (slice(None),) * (d + 1)
    return out[(*head, i)]


def _step(x: NestedTensor, d: int, i: Any) -> Any:
    layout = x._layout
    if i is None:
        return insert_dim(x, d)
    if d in layout.ragged_dims:
        return _ragged_step(x, d, i)
    if isinstance(i, NestedTensor):
        raise IndexError("a NestedTensor index works on the ragged dim")
    v = layout.values_dim(d)
    head = (slice(None),) * v
    if isinstance(i, slice) and (i.step or 1) < 0:
        raise ValueError("step must be greater than zero")
    values = values_of(x)
    out = values[(*head, i)]
    if out.dim() < values.dim():
        return like(x, out, drop_dim(layout, d))
    if out.dim() > values.dim():
        extra = out.dim() - values.dim()
        ragged = tuple(r + extra * (r > d) for r in layout.ragged_dims)
        return like(x, out, layout.with_dims(ragged, tuple(out.shape[1:])))
    return like(x, out, layout.with_static(tuple(out.shape[1:])))


def _ragged_step(x: NestedTensor, d: int, i: Any) -> Any:
    layout = x._layout
    j = layout.ragged_dims.index(d)
    if isinstance(i, slice) and i == slice(None):
        return x
    if layout.segments.symbolic and isinstance(i, (int, list, tuple)) and not isinstance(i, bool):
        return traced_positions(x, d, i)
    column = layout.segments.sizes[:, j]
    if isinstance(i, slice):
        step = 1 if i.step is None else int(i.step)
        if step <= 0:
            raise ValueError("step must be greater than zero")
        start = _bound(i.start, column, 0)
        stop = _bound(i.stop, column, None)
        counts = ((stop - start + step - 1) // step).clamp_min(0)
        begin = start.to(x._values.device)
        return _from_start(x, j, counts, begin, step)
    if isinstance(i, NestedTensor):
        return _own_positions(x, d, i)
    if isinstance(i, int) and not isinstance(i, bool) or isinstance(i, Tensor) and i.dim() == 0:
        if layout.segments.k == 1:
            return _one_position(x, int(i))
        out = _ragged_step(x, d, [int(i)])
        return out.squeeze(d + 1) if not isinstance(out, NestedTensor) else out.squeeze(out._layout.shape_dim(d))
    picks = tensor_of(i)
    if picks.dtype == torch.bool:
        if picks.dim() != 1 or len(picks) != int(layout.max_sizes[j]):
            raise IndexError(f"a boolean index along a ragged dim needs {layout.max_sizes[j]} entries")
        raise IndexError("a boolean index along a ragged dim must be a NestedTensor, or cover the batch too")
    flat = picks.reshape(-1)
    if flat.is_floating_point() and flat.numel():
        raise IndexError("indices must be integers or booleans")
    host = flat.to(torch.int64).cpu()
    for value in host.tolist():
        short = (column <= value) | (column < -value)
        if bool(short.any()):
            e = int(short.nonzero()[0])
            raise IndexError(f"index {value} is out of range for element {e} of size {int(column[e])}")
    table = host.to(x._values.device)
    count = len(host)

    def source(c: Tensor, size: Tensor) -> Tensor:
        at = table[c]
        return torch.where(at < 0, at + size, at)

    out = fixed_ragged(remap_ragged(x, j, torch.full_like(column, count), source), j, count)
    if picks.dim() == 1:
        return out
    if isinstance(out, NestedTensor):
        return out.unflatten(out._layout.shape_dim(d), picks.shape)
    return out.unflatten(d + 1, picks.shape)


def _one_position(x: NestedTensor, i: int) -> Tensor:
    """Row `i` of every element along the only ragged dim, dense `(B, *static)`."""
    segments, values = x._layout.segments, values_of(x)
    column = segments.sizes[:, 0]
    if segments.batch_size and int(column.min()) < (i + 1 if i >= 0 else -i):
        e = int(((column <= i) | (column < -i)).nonzero()[0])
        raise IndexError(f"index {i} is out of range for element {e} of size {int(column[e])}")
    offsets = segments.on("offsets", values.device)
    return values.index_select(0, offsets[:-1] + i if i >= 0 else offsets[1:] + i)


def traced_positions(x: NestedTensor, d: int, i: Any) -> Tensor:
    """`x[:, i]` in a graph: whether every element has the positions shows when it runs."""
    layout, values = x._layout, values_of(x)
    segments, picks = layout.segments, [i] if isinstance(i, int) else list(i)
    if segments.k != 1 or not all(isinstance(p, int) for p in picks):
        raise LengthsError
    start, size = segments.on("offsets", values.device)[:-1], segments.on("lengths", values.device)
    at = torch.stack([size + p if p < 0 else torch.full_like(size, p) for p in picks], 1)
    require(((at >= 0) & (at < size[:, None])).all(), f"index {i} is out of range for an element")
    out = values.index_select(0, (start[:, None] + at).flatten()).unflatten(0, (segments.batch_size, len(picks)))
    return out.squeeze(1) if isinstance(i, int) else out.movedim(1, d + 1)


def _bound(value: Any, column: Tensor, default: int | None) -> Tensor:
    """A slice bound of every element, clamped as Python does."""
    if value is None:
        return torch.zeros_like(column) if default == 0 else column
    value = int(value)
    at = column + value if value < 0 else torch.full_like(column, value)
    return torch.minimum(at.clamp_min(0), column)


def _from_start(x: NestedTensor, j: int, counts: Tensor, begin: Tensor, step: int) -> NestedTensor:
    segments = x._layout.segments
    sizes = segments.sizes.clone()
    sizes[:, j] = counts
    starts: list[Tensor] = []

    def source(c: Tensor, size: Tensor) -> Tensor:
        if not starts:
            starts.append(begin.index_select(0, Segments(sizes).on("element", begin.device)))
        return starts[0] + c * step

    return remap_ragged(x, j, counts, source)


def _own_positions(x: NestedTensor, d: int, index: NestedTensor) -> NestedTensor:
    """Each element's own positions along a ragged dim."""
    layout = x._layout
    if len(layout.ragged_dims) != 1 or index._layout.rank != 1 or index.dtype == torch.bool:
        raise IndexError(
            "a NestedTensor index needs integer elements of rank 1 and exactly one ragged dim in the tensor"
        )
    if index._layout.batch_size != layout.batch_size:
        raise IndexError(f"index has batch size {index._layout.batch_size}, the tensor {layout.batch_size}")
    device = x._values.device
    mine = index._layout.segments
    element = mine.on("element", device)
    at = values_of(index).to(torch.int64)
    size = layout.segments.on("lengths", device)[element]
    at = torch.where(at < 0, at + size, at)
    wrong = (at < 0) | (at >= size)
    if bool(wrong.any()):
        e = int(element[wrong][0])
        raise IndexError(
            f"element {e} of size {layout.segments.lengths[e]} does not have every position its index names"
        )
    rows = layout.segments.on("offsets", device)[element] + at
    segments = mine if mine.k == 1 else Segments(index._layout.sizes)
    return like(x, values_of(x).index_select(0, rows), layout.replace(segments=segments))


def _rows_at(x: NestedTensor, b: Tensor, t: Tensor, rest: list[Any]) -> Tensor:
    """`x[b, t]` with two dense index tensors: dense rows."""
    layout = x._layout
    if layout.ragged_dims not in ((0,), ()):
        raise IndexError("x[b, t] with lists or tensors needs element dim 0 to be the only ragged dim")
    if t.dtype == torch.bool:
        raise IndexError("a boolean index along a ragged dim must be a NestedTensor, or cover the batch too")
    if b.dtype == torch.bool:
        if tuple(b.shape) != (layout.batch_size,):
            raise IndexError(f"a boolean index of {len(b)} entries does not fit a batch of {layout.batch_size}")
        b = b.nonzero()[:, 0]
    try:
        b, t = torch.broadcast_tensors(b, t)
    except RuntimeError:
        raise IndexError(
            f"x[b, t] pairs positions of both, which shapes {tuple(b.shape)} and {tuple(t.shape)} do not"
        ) from None
    segments, device = layout.segments, x._values.device
    b, t = b.to(device, torch.int64), t.to(device, torch.int64)
    if layout.dense:
        return values_of(x)[(b, t, *rest)]
    out_of_batch = (b < -layout.batch_size) | (b >= layout.batch_size)
    if bool(out_of_batch.any()):
        raise IndexError(f"element index {int(b[out_of_batch][0])} is out of range for a batch of {layout.batch_size}")
    b = torch.where(b < 0, b + layout.batch_size, b)
    size = segments.on("lengths", device)[b]
    wrong = (t >= size) | (t < -size)
    if bool(wrong.any()):
        e = int(b[wrong].reshape(-1)[0])
        raise IndexError(f"position {int(t[wrong].reshape(-1)[0])} is beyond element {e} of size {segments.lengths[e]}")
    rows = segments.on("offsets", device)[b] + torch.where(t < 0, t + size, t)
    return values_of(x)[(rows, *rest)]


def _many_lists(x: NestedTensor, rest: list[Any]) -> Any:
    from danling.tensors.ops.fallback import collect
    from danling.tensors.ops.table import fallback

    layout = x._layout
    if layout.ragged_dims and all(
        i == slice(None) for d, i in enumerate(rest) if d in layout.ragged_dims and None not in rest
    ):
        if None not in rest and layout.ragged_dims == tuple(range(layout.segments.k)):
            out = values_of(x)[(slice(None), *rest[layout.segments.k :])]
            return like(x, out, layout.with_static(tuple(out.shape[1:])))
    fallback("index", "per element")
    parts = []
    for i, element in enumerate(x.unbind()):
        with at_element(i):
            parts.append(element[tuple(rest)])
    return collect(parts, x)


def _mask_values(x: NestedTensor, mask: Any) -> Tensor:
    """A bool mask at every value of `x`."""
    layout = x._layout
    if isinstance(mask, NestedTensor):
        if mask._layout.rank < layout.rank:  # a mask over leading dims, such as (L,) for (L, D)
            for _ in range(layout.rank - mask._layout.rank):
                mask = insert_dim(mask, mask._layout.rank)
        common, (own, _) = align([mask, x], "mask")
        if common.segments != layout.segments or common.ragged_dims != layout.ragged_dims:
            raise IndexError(f"the mask's structure {mask._layout} does not fit {layout}")
        return own.to(torch.bool)
    if tuple(mask.shape) != tuple(layout.shape):
        for _ in range(layout.rank + 1 - mask.dim()):
            mask = mask[..., None]
    return align([mask, x], "mask")[1][0].to(torch.bool)


def filter_rows(x: NestedTensor, mask: Any) -> NestedTensor:
    """`x[mask]`: each element filtered on its own.

    A mask over the leading dims up to the last ragged one keeps rows; one over all dims keeps single values, and the
    elements become 1-D.
    """
    layout = x._layout
    keep = _mask_values(x, mask)
    segments = layout.segments
    rank = mask._layout.rank if isinstance(mask, NestedTensor) else mask.dim() - 1
    by_rows = layout.ragged_dims == tuple(range(segments.k)) and rank <= segments.k and layout.rank > 0
    if by_rows and rank == segments.k:
        rows = keep.reshape(layout.rows)
        index = rows.nonzero()[:, 0]
        counts = _counts(segments.on("element", rows.device)[index], layout.batch_size)
        new = Segments(counts.view(-1, 1))
        out = values_of(x).index_select(0, index)
        return like(x, out, Layout(new, (0,), layout.static_sizes, layout.batch_first))
    full = wrap(keep.expand(layout.rows, *layout.static_sizes), layout, x._flags)
    flat, chosen = flat_values(x), flat_values(full)
    index = chosen.nonzero()[:, 0]
    element = flat_values(wrap(owner(layout, flat.device).expand(layout.rows, *layout.static_sizes), layout, x._flags))
    counts = _counts(element[index], layout.batch_size)
    return like(x, flat.index_select(0, index), Layout(Segments(counts.view(-1, 1)), (0,), (), layout.batch_first))


def _counts(element: Tensor, batch: int) -> Tensor:
    return torch.bincount(element, minlength=batch).cpu()


# Writing.
def write(x: NestedTensor, index: Any, value: Any) -> None:
    """`x[index] = value`; everything is checked before anything is written."""
    layout = x._layout
    if x.is_leaf and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a leaf NestedTensor that requires grad is being used in an in-place operation.")
    index = index if isinstance(index, tuple) else _plain(index)
    if index is Ellipsis:
        index = slice(None)
    if type(index) is int:
        write_elements(x, [check_index(index, layout.batch_size)], [value])
        return
    if isinstance(index, slice):
        chosen = list(range(*index.indices(layout.batch_size)))
        if isinstance(value, (NestedTensor, list, tuple)):
            parts = list(value)
            if len(parts) != len(chosen):
                raise ValueError(f"{len(parts)} elements cannot be assigned to {len(chosen)}")
            write_elements(x, chosen, parts)
            return
    put(x, read(positions(x), index), value)


def write_elements(x: NestedTensor, chosen: Sequence[int], parts: Sequence[Any]) -> None:
    """Replace elements; other sizes along ragged dims give `x` new values and a new layout."""
    layout = x._layout
    kind, device = x.dtype, x._values.device
    new: dict[int, Tensor] = {}
    resized = False
    for i, part in zip(chosen, parts):
        shape = layout.element_shape(i)
        if not isinstance(part, Tensor):
            part = torch.as_tensor(part, dtype=kind, device=device)
        if part.dim() == 0 and layout.rank:
            part = part.expand(shape)
        if part.dim() != layout.rank:
            raise ValueError(f"element {i} has {layout.rank} dims, the value {part.dim()}")
        for d, (old, size) in enumerate(zip(shape, part.shape)):
            if old != size:
                if d not in layout.ragged_dims:
                    raise ValueError(f"element {i}: static dim {d} has size {old}, the value {size}")
                resized = True
        if part.device != device:
            raise ValueError(f"element {i} is on {device}, the value on {part.device}")
        new[i] = part
    if not resized:
        for i, part in new.items():
            slice_element(values_of(x), layout, i).copy_(part)
        return
    elements = [new[i].to(kind) if i in new else e for i, e in enumerate(x.unbind())]
    shapes = [e.shape for e in elements]
    from danling.tensors.packing import pack_elements

    target = Layout.from_shapes(shapes, layout.ragged_dims, layout.rank, layout.static_sizes, layout.batch_first)
    leaf = x.requires_grad and x.is_leaf  # written without gradients: a leaf it stays
    rebind(x, pack_elements(elements, target), target)
    if leaf:
        x.requires_grad_()


def put(x: NestedTensor, where: Any, value: Any, accumulate: bool = False) -> None:
    """Write `value` at flat positions `where` (a NestedTensor or a dense tensor)."""
    if isinstance(where, NestedTensor):
        if type(value) is Tensor and value.dim() == 1 == where._layout.rank and len(value) == where._layout.rows:
            at, given = values_of(where), value  # one value for each, as torch takes them for a mask
        elif isinstance(value, Tensor):
            layout, (at, given) = align([where, value], "assignment")
            if layout.segments != where._layout.segments or layout.rank != where._layout.rank:
                raise ValueError(f"a value of structure {layout} cannot be assigned to {where._layout}")
        else:
            at, given = values_of(where), tensor_of(value)
    else:
        if isinstance(value, NestedTensor):
            raise ValueError("a NestedTensor cannot be assigned to a dense selection")
        at, given = where, tensor_of(value)
    values = values_of(x)
    given = given.to(values.device, values.dtype)
    given = given.broadcast_to(at.shape) if given.dim() <= at.dim() else given.reshape(at.shape)
    if not values.is_contiguous():
        values = values.contiguous()
        rebind(x, values)
    values.view(-1).index_put_((at.reshape(-1),), given.reshape(-1), accumulate)


@register("indexing", "__getitem__", "__setitem__", "select")
def getitem(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    if name == "select":
        dim: Any = kwargs.get("dim", args[0] if args else None)
        i: Any = kwargs.get("index", args[-1] if args else None)
        return _select(x, dim, i)
    if isinstance(x, NestedTensor):
        return read(x, args[0]) if name == "__getitem__" else write(x, *args)
    if name == "__getitem__":
        raise IndexError("a dense tensor cannot be indexed with a NestedTensor; use .concat or .tensor of the index")
    raise ValueError("a dense tensor cannot be written with a NestedTensor; use its .tensor")


def _select(x: NestedTensor, dim: int, i: int) -> Any:
    d = x._layout.element_dim(dim)
    return x[i] if d is None else x[(slice(None),) * (d + 1) + (i,)]


@register("indexing", "index_select")
def index_select(func: Any, x: Any, dim: int, index: Tensor) -> Any:
    d = x._layout.element_dim(dim)
    if isinstance(index, NestedTensor):
        return x[(slice(None),) * (d + 1) + (index,)] if d is not None else x[index]
    index = index.reshape(-1)
    return x[index] if d is None else x[(slice(None),) * (d + 1) + (index,)]


@register("indexing", "masked_select")
def masked_select(func: Any, x: Any, mask: Any) -> Tensor:
    first = x if isinstance(x, NestedTensor) else mask
    layout, (v, m) = align([x, mask], "masked_select")
    full = torch.broadcast_shapes(v.shape, m.shape, (layout.rows, *[1] * len(layout.static_sizes)))
    layout = layout.with_static(tuple(full[1:]))
    flat = flat_values(wrap(v.expand(full), layout, first._flags))
    return flat[flat_values(wrap(m.expand(full), layout, first._flags))]


@register("indexing", "masked_scatter")
def masked_scatter(func: Any, x: Any, mask: Any, source: Tensor) -> Any:
    layout = x._layout
    keep = _mask_values(x, mask).expand(layout.rows, *layout.static_sizes)
    source = flat_values(source) if isinstance(source, NestedTensor) else source.reshape(-1)
    flat_keep = flat_values(wrap(keep, layout, x._flags))
    where = flat_values(positions(x))[flat_keep]
    if source.numel() < where.numel():
        raise RuntimeError(f"masked_scatter: {where.numel()} positions but {source.numel()} source values")
    out = x if names(func).endswith("_") else x.clone()
    put(out, where, source[: where.numel()])
    return out


@register("indexing", "nonzero", "argwhere", "nonzero_static")
def nonzero(func: Any, x: Any, *, as_tuple: bool = False, **kwargs: Any) -> Any:
    layout, values = x._layout, x._values
    at = coords(layout, values.device)
    element = owner(layout, values.device)
    shape = (layout.rows, *layout.static_sizes)
    count = len(layout.ragged_dims)
    if layout.ragged_dims == tuple(range(count)):  # rows lie in the order that is asked for
        if "size" in kwargs and layout.rows:
            found = torch.nonzero_static(values, size=kwargs["size"], fill_value=-1)
            row, inner = found[:, 0].clamp_min(0), list(found.unbind(1)[1:])
        else:
            row, *inner = values.nonzero(as_tuple=True)
            found = row[:, None]
        columns = [c.flatten()[row] for c in (element, *at[:count])] + inner
        fill = kwargs.get("fill_value", -1)
        columns = [torch.where(found[:, 0] < 0, fill, c) for c in columns] if "size" in kwargs else columns
    else:
        hit = flat_values(wrap(values != 0, layout, x._flags))
        columns = [flat_values(wrap(c.expand(shape), layout, x._flags))[hit] for c in (element, *at)]
    if not layout.batch_first and layout.rank:
        columns[0], columns[1] = columns[1], columns[0]
    out = torch.stack(columns, 1)
    if "size" in kwargs:
        size, fill = kwargs["size"], kwargs.get("fill_value", -1)
        short = size - out.shape[0]
        out = out[:size] if short <= 0 else torch.cat([out, out.new_full((short, out.shape[1]), fill)])
    return out.unbind(1) if as_tuple else out


__all__ = ["filter_rows", "put", "read", "write"]
