"""The built-in context plan: attention over sequences of which each rank holds a part, and the cut of the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from danling.runners.errors import ConfigError

from . import attention
from .collectives import Axis, join
from .modules import become
from .tensor import forbid_fast_path

OVERRIDE = "override shard_context(batch) to cut it your way"


def apply_context_plan(part: nn.Module, ctx: Any) -> bool:
    """Let the attention in a model part see whole sequences over the `context` axis, in place.

    Applies to every `nn.MultiheadAttention`, on its own or inside torch's transformer layers, and to subclasses that keep
    its computation. Queries stay where they are; keys and values are gathered, with gradients. What works on each
    position alone needs nothing. All parameters stay replicated: each rank has the gradients of its part of the
    sequence, and gradients are averaged over the `loss` domain.

    Queries, keys and values of cross attention are all parts of their sequences; masks cover all keys (see
    `attention.Split.forward`). Sets `ctx.sequence_dim`, along which batches are cut.

    Args:
        part: the model, or what a pipeline left of it.
        ctx: a `ParallelContext`.

    Returns:
        Whether anything matched.

    Raises:
        ConfigError: modules that mix positions in a way no plan covers (recurrent layers, convolutions, attention
            with a forward of its own), or that disagree on where the sequence dimension is.
    """
    names = {module: name or type(part).__name__ for name, module in part.named_modules()}
    attentions: list[Any] = [module for module in names if attention.is_standard(module)]
    if not attentions:
        return False
    if lines := list(_obstacles(names, attentions)):
        raise ConfigError("the model cannot be cut over parallel.axes.context: " + "; ".join(lines))
    axis = Axis.of(ctx, "context")
    for module in attentions:
        become(module, attention.Split)
        module.sequence = axis
    forbid_fast_path(part)
    ctx.sequence_dim = 1 if attentions[0].batch_first else 0
    return True


def _obstacles(names: Mapping[nn.Module, str], attentions: list[Any]) -> Iterator[str]:
    for module, name in names.items():
        mixes = isinstance(module, nn.RNNBase | nn.RNNCellBase)
        mixes |= isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) > 1
        mixes |= isinstance(module, nn.MultiheadAttention) and module not in attentions
        if mixes:
            yield (
                f"{name}, a {type(module).__name__}, mixes positions of which each rank holds a part: give the model a "
                "`parallelize` hook"
            )
    if len({module.batch_first for module in attentions}) > 1:
        some = {module.batch_first: names[module] for module in attentions}
        yield f"{some[True]} has batch_first and {some[False]} has not, so the sequence dimension is not known"


def _like(container: Any, items: Any) -> Any:
    """Items in a container of the same type."""
    return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)


def shard_context(batch: Any, ctx: Any) -> Any:
    """Cut the sequence dimension of input and target to this rank's part and set `ctx.context_offset`.

    Every tensor in input and target is cut along `ctx.sequence_dim` (1 for `batch_first` layers, else 0): items `input`
    and `target` of a mapping, 0 and 1 of a sequence, else the batch itself. Parts are equal and follow the ranks.

    Args:
        batch: as the loader made it, whole sequences.
        ctx: a `ParallelContext`.

    Returns:
        The batch with parts in place of whole sequences; other items are untouched.

    Raises:
        ValueError: a length that the degree does not divide, or a tensor without a sequence dimension.
    """
    degree, rank = ctx.degree("context"), ctx.rank("context")
    if degree == 1:
        return batch
    dim = 1 if ctx.sequence_dim is None else ctx.sequence_dim
    lengths: list[int] = []

    def cut(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return _like(value, {key: cut(item, f"{where}.{key}") for key, item in value.items()})
        if isinstance(value, list | tuple):
            return _like(value, [cut(item, f"{where}[{index}]") for index, item in enumerate(value)])
        if hasattr(value, "concat") and hasattr(value, "mask"):
            raise ValueError(f"{where} is ragged, its sequences have no equal parts: pad them, or {OVERRIDE}")
        if not isinstance(value, Tensor):
            return value
        if value.dim() < 2:
            raise ValueError(
                f"{where} of shape {tuple(value.shape)} has no sequence dimension to cut over parallel.axes.context; {OVERRIDE}"
            )
        length = value.shape[dim]
        if length % degree:
            raise ValueError(
                f"{where} has {length} positions in dimension {dim}, which parallel.axes.context: {degree} does not divide; "
                f"pad sequences to a multiple of {degree}"
            )
        lengths.append(length // degree)
        return value.narrow(dim, rank * (length // degree), length // degree)

    if isinstance(batch, Mapping):
        parts = {name: cut(batch[name], name) for name in ("input", "target") if name in batch}
        result: Any = {**batch, **parts}
    elif isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        result = type(batch)(
            cut(item, ("input", "target")[index]) if index < 2 else item for index, item in enumerate(batch)
        )
    else:
        result = cut(batch, "input")
    if lengths:
        ctx.context_offset, ctx.context_length = rank * lengths[0], lengths[0]
    return result


@torch.no_grad()
def unshard_context(output: Any, ctx: Any) -> Any:
    """Put the outputs for this rank's part of the sequence together with those of the other ranks.

    Each tensor is joined along its one dimension, beside that of the batch, that is as long as the part.

    Args:
        output: tensors in nested containers.
        ctx: a `ParallelContext`, after `shard_context`.

    Raises:
        ValueError: no dimension, or more than one, is as long as the part.
    """
    axis = Axis.of(ctx, "context")
    samples = 1 - (1 if ctx.sequence_dim is None else ctx.sequence_dim)

    def joined(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _like(value, {key: joined(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return _like(value, [joined(item) for item in value])
        if not isinstance(value, Tensor):
            return value
        dims = [dim for dim, size in enumerate(value.shape) if size == ctx.context_length and dim != samples]
        if len(dims) != 1:
            raise ValueError(
                f"an output of shape {tuple(value.shape)} has {len(dims)} dimensions of the {ctx.context_length} positions "
                "that this rank holds, so it is not known how to join the parts; override unshard_context(output)"
            )
        return join(value, axis, dims[0])

    return joined(output)
