"""Sorting and order statistics of each element, along any dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import require
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import batch_error, like, names
from danling.tensors.ops.extrema import positions_in_groups
from danling.tensors.ops.groups import Groups, group_rows
from danling.tensors.ops.reductions import Plan
from danling.tensors.ops.rows import flat_values
from danling.tensors.ops.table import register


def sort_groups(groups: Groups, rows: Tensor, descending: bool = False) -> Tensor:
    """For rows in group order, the row that comes at each place when every group is sorted on its own (stable).

    Two stable sorts: by value, then by group; no group sees values of another one. They take several times the memory of what
    they sort, so large batches go a few columns at a time.
    """
    group = groups.on("group", rows.device)
    return _by_columns(groups, rows, lambda columns: _sort_columns(group, columns, descending))


_MANY = 4096
"""Values from which memory counts more than calls."""


def _by_columns(groups: Groups, rows: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """`call` of rows, which gives int64 and treats every column on its own, a few columns at a time."""
    rows = rows.detach()
    if groups.owner.symbolic or rows.dim() == 1 or rows.numel() < _MANY:
        return call(rows)
    columns, out = rows.flatten(1), None
    step = -(-columns.shape[1] // 8)
    for at in range(0, columns.shape[1], step):
        part = call(columns[:, at : at + step])
        if out is None:
            out = part.new_empty((part.shape[0], columns.shape[1]))
        out[:, at : at + step] = part
        del part  # before the next one is made
    assert out is not None
    return out.view(-1, *rows.shape[1:])


def _sort_columns(group: Tensor, rows: Tensor, descending: bool) -> Tensor:
    by_value = rows.sort(dim=0, descending=descending, stable=True)[1]
    keys = group.to(torch.int32).view(-1, *[1] * (rows.dim() - 1)).expand_as(by_value).gather(0, by_value)
    if type(rows) is Tensor and rows.shape[0] < 2**31:
        by_value = by_value.to(torch.int32)  # half as large while the second sort runs
    by_group = keys.sort(dim=0, stable=True)[1]
    return by_value.gather(0, by_group).long()


def _along(func: Any, x: Any, dim: int) -> tuple[Groups | None, int]:
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None:
        raise batch_error(func, dim)
    if d in layout.ragged_dims:
        return group_rows(layout, False, (layout.ragged_dims.index(d),)), 0
    return None, layout.values_dim(d)


def _sorted(x: NestedTensor, groups: Groups, descending: bool) -> tuple[NestedTensor, NestedTensor]:
    rows = groups.sort(values_of(x))
    order = sort_groups(groups, rows, descending)
    start = groups.on("offsets", rows.device)[:-1].index_select(0, groups.on("group", rows.device))
    start = start.view(-1, *[1] * (rows.dim() - 1))
    best = rows.gather(0, order)
    inside = order - start if best.requires_grad else order.sub_(start)  # backward needs the order as it is
    return like(x, groups.unsort(best)), like(x, groups.unsort(inside))


@register("order", "sort", "argsort", "msort")
def sort(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    dim, descending = _sort_arguments(*args, **kwargs)
    if name == "msort":
        dim = x._layout.shape_dim(0)
    groups, at = _along(func, x, dim)
    if groups is None:
        out = torch.sort(values_of(x), dim=at, descending=descending, stable=True)
        best, index = like(x, out[0]), like(x, out[1])
    else:
        best, index = _sorted(x, groups, descending)
    if name == "msort":
        return best
    return index if name == "argsort" else torch.return_types.sort([best, index])  # type: ignore[arg-type]


def _sort_arguments(*args: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple[int, bool]:
    if args and isinstance(args[0], bool):  # the overload that starts with `stable`
        args = args[1:]
    dim = args[0] if args else dim
    return dim, args[1] if len(args) > 1 else descending


@register("order", "topk")
def topk(func: Any, x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    groups, at = _along(func, x, dim)
    kind: Any = torch.return_types.topk
    if groups is None:
        out = func(values_of(x), k, at, largest, sorted)
        layout = x._layout.with_static(tuple(out[0].shape[1:]))
        return kind([like(x, o, layout) for o in out])
    _long_enough(groups, k, f"{names(func)}: selected index k={k} out of range")
    return kind([torch.narrow(part, dim, 0, k) for part in _sorted(x, groups, largest)])


def _long_enough(groups: Groups, k: int, what: str) -> None:
    counts = groups.offsets.diff()
    if groups.owner.symbolic:
        require((counts >= k).all(), f"{what} for an element")
        return
    short = (counts < k) | torch.tensor(k < 0, device="cpu")
    if bool(short.any()):
        i = int(short.nonzero()[0])
        raise RuntimeError(f"element {i}: {what} for size {int(counts[i])}")


@register("order", "kthvalue")
def kthvalue(func: Any, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    groups, _ = _along(func, x, dim)
    kind: Any = torch.return_types.kthvalue
    plan = Plan(func, x, dim, keepdim)
    if groups is None:
        return kind([plan.finish(o) for o in func(values_of(x), k, plan.static[0])])
    _long_enough(groups, max(k, 1), f"kthvalue: selected number k={k} out of range")
    if k < 1:
        raise RuntimeError(f"kthvalue: selected number k={k} out of range")
    at = torch.full((groups.count,), k - 1, device=x._values.device)
    return kind([plan.finish(o) for o in _pick(plan, groups.sort(values_of(x)), at)])


def _pick(plan: Plan, rows: Tensor, at: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `at`-th smallest value `(G, *static)` of every group, and its position along the reduced dim."""
    groups = plan.groups
    assert groups is not None
    order = sort_groups(groups, rows) if order is None else order
    start = groups.on("offsets", rows.device)[:-1].view(-1, *[1] * (rows.dim() - 1))
    at = at.view(-1, *[1] * (rows.dim() - 1)) if at.dim() == 1 else at
    where = order.gather(0, (start + at).expand(groups.count, *rows.shape[1:]))
    return rows.gather(0, where), positions_in_groups(plan, where - start)


