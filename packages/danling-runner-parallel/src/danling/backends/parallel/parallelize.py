"""Splitting the layers of a model: by its own hook, or by the built-in plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from danling.runners.errors import ConfigError

from .context import MISSING, ParallelContext

SPLIT_AXES = ("tensor", "context", "expert", "expert_tensor")


class NoPlanError(ConfigError, NotImplementedError):
    """An axis is in use that neither the model nor a built-in plan takes."""


def apply_plans(part: nn.Module, ctx: ParallelContext) -> nn.Module:
    """Split a model or a stage over the axes inside its layers; return the module to use.

    Args:
        part: with `parallelize(ctx)`, which returns a module and reports the axes it took with `ctx.took`; or with
            `build_parallel_plan(ctx)`, a mapping of module names to torch's parallel styles over `tensor`; or neither.
        ctx: meshes, degrees, ranks.

    Raises:
        TypeError: the hook returned something that is no module, or the plan is no mapping.
        NoPlanError: an axis is in use that nothing takes.
    """
    if not any(ctx.degree(axis) > 1 for axis in SPLIT_AXES):
        return part
    if (hook := getattr(part, "parallelize", None)) is not None:
        name = type(part).__name__
        part = hook(ctx)
        if not isinstance(part, nn.Module):
            raise TypeError(f"{name}.parallelize(ctx) must return a torch.nn.Module, got {type(part).__name__}")
    elif (build := getattr(part, "build_parallel_plan", None)) is not None:
        apply_styles(part, build(ctx), ctx)
    else:
        apply_built_in(part, ctx)
    missing = [axis for axis in SPLIT_AXES if ctx.degree(axis) > 1 and axis not in ctx.taken]
    if missing:
        lines = [f"parallel.axes.{axis}: {ctx.degree(axis)}, but {MISSING[axis]}" for axis in missing]
        raise NoPlanError("\n  ".join(lines))
    return part


def apply_styles(part: nn.Module, plan: Any, ctx: ParallelContext) -> None:
    """Apply torch's parallel styles over the tensor axis."""
    from torch.distributed.tensor.parallel import parallelize_module

    if not isinstance(plan, Mapping):
        raise TypeError(f"build_parallel_plan(ctx) must return a mapping of names to styles, got {type(plan).__name__}")
    if ctx.degree("tensor") > 1 and plan:
        parallelize_module(part, ctx.submesh("tensor"), dict(plan))
        ctx.took("tensor")


def apply_built_in(part: nn.Module, ctx: ParallelContext) -> None:
    """Apply the built-in plans for the tensor and context axes."""
    if ctx.degree("tensor") > 1 or ctx.degree("context") > 1:
        from . import plans

        for axis, plan in (("tensor", plans.apply_tensor_plan), ("context", plans.apply_context_plan)):
            if ctx.degree(axis) > 1 and plan(part, ctx):
                ctx.took(axis)
