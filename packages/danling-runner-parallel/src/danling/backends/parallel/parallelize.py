"""Splitting the layers of a model: by its own hook, and by the built-in plans for what the hook leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from danling.runners.errors import ConfigError

from .context import MISSING, ParallelContext
from .plans import apply_context_plan, apply_tensor_plan

PLANS = {"tensor": apply_tensor_plan, "context": apply_context_plan}
SPLIT_AXES = ("tensor", "context", "expert", "expert_tensor")
"""Axes that change how a model computes, and so need a plan or the model's hook."""


class NoPlanError(ConfigError, NotImplementedError):
    """An axis is in use that neither the model nor a built-in plan takes."""


def parallelize_part(part: nn.Module, ctx: ParallelContext) -> nn.Module:
    """Split a model or a stage over the axes inside its layers; return the module to use.

    Args:
        part: with `parallelize(ctx)`, which returns a module and reports the axes it took with `ctx.took`; or with
            `build_parallel_plan(ctx)`, a mapping of names to torch's parallel styles over `tensor`; or neither. Axes in
            use that are not reported then get their built-in plan, if it matches.
        ctx: meshes, degrees, ranks.

    Raises:
        TypeError: the hook returned something that is no module, or the plan is no mapping.
        NoPlanError: an axis is in use that nothing takes. With a pipeline another stage may take it: see `share_axes`.
        ConfigError: a built-in plan matches, but does not fit.
    """
    with ctx.part():
        if callable(hook := getattr(part, "parallelize", None)):
            name = type(part).__name__
            part = hook(ctx)
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name}.parallelize(ctx) must return a torch.nn.Module, got {type(part).__name__}")
        elif callable(build := getattr(part, "build_parallel_plan", None)):
            apply_styles(part, build(ctx), ctx)
        for axis, apply in PLANS.items():
            if ctx.degree(axis) > 1 and axis not in ctx.taken and apply(part, ctx):
                ctx.took(axis)
    if ctx.degree("pipeline") == 1:
        require_plans(ctx)
    return part


def share_axes(ctx: ParallelContext) -> None:
    """Let the stages of a pipeline tell each other which axes they took, and where sequences are cut.

    Called on every rank once all its parts are split.

    Raises:
        NoPlanError: an axis is in use that no stage takes.
    """
    if ctx.degree("pipeline") > 1:
        own = [int(axis in ctx.taken) for axis in SPLIT_AXES]
        own.append(-1 if ctx.sequence_dim is None else ctx.sequence_dim)
        *taken, dim = ctx.all_reduce(torch.tensor(own, device=ctx.device_type), "pipeline", dist.ReduceOp.MAX).tolist()
        ctx.took(*(axis for axis, flag in zip(SPLIT_AXES, taken, strict=True) if flag))
        ctx.sequence_dim = None if dim < 0 else dim
        require_plans(ctx)


def require_plans(ctx: ParallelContext) -> None:
    """Refuse to go on while nothing takes an axis that layers must be split over.

    Raises:
        NoPlanError: names each axis and what is missing.
    """
    missing = [axis for axis in SPLIT_AXES if ctx.degree(axis) > 1 and axis not in ctx.taken]
    if missing:
        raise NoPlanError(
            "\n  ".join(f"parallel.axes.{axis}: {ctx.degree(axis)}, but {MISSING[axis]}" for axis in missing)
        )


def apply_styles(part: nn.Module, plan: Any, ctx: ParallelContext) -> None:
    """Apply torch's parallel styles over the tensor axis."""
    from torch.distributed.tensor.parallel import parallelize_module

    if not isinstance(plan, Mapping):
        raise TypeError(f"build_parallel_plan(ctx) must return a mapping of names to styles, got {type(plan).__name__}")
    if ctx.degree("tensor") > 1 and plan:
        parallelize_module(part, ctx.submesh("tensor"), dict(plan))
        ctx.took("tensor")
