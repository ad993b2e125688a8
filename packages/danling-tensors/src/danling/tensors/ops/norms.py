"""Norms and distances over any dims."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import values_of
from danling.tensors.ops.base import batch_error, names
from danling.tensors.ops.extrema import Extremum, segment_extremum
from danling.tensors.ops.reductions import Plan, in_accumulation_dtype, offsets_of, run, safe_sqrt, segment_sum
from danling.tensors.ops.table import register


def segment_norm(plan: Plan, values: Tensor, order: float) -> Tensor:
    """Vector norm of each group."""
    wide = in_accumulation_dtype(values).abs()
    if order == math.inf or order == -math.inf:
        if order == math.inf and plan.groups is not None and plan.groups.first_empty is not None:
            out = _norm_of_maybe_empty(plan, wide)
        else:
            out = segment_extremum(plan, wide, order > 0)
    elif order == 0:
        out = segment_sum(plan, wide != 0).to(wide.dtype)
    elif order == 1:
        out = segment_sum(plan, wide)
    elif order == 2:
        real = in_accumulation_dtype(values)
        square = real * real if not real.is_complex() else (real * real.conj()).real
        out = safe_sqrt(segment_sum(plan, square))
    else:
        total = segment_sum(plan, wide.pow(order))
        zero = total == 0
        out = torch.where(zero, 0, torch.where(zero, 1, total).pow(1.0 / order))
    return out.to(values.real.dtype if values.is_complex() else values.dtype)


def _norm_of_maybe_empty(plan: Plan, wide: Tensor) -> Tensor:
    if not plan.batch:
        plan.need_values()
    if plan.static:
        wide = torch.amax(wide, plan.static)
    return Extremum.apply(wide, offsets_of(plan, wide), True).clamp_min(0)


@register("reduction", "norm", "linalg_vector_norm", "linalg_norm")
def norm(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    order, dim, keepdim, dtype = _norm_arguments(*args, **kwargs)
    name = names(func)
    if dtype is not None:
        x = x.to(dtype)
    matrix = name != "linalg_vector_norm" and (
        isinstance(order, str) or (name == "linalg_norm" and isinstance(dim, (tuple, list)) and len(dim) == 2)
    )
    if matrix and not (dim is None and order == "fro") and not (order == "fro" and isinstance(dim, int)):
        if dim is None:
            dim = (-2, -1)
        return torch.linalg.matrix_norm(x, "fro" if order is None else order, dim, keepdim)
    order = 2.0 if order is None or isinstance(order, str) else float(order)

    def base(values: Tensor, dims: Any = None, keep: bool = False) -> Tensor:
        return torch.linalg.vector_norm(values, order, dims, keep)

    base.__name__ = name
    return run(base, x, dim, keepdim, lambda plan, values: segment_norm(plan, values, order))


def _norm_arguments(
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *extra: Any,
    ord: Any = None,
    dtype: Any = None,
    out: Any = None,
) -> tuple[Any, Any, bool, Any]:
    return (p if ord is None else ord), dim, keepdim, dtype


@register("reduction", "linalg_matrix_norm")
def matrix_norm(
    func: Any, x: Any, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Any:
    layout = x._layout
    if dtype is not None:
        x = x.to(dtype)
    if ord == "fro":
        return torch.linalg.vector_norm(x, 2, dim, keepdim)
    dims = [layout.element_dim(d) for d in dim]
    if None in dims:
        raise batch_error(func, dim)
    if any(d in layout.ragged_dims for d in dims):
        from danling.tensors.ops.grouped import run_grouped

        left = [d for d in layout.ragged_dims if d not in dims]
        if keepdim:
            ragged = tuple(left)
        else:
            ragged = tuple(d - sum(r < d for r in dims) for d in left)  # type: ignore[operator]
        return run_grouped(lambda v: func(v, ord, [d + 1 for d in dims], keepdim), x, ragged=ragged, like=x)  # type: ignore[operator]
    plan = Plan(func, x, tuple(dim), keepdim)
    return plan.finish(func(values_of(x), ord, [layout.values_dim(d) for d in dims]))  # type: ignore[arg-type]


@register("reduction", "dist")
def dist(func: Any, x: Any, y: Any, p: float = 2.0) -> Tensor:
    return torch.linalg.vector_norm(x - y, p)
