"""Reductions over any dims: static ones on the values, ragged ones and the batch by segment kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import at_element, like, names
from danling.tensors.ops.groups import Groups, group_rows
from danling.tensors.ops.table import register


class Plan:
    """What a reduction with the given dims does to a layout.

    Attributes:
        whole: Everything is reduced, to a 0-d tensor.
        batch: The batch is reduced.
        reduced: Element dims that are; `ragged` the ragged ones among them, by number.
        static: Dims of `values` that are reduced, ascending.
        all_rows: The batch and every ragged dim are reduced, i.e. dim 0 of `values`.
        groups: How rows come together; `None` when only static dims are reduced.
    """

    whole: bool
    batch: bool
    reduced: set[int]
    ragged: tuple[int, ...]
    static: tuple[int, ...]
    all_rows: bool
    groups: Groups | None

    def __init__(self, func: Any, x: NestedTensor, dim: Any, keepdim: bool) -> None:
        layout = x._layout
        self.func, self.x, self.layout, self.keepdim, self.dim = func, x, layout, keepdim, dim
        dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
        # The same for every call with these dims, and not for nothing.
        parts = layout.derive(("reduced", dims), lambda: _reduced(func, layout, dims))
        self.whole, self.batch, self.reduced, self.ragged, self.static, self.all_rows, self.groups = parts

    @property
    def counts(self) -> Tensor:
        """Rows of each group, on the values' device."""
        assert self.groups is not None
        return self.groups.on("lengths", self.x._values.device)

    @property
    def per_row(self) -> int:
        """Values of one row that are reduced together."""
        return math.prod(self.layout.static_sizes[d - 1] for d in self.static)

    def finish(self, out: Tensor) -> Any:
        """Give a reduced tensor its place.

        `out` is `(G, *kept static)` with groups, `(*kept static)` when all rows are reduced, `(R, *kept static)` when
        only static dims are.
        """
        layout, keepdim = self.layout, self.keepdim
        groups = self.groups
        if groups is not None and groups.segments is None and not self.batch and not keepdim:
            return out  # (B, *kept static) as it is
        extra = out.dim() - (0 if self.all_rows else 1) - (len(layout.static_sizes) - len(self.static))
        static = [size for j, size in enumerate(layout.static_sizes) if 1 + j not in self.static]
        kept = [d for d in layout.static_dims if d not in self.reduced]
        assert extra == 0
        if self.groups is None and not self.all_rows:  # static dims only
            ragged = layout.ragged_dims
            if keepdim:
                for d in self.static:
                    out = out.unsqueeze(d)
                return like(self.x, out, layout.with_static(tuple(out.shape[1:])))
            new = tuple(d - sum(r < d for r in self.reduced) for d in ragged)
            return like(self.x, out, layout.with_dims(new, tuple(static)))
        ragged_kept = [d for d in layout.ragged_dims if d not in self.reduced]
        if self.groups is not None and self.groups.segments is not None:  # ragged dims remain
            segments = self.groups.segments
            if keepdim:
                sizes = [1 if d in self.reduced else 0 for d in range(layout.rank)]
                for d, size in zip(kept, static):
                    sizes[d] = size
                others = [d for d in range(layout.rank) if d not in ragged_kept]
                full = tuple(sizes[d] for d in others)
                derived = layout.derive(
                    ("keep", self.groups.key, full),
                    lambda: Layout(segments, tuple(ragged_kept), full, layout.batch_first),
                )
                return like(self.x, out.reshape(out.shape[0], *full), derived)
            new = tuple(d - sum(r < d for r in self.reduced) for d in ragged_kept)
            derived = layout.derive(
                ("drop", self.groups.key, new, tuple(static)),
                lambda: Layout(segments, new, tuple(static), layout.batch_first),
            )
            return like(self.x, out, derived)
        # Dense results: batch (unless reduced) and what is left of the element.
        lead = () if self.all_rows else self.groups.sizes  # type: ignore[union-attr]
        out = out.reshape([*lead, *static])
        labels: list[Any] = ([] if self.batch else [None]) + (ragged_kept if self.batch else []) + kept
        target = ([] if self.batch else [None]) + sorted(d for d in labels if d is not None)
        if labels != target:
            out = out.permute([labels.index(d) for d in target])
        if keepdim:
            for d in range(layout.rank):
                if d in self.reduced:
                    out = out.unsqueeze(d + (0 if self.batch else 1))
            if self.batch:
                out = out.unsqueeze(layout.batch_dim)
            elif layout.batch_dim:
                out = out.transpose(0, 1)
        return out

    def need_values(self) -> None:
        """Let torch raise what it raises for a group without values.

        Raises:
            Exception: torch's own, naming the element.
        """
        if self.groups is None:
            if self.all_rows and self.layout.rows == 0:
                raise IndexError(f"{names(self.func)}: cannot reduce an empty batch, which has no identity")
            return
        i = self.groups.first_empty
        if i is not None:
            if self.batch:
                place = tuple(map(int, torch.unravel_index(torch.tensor(i, device="cpu"), self.groups.sizes)))
                raise IndexError(f"{names(self.func)}: no element has position {place}, and there is no identity")
            with at_element(i):
                self.func(self.x._values[:0], 0)  # torch's own error
            raise IndexError(f"{names(self.func)}: element {i} is empty along dim {self.dim}, and there is no identity")

    def expand(self, per_group: Tensor) -> Tensor:
        """One value per group back to the (sorted) rows, static dims kept at size 1."""
        if self.groups is None:
            return per_group
        offsets = self.groups.on("offsets", per_group.device)
        return kernels.segment_expand(per_group, offsets, self.layout.rows)


