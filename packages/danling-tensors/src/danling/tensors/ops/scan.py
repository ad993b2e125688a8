"""Running sums and their kin: every segment starts anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.nested_tensor import values_of
from danling.tensors.ops.base import batch_error, like, names
from danling.tensors.ops.groups import Groups, group_rows
from danling.tensors.ops.table import register


def _groups(func: Any, x: Any, dim: int) -> tuple[Groups | None, int]:
    """The groups of a ragged dim, or the dim of values of a static one."""
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None:
        raise batch_error(func, dim)
    if d in layout.ragged_dims:
        return group_rows(layout, False, (layout.ragged_dims.index(d),)), 0
    return None, layout.values_dim(d)


def _position(groups: Groups, values: Tensor) -> Tensor:
    """Index of each sorted row inside its group, broadcastable to values."""
    device = values.device
    start = groups.on("offsets", device)[:-1].index_select(0, groups.on("group", device))
    inside = torch.arange(values.shape[0], device=device) - start
    return inside.view(-1, *[1] * (values.dim() - 1))


def doubling(groups: Groups, values: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Inclusive scan of each group in `log2` of the longest group steps (Hillis and Steele, 1986)."""
    inside = _position(groups, values)
    longest = int(groups.offsets.diff().max()) if groups.count else 0
    step = 1
    out = values
    while step < longest:
        late, early = out[step:], out[: out.shape[0] - step]
        keep = inside[step:] >= step
        out = torch.cat([out[:step], torch.where(keep, combine(early, late), late)])
        step *= 2
    return out


@register("scan", "cumsum", "cumprod", "logcumsumexp")
def cumulate(func: Any, x: Any, dim: int, *, dtype: Any = None) -> Any:
    groups, at = _groups(func, x, dim)
    name = names(func).rstrip("_")
    values = values_of(x)
    settings = {} if dtype is None else {"dtype": dtype}
    if groups is None:
        out = func(values, at, **settings)
        return x if out is values else like(x, out)
    source = values if dtype is None else values.to(dtype)
    integral = not (source.is_floating_point() or source.is_complex())
    rows = groups.sort(source)
    if name == "cumsum":
        out = kernels.segment_cumsum(rows, groups.on("offsets", rows.device))
    elif name == "cumprod":
        rows = rows.to(torch.int64) if integral and dtype is None else rows
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        out = doubling(groups, wide, torch.mul).to(rows.dtype)
    else:
        if integral:
            func(source[:1], 0)  # raises as torch does
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        out = doubling(groups, wide, torch.logaddexp).to(rows.dtype)
    out = groups.unsort(out)
    if dtype is not None and out.dtype != dtype:
        out = out.to(dtype)
    if names(func).endswith("_"):
        values.copy_(out)
        return x
    return like(x, out)


@register("scan", "cummax", "cummin")
def cummax(func: Any, x: Any, dim: int) -> Any:
    groups, at = _groups(func, x, dim)
    name = names(func)
    kind: Any = getattr(torch.return_types, name)
    values = values_of(x)
    if groups is None:
        best, index = func(values, at)
        return kind([like(x, best), like(x, index)])
    rows = groups.sort(values)
    plain = rows.detach()
    index = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)

    def later_wins(early: Tensor, late: Tensor) -> Tensor:
        a, b = plain.gather(0, early), plain.gather(0, late)
        wins = (b >= a) if name == "cummax" else (b <= a)
        if plain.is_floating_point():
            wins = b.isnan() | (~a.isnan() & wins)
        return torch.where(wins, late, early)

    index = doubling(groups, index, later_wins)
    best = rows.gather(0, index)
    start = groups.on("offsets", rows.device)[:-1].index_select(0, groups.on("group", rows.device))
    inside = index - start.view(-1, *[1] * (rows.dim() - 1))
    return kind([like(x, groups.unsort(best)), like(x, groups.unsort(inside))])
