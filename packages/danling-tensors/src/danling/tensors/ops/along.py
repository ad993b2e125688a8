"""Ops that address positions along one dim: gather, scatter, index_add and their kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like, names
from danling.tensors.ops.broadcast import align
from danling.tensors.ops.indexing import put, read
from danling.tensors.ops.rows import coords, flat_position, flat_values, owner, positions
from danling.tensors.ops.table import register
from danling.tensors.packing import to_packed


def _addressed(x: NestedTensor, dim: int, index: NestedTensor, name: str) -> Tensor:
    """Flat positions in `x` that `index` names along `dim`, as torch's gather reads them."""
    layout, own = x._layout, index._layout
    d = layout.element_dim(dim)
    if d is None:
        raise ValueError(f"{name} along the batch dim would read padding; use .tensor")
    if own.batch_size != layout.batch_size or own.rank != layout.rank:
        raise ValueError(f"{name}: index of structure {own} does not fit {layout}")
    device = x._values.device
    sizes = layout.sizes
    other = [e for e in range(layout.rank) if e != d]
    wrong = (own.sizes[:, other] > sizes[:, other]).any(1) & (own.sizes.prod(1) > 0)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{name}: element {i} has index sizes {own.sizes[i].tolist()}, which exceed {sizes[i].tolist()} "
            f"apart from dim {dim}"
        )
    at = coords(own, device)
    picked = values_of(index).to(torch.int64)
    element = owner(own, device)
    limit = sizes.to(device)[:, d][element]
    beyond = (picked >= limit) | (picked < 0)
    if device.type == "cpu" and bool(beyond.any()):
        e = int(element.expand_as(picked)[beyond][0])
        raise RuntimeError(f"{name}: element {e}: an index is out of bounds for dim {dim} with size {int(sizes[e, d])}")
    at[d] = picked
    return flat_position(layout, element, at)


def _as_index(x: NestedTensor, index: Any) -> NestedTensor:
    if isinstance(index, NestedTensor):
        return index
    if index.dim() == x._layout.rank + 1 and index.shape == x.shape:
        return like(x, to_packed(index, x._layout))
    values = align([index, x], "index")[1][0]
    return like(x, values.expand(x._layout.rows, *values.shape[1:]), x._layout.with_static(tuple(values.shape[1:])))