@register("order", "median", "nanmedian")
def median(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    name = names(func)
    values = values_of(x)
    if dim is None:
        return func(values)
    kind: Any = getattr(torch.return_types, name)
    plan = Plan(func, x, dim, keepdim)
    if plan.groups is None:
        return kind([plan.finish(o) for o in func(values, 0 if plan.all_rows else plan.static[0])])
    plan.need_values()
    rows = plan.groups.sort(values)
    counts = plan.counts.view(-1, *[1] * (rows.dim() - 1))
    holes = _holes(plan, rows)
    if name == "median":
        at = torch.where(holes > 0, counts - holes, (counts - 1) // 2)
    else:
        at = ((counts - holes - 1) // 2).clamp_min(0)
    return kind([plan.finish(o) for o in _pick(plan, rows, at)])


def _holes(plan: Plan, rows: Tensor) -> Tensor:
    """NaNs of every group, `(G, *static)`."""
    from danling.tensors import kernels

    assert plan.groups is not None
    if not rows.is_floating_point():
        return rows.new_zeros((plan.groups.count, *rows.shape[1:]), dtype=torch.int64)
    return kernels.segment_sum(rows.isnan(), plan.groups.on("offsets", rows.device))


@register("order", "mode")
def mode(func: Any, x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    groups, _ = _along(func, x, dim)
    kind: Any = torch.return_types.mode
    plan = Plan(func, x, dim, keepdim)
    values = values_of(x)
    if groups is None:
        return kind([plan.finish(o) for o in func(values, plan.static[0])])
    plan.need_values()
    rows = groups.sort(values)
    where = _by_columns(groups, rows, lambda columns: _most_frequent(groups, columns))
    start = groups.on("offsets", rows.device)[:-1].view(-1, *[1] * (rows.dim() - 1))
    return kind([plan.finish(rows.gather(0, where)), plan.finish(where - start)])


def _most_frequent(groups: Groups, rows: Tensor) -> Tensor:
    """The row that holds the most frequent value of each group, the last of them, `(G, *static)`."""
    from danling.tensors import kernels

    device, tail = rows.device, [1] * (rows.dim() - 1)
    group, offsets = groups.on("group", device), groups.on("offsets", device)
    order = _sort_columns(group, rows, False)
    best = rows.gather(0, order)
    index = torch.arange(rows.shape[0], device=device).view(-1, *tail).expand_as(rows)
    group = group.view(-1, *tail)
    fresh = torch.ones_like(best, dtype=torch.bool)
    if rows.shape[0] > 1:
        fresh[1:] = (best[1:] != best[:-1]) | (group[1:] != group[:-1])
    begin = torch.where(fresh, index, 0).cummax(0)[0]
    run = index - begin + 1  # how often this value was seen up to here
    _, at = kernels.segment_max(run, offsets)  # the first longest run ends here
    return order.gather(0, offsets[:-1].view(-1, *tail) + at)


@register("order", "quantile", "nanquantile")
def quantile(
    func: Any, x: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    if dim is None:
        return func(flat_values(x), q, interpolation=interpolation)
    groups, _ = _along(func, x, dim)
    values = values_of(x)
    levels = torch.as_tensor(q, dtype=values.dtype, device=values.device)
    if bool(((levels < 0) | (levels > 1)).any()):
        raise RuntimeError("quantile() q values must be in the range [0, 1]")
    if levels.dim() == 1:  # one after another, then side by side as the first element dim
        parts = [func(x, level, dim, keepdim, interpolation=interpolation) for level in levels]
        if not isinstance(parts[0], NestedTensor):
            return torch.stack(parts, 1)
        from danling.tensors.ops.shape import insert_dim

        return torch.cat([insert_dim(p, 0) for p in parts], parts[0]._layout.shape_dim(0))
    plan = Plan(func, x, dim, keepdim)
    if groups is None:
        return plan.finish(func(values, levels, plan.static[0], interpolation=interpolation))
    plan.need_values()
    rows = groups.sort(values)
    order = sort_groups(groups, rows)
    counts = plan.counts.view(-1, *[1] * (rows.dim() - 1))
    holes = _holes(plan, rows)
    ignore = names(func) == "nanquantile"
    usable = (counts - holes) if ignore else counts.expand_as(holes)
    place = levels * (usable - 1).clamp_min(0).to(rows.dtype)
    if interpolation == "lower":
        place = place.floor()
    elif interpolation == "higher":
        place = place.ceil()
    elif interpolation == "nearest":
        place = place.round()
    elif interpolation not in ("linear", "midpoint"):
        raise RuntimeError(
            f"quantile() interpolation must be one of linear, lower, higher, midpoint or nearest: {interpolation}"
        )
    low = place.floor()
    weight = place - low
    if interpolation == "midpoint":
        weight = torch.where(weight > 0, 0.5, 0.0).to(rows.dtype)
    below = _pick(plan, rows, low.long(), order)[0]
    above = _pick(plan, rows, place.ceil().long(), order)[0]
    out = torch.lerp(below, above, weight)
    if not ignore:
        out = torch.where(holes > 0, float("nan"), out)
    return plan.finish(out)


@register("whole", "unique")
def unique(
    func: Any,
    x: Any,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    if dim is not None:
        raise ValueError("unique(dim=...) of a NestedTensor: use it on .concat, or on each element")
    values = values_of(x)
    out = torch.unique(values, sorted, return_inverse, return_counts)
    if not return_inverse:
        return out
    return out[0], like(x, out[1]), *out[2:]


@register("whole", "histc", "histogram")
def histogram(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(kwargs.get("weight"), NestedTensor):
        if kwargs["weight"]._layout != x._layout:
            raise ValueError("histogram: weight must have the structure of the input")
        kwargs["weight"] = flat_values(kwargs["weight"])
    return func(flat_values(x), *args, **kwargs)
