"""The built-in tensor plan: torch's transformer layers by heads and hidden units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from danling.runners.errors import ConfigError

from . import attention
from .collectives import Axis
from .linear import Columns, Cut, OwnDropout, Rows, split_parameters
from .modules import become, inherits

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def apply_tensor_plan(part: nn.Module, ctx: Any) -> bool:
    """Split the transformer layers in a model part over the `tensor` axis, in place.

    Applies to `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and `nn.MultiheadAttention` in any nesting, and
    to subclasses that keep their computation. The first feed-forward linear is split by columns, the second by rows,
    attention by heads: three sums over the axis per layer and pass become two. Everything else, such as norms,
    embeddings, output biases and the head of the model, stays replicated: ranks of the axis hold the same activations
    there, compute the same, and get the same gradients.

    Split parameters become `DTensor`s over the axis under their old names and shapes; a packed projection is split by
    head inside each of its three matrices (see `packing`). They must be equal on all ranks of the axis before.

    Ranks of the axis share their random numbers, so dropout on replicated activations agrees between them. Dropout on
    split activations (attention weights, hidden units) draws numbers of each rank's own, which are derived from the
    shared ones: masks are as independent as those of the unsplit model, though not the same numbers.

    Args:
        part: the model, or what a pipeline left of it.
        ctx: a `ParallelContext`: `mesh`, `group(axis)`, `degree(axis)`, `rank(axis)`.

    Returns:
        Whether anything matched.

    Raises:
        ConfigError: heads or hidden units do not divide, an activation is not elementwise, or a parameter is split
            already or tied to one that stays whole. Nothing is changed then.
    """
    axis = Axis.of(ctx, "tensor")
    names = {module: name or type(part).__name__ for name, module in part.named_modules()}
    attentions = [module for module in names if attention.is_standard(module)]
    layers = [module for module in names if _feeds_forward(module)]
    if not attentions and not layers:
        return False
    cuts = [cut for module in attentions for cut in _attention_cuts(module)]
    cuts += [cut for layer in layers for cut in _feed_forward_cuts(layer)]
    problems = [*_size_problems(attentions, layers, names, axis.degree), *_cut_problems(part, cuts, names)]
    if problems:
        raise ConfigError("the model cannot be split over parallel.axes.tensor: " + "; ".join(problems))
    split_parameters(cuts, ctx.mesh["tensor"], axis)
    for module in attentions:
        become(module, attention.Split)
        module.heads = axis  # type: ignore[assignment]
    for layer in layers:
        for module, mixin in ((layer.linear1, Columns), (layer.linear2, Rows), (layer.dropout, OwnDropout)):
            become(module, mixin)  # type: ignore[arg-type]
            module.axis = axis  # type: ignore[assignment]
    forbid_fast_path(part)
    return True


def forbid_fast_path(part: nn.Module) -> None:
    """Keep torch's fused inference path, which reads whole parameters by itself, away from split layers."""
    for module in part.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, attention.Split):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _feeds_forward(module: nn.Module) -> bool:
    return any(inherits(module, layer, "forward", "_ff_block") for layer in LAYERS) and all(
        inherits(linear, nn.Linear, "forward") for linear in (module.linear1, module.linear2)
    )


def _attention_cuts(module: nn.Module) -> Iterator[Cut]:
    packed = module.in_proj_weight is not None
    yield from (
        Cut(module, name, 0, 3 if name.startswith("in_proj") else 1)
        for name in (("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    )
    if module.in_proj_bias is not None:
        yield Cut(module, "in_proj_bias", 0, 3)
    if module.bias_k is not None:
        yield Cut(module, "bias_k", 2)
        yield Cut(module, "bias_v", 2)
    yield Cut(module.out_proj, "weight", 1)  # type: ignore[arg-type]


def _feed_forward_cuts(layer: nn.Module) -> Iterator[Cut]:
    yield Cut(layer.linear1, "weight", 0)  # type: ignore[arg-type]
    if layer.linear1.bias is not None:  # type: ignore[union-attr]
        yield Cut(layer.linear1, "bias", 0)  # type: ignore[arg-type]
    yield Cut(layer.linear2, "weight", 1)  # type: ignore[arg-type]


def _size_problems(attentions: list[Any], layers: list[Any], names: dict[Any, str], degree: int) -> Iterator[str]:
    for module in attentions:
        if module.num_heads % degree:
            yield f"{names[module]} has {module.num_heads} heads, which {degree} ranks cannot share equally"
    for layer in layers:
        hidden = layer.linear1.out_features
        if hidden % degree:
            yield f"{names[layer]} has {hidden} hidden units, which {degree} ranks cannot share equally"
        if not _is_elementwise(layer.activation):
            yield (
                f"the activation of {names[layer]} has parameters or mixes hidden units, of which each rank holds a part: "
                "split the layer in the model's `parallelize` hook"
            )


@torch.no_grad()
def _is_elementwise(activation: Any) -> bool:
    """Whether an activation treats each hidden unit alone, tried on numbers, and learns nothing."""
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return False
    values = torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 12)
    try:
        whole = activation(values)
        return whole.shape == values.shape and torch.equal(
            whole, torch.cat([activation(half) for half in values.chunk(2, 1)], 1)
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _cut_problems(part: nn.Module, cuts: list[Cut], names: dict[Any, str]) -> Iterator[str]:
    roles: dict[int, set[tuple[int, int]]] = {}
    for cut in cuts:
        parameter = getattr(cut.module, cut.name)
        roles.setdefault(id(parameter), set()).add((cut.dim, cut.blocks))
        if isinstance(parameter, DTensor):
            yield f"{names[cut.module]}.{cut.name} is split already: let the hook that did it call ctx.took('tensor')"
    owned = {(cut.module, cut.name) for cut in cuts}
    for module in part.modules():
        for name, parameter in module._parameters.items():
            mine = roles.get(id(parameter))
            if mine is not None and ((module, name) not in owned or len(mine) > 1):
                yield f"{names[module]}.{name} is tied to a parameter that is split in another way"