def _reduced(func: Any, layout: Layout, dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `Plan` tells of dims."""
    element = [layout.element_dim(d) for d in dims]
    if len(set(element)) != len(element):
        raise RuntimeError(f"{names(func)}: a dim appears twice in {dims}")
    whole = not dims
    batch = None in element or whole
    reduced = set(range(layout.rank)) if whole else {d for d in element if d is not None}
    ragged = tuple(j for j, d in enumerate(layout.ragged_dims) if d in reduced)
    static = tuple(1 + j for j, d in enumerate(layout.static_dims) if d in reduced)
    all_rows = batch and len(ragged) == layout.segments.k
    groups = group_rows(layout, batch, ragged) if (batch or ragged) and not all_rows else None
    return whole, batch, reduced, ragged, static, all_rows, groups


def run(
    func: Any,
    x: Any,
    dim: Any,
    keepdim: bool,
    segment: Callable[[Plan, Tensor], Any],
    *,
    plan: Plan | None = None,
    **settings: Any,
) -> Any:
    """Reduce by `func` on values where only static dims or all rows are involved, else by `segment(plan, sorted)`."""
    plan = plan or Plan(func, x, dim, keepdim)
    values = values_of(x)
    if plan.whole and not keepdim:
        return func(values.reshape(-1) if values.dim() != 1 else values, **settings)
    if plan.groups is None:
        dims = ((0,) if plan.all_rows else ()) + plan.static
        out = func(values, dims if len(dims) > 1 else dims[0], False, **settings)
    else:
        out = segment(plan, plan.groups.sort(values))
    if isinstance(out, tuple):
        return tuple(plan.finish(o) for o in out)
    return plan.finish(out)


def offsets_of(plan: Plan, values: Tensor) -> Tensor:
    assert plan.groups is not None
    return plan.groups.on("offsets", values.device)


def in_accumulation_dtype(values: Tensor) -> Tensor:
    """Half precision widened, so that sums in two steps round once."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def segment_sum(plan: Plan, values: Tensor) -> Tensor:
    """Sum of each group over its rows and the reduced static dims."""
    if not plan.static:
        return kernels.segment_sum(values, offsets_of(plan, values))
    wide = in_accumulation_dtype(values)
    out = kernels.segment_sum(wide.sum(plan.static), offsets_of(plan, values))
    return out.to(values.dtype) if wide.dtype != values.dtype and values.dtype.is_floating_point else out


def _divisor(plan: Plan, like_: Tensor, correction: float = 0) -> Tensor:
    counts = plan.counts * plan.per_row
    counts = (counts - correction).clamp_min(0) if correction else counts
    shape = (-1,) + (1,) * (like_.dim() - 1)
    return counts.to(like_.real.dtype if like_.is_complex() else like_.dtype).view(shape)


def _cast(x: Tensor, dtype: torch.dtype | None) -> Any:
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


@register("reduction", "sum", "nansum")
def sum_(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dim = axis if dim is None else dim
    settings = {} if dtype is None else {"dtype": dtype}

    def segment(plan: Plan, values: Tensor) -> Tensor:
        if names(func) == "nansum" and values.is_floating_point():
            values = torch.where(values.isnan(), 0, values)
        return segment_sum(plan, _cast(values, dtype))

    return run(func, x, dim, keepdim, segment, **settings)


def segment_mean(plan: Plan, values: Tensor) -> Tensor:
    """Mean of each group; NaN for an empty one."""
    if not plan.static:
        return kernels.segment_mean(values, offsets_of(plan, values))
    wide = segment_sum(plan, in_accumulation_dtype(values))
    return (wide / _divisor(plan, wide)).to(values.dtype)


@register("reduction", "mean", "nanmean")
def mean(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dim = axis if dim is None else dim
    settings = {} if dtype is None else {"dtype": dtype}
    if dtype is None and not (x.dtype.is_floating_point or x.dtype.is_complex):
        return func(x._values)  # raises

    def segment(plan: Plan, values: Tensor) -> Tensor:
        values = _cast(values, dtype)
        if names(func) == "nanmean":
            hole = values.isnan()
            total = segment_sum(plan, torch.where(hole, 0, in_accumulation_dtype(values)))
            return (total / segment_sum(plan, hole.logical_not())).to(values.dtype)
        return segment_mean(plan, values)

    return run(func, x, dim, keepdim, segment, **settings)


@register("reduction", "any", "all", "count_nonzero")
def truth(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Any:
    dim = axis if dim is None else dim
    name = names(func)

    def base(values: Tensor, dims: Any = None, keep: bool = False) -> Tensor:
        if dims is None:
            return func(values)
        return func(values, dims) if name == "count_nonzero" else func(values, dims, keep)

    def segment(plan: Plan, values: Tensor) -> Tensor:
        true = values if values.dtype == torch.bool else values != 0  # which would widen bool to compare it
        hit = true.logical_not() if name == "all" else true
        if name == "count_nonzero":
            return segment_sum(plan, hit)
        if plan.static:  # before anything is counted, which takes eight bytes a value
            hit = hit.any(plan.static)
        hits = kernels.segment_sum(hit, offsets_of(plan, values))
        out = hits == 0 if name == "all" else hits > 0
        return out.to(torch.uint8) if values.dtype == torch.uint8 else out

    base.__name__ = name
    return run(base, x, dim, keepdim, segment)


@register("reduction", "prod")
def prod(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    settings = {} if dtype is None else {"dtype": dtype}

    def segment(plan: Plan, values: Tensor) -> Tensor:
        groups = plan.groups
        assert groups is not None
        values = _cast(values, dtype)
        if not (values.is_floating_point() or values.is_complex()) and dtype is None:
            values = values.long()
        wide = in_accumulation_dtype(values)
        index = groups.on("group", values.device)
        index = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        ones = wide.new_ones(groups.count, *values.shape[1:])
        return ones.scatter_reduce(0, index, wide, "prod").to(values.dtype)

    return run(func, x, dim, keepdim, segment, **settings)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, as that of torch's `std` and `norm`."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


@register("reduction", "var", "std", "var_mean", "std_mean")
def var(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dim, keepdim, correction = _var_arguments(*args, **kwargs)
    name = names(func)

    def base(values: Tensor, dims: Any = None, keep: bool = False) -> Any:
        return func(values, dims, correction=correction, keepdim=keep)

    def segment(plan: Plan, values: Tensor) -> Any:
        wide = in_accumulation_dtype(values)
        mean = segment_sum(plan, wide)
        mean = mean / _divisor(plan, mean)
        centre = plan.expand(mean)
        for d in plan.static:
            centre = centre.unsqueeze(d)
        off = wide - centre
        del centre, wide  # each is as large as the values
        square = (off * off.conj()).real if off.is_complex() else off * off
        del off
        total = segment_sum(plan, square)
        del square
        out = total / _divisor(plan, total, correction)
        if name.startswith("std"):
            out = safe_sqrt(out)
        kind = values.real.dtype if values.is_complex() else values.dtype
        out = out.to(kind)
        return (out, mean.to(values.dtype)) if name.endswith("_mean") else out

    base.__name__ = name
    return run(base, x, dim, keepdim, segment)


def _var_arguments(
    dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None, axis: Any = None
) -> tuple[Any, bool, float]:
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased else 0
    return (axis if dim is None else dim), keepdim, correction


@register("reduction", "logsumexp")
def logsumexp(func: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    def segment(plan: Plan, values: Tensor) -> Tensor:
        wide = values.to(torch.get_default_dtype()) if not values.is_floating_point() else values
        if plan.static:
            wide = torch.logsumexp(wide, plan.static)
        return kernels.segment_logsumexp(wide, offsets_of(plan, values))

    return run(func, x, dim, keepdim, segment)


@register("reduction", "trapezoid", "trapz", "cumulative_trapezoid")
def trapezoid(func: Any, y: NestedTensor, x: Any = None, *, dx: float = 1.0, dim: int = -1) -> Any:
    d = y._layout.element_dim(dim)
    cumulative = names(func).startswith("cumulative")
    if x is None and not cumulative:  # every value has a trapezoid on either side but the first and the last
        first, last = (torch.sum(_cut(y, dim, end), dim) for end in (slice(0, 1), slice(-1, None)))
        return (torch.sum(y, dim) - (first + last) * 0.5) * dx
    ends = _without_last(y, dim) + _without_first(y, dim)
    if x is None:
        steps: Any = dx
    elif not isinstance(x, NestedTensor) and x.dim() == 1 and d is not None:
        steps = x.diff().reshape([-1 if e == d else 1 for e in range(y._layout.rank)])
    else:
        steps = _differences(x, y, dim)
    pieces = ends * (steps * 0.5)
    del ends, steps  # as large as the values
    return torch.cumsum(pieces, dim) if cumulative else torch.sum(pieces, dim)


def _differences(x: Any, y: NestedTensor, dim: int) -> Any:
    if not isinstance(x, NestedTensor):
        x = torch.zeros_like(y) + x
    return _without_first(x, dim) - _without_last(x, dim)


def _cut(x: NestedTensor, dim: int, piece: slice) -> Any:
    d = x._layout.element_dim(dim)
    if d is None:
        raise ValueError(f"trapezoid along the batch dim {dim} would read padding; use .tensor")
    return x[(slice(None),) * (d + 1) + (piece,)]


def _without_first(x: NestedTensor, dim: int) -> Any:
    return _cut(x, dim, slice(1, None))


def _without_last(x: NestedTensor, dim: int) -> Any:
    return _cut(x, dim, slice(None, -1))


__all__ = ["Plan", "in_accumulation_dtype", "offsets_of", "run", "safe_sqrt", "segment_mean", "segment_sum"]
