"""Extrema over any dims and where they are: the largest and smallest values of each group by segment kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.nested_tensor import values_of
from danling.tensors.ops.base import names
from danling.tensors.ops.reductions import Plan, offsets_of, run
from danling.tensors.ops.table import register


class Extremum(torch.autograd.Function):
    """Largest or smallest value of each group; the gradient is shared evenly by ties."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, largest: bool) -> Tensor:  # type: ignore[override]
        out = (kernels.segment_max if largest else kernels.segment_min)(values, offsets)[0]
        ctx.save_for_backward(values, offsets, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        values, offsets, out = ctx.saved_tensors
        rows = values.shape[0]
        top = kernels.segment_expand(out, offsets, rows)
        ties = (values == top) | (values.isnan() & top.isnan())
        share = grad / kernels.segment_sum(ties, offsets).to(grad.dtype)
        return torch.where(ties, kernels.segment_expand(share, offsets, rows), 0), None, None


class _TransformableExtremum(Extremum):
    """The same in the form that torch.func takes, which costs more to call."""

    @staticmethod
    def forward(values: Tensor, offsets: Tensor, largest: bool) -> Tensor:  # type: ignore[override]
        return (kernels.segment_max if largest else kernels.segment_min)(values, offsets)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(inputs[0], inputs[1], output)


def segment_extremum(plan: Plan, values: Tensor, largest: bool) -> Tensor:
    """`amax` or `amin` of each group."""
    plan.need_values()
    if plan.static:
        values = (torch.amax if largest else torch.amin)(values, plan.static)
    offsets = offsets_of(plan, values)
    if not (values.requires_grad and torch.is_grad_enabled()) and values.dtype != torch.bool:
        return (kernels.segment_max if largest else kernels.segment_min)(values, offsets)[0]
    if values.dtype == torch.bool:
        return Extremum.apply(values.to(torch.uint8), offsets, largest).bool()
    transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    return (_TransformableExtremum if transformed else Extremum).apply(values, offsets, largest)


@register("reduction", "amax", "amin")
def amax(func: Any, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    largest = names(func) == "amax"
    plan = Plan(func, x, dim, keepdim)
    plan.need_values()
    return run(func, x, dim, keepdim, lambda plan, values: segment_extremum(plan, values, largest), plan=plan)


@register("reduction", "aminmax")
def aminmax(func: Any, x: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    kind: Any = torch.return_types.aminmax
    if dim is None:
        return func(values_of(x))
    return kind([torch.amin(x, dim, keepdim), torch.amax(x, dim, keepdim)])


def segment_pick(plan: Plan, values: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """`max(dim)` or `min(dim)` of each group: values, and positions along the reduced dim."""
    plan.need_values()
    source = values.to(torch.uint8) if values.dtype == torch.bool else values
    best, at = (kernels.segment_max if largest else kernels.segment_min)(source, offsets_of(plan, values))
    return best if source is values else best.to(values.dtype), positions_in_groups(plan, at)


def positions_in_groups(plan: Plan, at: Tensor) -> Tensor:
    """Positions inside groups as coordinates along the reduced dim (batch indices when that is the batch)."""
    groups = plan.groups
    assert groups is not None
    if not plan.batch:
        return at
    start = groups.on("offsets", at.device)[:-1].view(-1, *[1] * (at.dim() - 1))
    position = groups.sort(groups.on("position", at.device))
    if position.numel() == 0:
        return at
    return position[(start + at).clamp_max(position.shape[0] - 1)]


@register("reduction", "max", "min")
def max_(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return (torch.maximum if names(func) == "max" else torch.minimum)(x, other)
    if not args and "dim" not in kwargs:
        values = values_of(x)
        if values.numel() == 0:
            return func(values.reshape(-1))
        return func(values)
    return _max_dim(func, x, *args, **kwargs)


def _max_dim(func: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    name = names(func)
    kind: Any = getattr(torch.return_types, name)
    if not isinstance(dim, int):
        raise TypeError(f"{name}: dim must be an int, got {type(dim).__name__}")
    plan = Plan(func, x, dim, keepdim)
    values = values_of(x)
    if plan.groups is None and plan.all_rows:  # the batch of elements without ragged dims
        return kind([plan.finish(o) for o in func(values, 0)])
    if plan.groups is None:
        return kind([plan.finish(o) for o in func(values, plan.static[0])])
    out = segment_pick(plan, plan.groups.sort(values), name == "max")
    return kind([plan.finish(o) for o in out])


@register("reduction", "argmax", "argmin")
def argmax(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None:
        flat = x.flatten()
        return func(flat) if not keepdim else func(flat).reshape((1,) * x.dim())
    plan = Plan(func, x, dim, keepdim)
    values = values_of(x)
    if plan.groups is None:
        return plan.finish(func(values, 0 if plan.all_rows else plan.static[0]))
    return plan.finish(segment_pick(plan, plan.groups.sort(values.detach()), names(func) == "argmax")[1])