@register("indexing", "gather", "take_along_dim")
def gather(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    if name == "gather":
        dim, index = _dim_index(*args, **kwargs)
    else:
        index, dim = _index_dim(*args, **kwargs)
        if dim is None:
            return func(flat_values(x), flat_values(index) if isinstance(index, NestedTensor) else index)
        if not isinstance(index, NestedTensor):
            index = _as_index(x, index)
        index = _stretch(x, index, dim)
    index = _as_index(x, index)
    where = _addressed(x, dim, index, name)
    out = values_of(x).reshape(-1).index_select(0, where.reshape(-1)).view(where.shape)
    return like(x, out, index._layout)


def _stretch(x: NestedTensor, index: NestedTensor, dim: int) -> NestedTensor:
    d = x._layout.element_dim(dim)
    static = list(index._layout.static_sizes)
    for j, e in enumerate(index._layout.static_dims):
        if e != d and static[j] == 1 and e in x._layout.static_dims:
            static[j] = x._layout.static_sizes[x._layout.static_dims.index(e)]
    return like(index, values_of(index).expand(-1, *static), index._layout.with_static(tuple(static)))


def _dim_index(dim: int, index: Any, *, sparse_grad: bool = False) -> tuple[int, Any]:
    return dim, index


def _index_dim(indices: Any, dim: Any = None) -> tuple[Any, Any]:
    return indices, dim


@register("indexing", "scatter", "scatter_add", "scatter_reduce")
def scatter(func: Any, x: Any, dim: int, index: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func).rstrip("_")
    src = args[0] if args else kwargs.pop("src", kwargs.pop("value", None))
    extra = args[1:]
    index = _as_index(x, index)
    where = _addressed(x, dim, index, name)
    if isinstance(src, NestedTensor):
        src = _covered(src, index, name)
    elif isinstance(src, Tensor) and src.dim():
        src = align([src, index], name)[1][0]
    elif name != "scatter" or "reduce" in kwargs:
        src = torch.as_tensor(src, dtype=x.dtype, device=where.device)
    values = values_of(x)
    flat = values.reshape(-1)
    if isinstance(src, Tensor):
        src = src.expand(where.shape).reshape(-1)
    base: Any = {"scatter": torch.scatter, "scatter_add": torch.scatter_add, "scatter_reduce": torch.scatter_reduce}[
        name
    ]
    out = base(flat, 0, where.reshape(-1), src, *extra, **kwargs).view(values.shape)
    return _deliver(func, x, out)


def _covered(src: NestedTensor, index: NestedTensor, name: str) -> Tensor:
    if src._layout == index._layout:
        return values_of(src)
    at = coords(index._layout, src._values.device)
    wrong = (index._layout.sizes > src._layout.sizes).any(1)
    if bool(wrong.any()):
        raise RuntimeError(f"{name}: element {int(wrong.nonzero()[0])} has an index larger than its source")
    where = flat_position(src._layout, owner(index._layout, src._values.device), at)
    return values_of(src).reshape(-1)[where]


def _deliver(func: Any, x: Any, out: Tensor) -> Any:
    """The result, or `x` written in place for the `name_` form."""
    if names(func).endswith("_"):
        values_of(x).copy_(out)
        return x
    return like(x, out)


@register("indexing", "index_add", "index_copy", "index_fill", "index_reduce")
def index_along(func: Any, x: Any, dim: int, index: Tensor, source: Any, *args: Any, **kwargs: Any) -> Any:
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None:
        raise ValueError(f"{names(func)} along the batch dim would read padding; assign elements instead")
    if d not in layout.ragged_dims:
        v = layout.values_dim(d)
        if isinstance(source, NestedTensor):
            source = values_of(source)
        elif isinstance(source, Tensor) and source.dim():
            source = align([source, x], names(func))[1][0]
            shape = list(x._values.shape)
            shape[v] = len(index.reshape(-1))
            source = source.expand(shape)
        out = func(values_of(x), v, index, source, *args, **kwargs)
        return x if names(func).endswith("_") else like(x, out)
    where = read(positions(x), (slice(None),) * (d + 1) + (index.reshape(-1),))
    values = values_of(x)
    name = names(func).rstrip("_")
    if isinstance(where, NestedTensor):
        given = align([source, where], name)[1][0] if isinstance(source, Tensor) and source.dim() else source
        where = values_of(where)
    else:
        given = source
    flat, at = values.reshape(-1), where.reshape(-1)
    if isinstance(given, Tensor) and name != "index_fill":
        given = given.expand(where.shape).reshape(-1)
    base: Any = {
        "index_add": torch.index_add,
        "index_copy": torch.index_copy,
        "index_fill": torch.index_fill,
        "index_reduce": torch.index_reduce,
    }[name]
    return _deliver(func, x, base(flat, 0, at, given, *args, **kwargs).view(values.shape))


@register("indexing", "index_put")
def index_put(func: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    out = x if names(func).endswith("_") else x.clone()
    index = tuple(slice(None) if i is None else i for i in indices)
    put(out, read(positions(x), index if len(index) > 1 else index[0]), values, accumulate)
    return out


@register("indexing", "select_scatter", "slice_scatter", "diagonal_scatter")
def part_scatter(func: Any, x: Any, src: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    where = positions(x)
    if name == "select_scatter":
        part = torch.select(where, *args, **kwargs)
    elif name == "slice_scatter":
        part = _slice(where, *args, **kwargs)
    else:
        part = torch.diagonal(where, *args, **kwargs)
    out = x.clone()
    put(out, part, src)
    return out


def _slice(x: NestedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    d = x._layout.element_dim(dim)
    piece = slice(start, end, step)
    return x[piece] if d is None else x[(slice(None),) * (d + 1) + (piece,)]


@register("indexing", "take", "put", path="refused")
def take(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(f"{names(func)} addresses padded positions; use .concat, gather or x[b, t]")
