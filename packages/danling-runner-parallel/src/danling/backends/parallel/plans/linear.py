"""Linear layers of which each rank holds a part, for the built-in plan and for models that split themselves."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from danling.runners.errors import ConfigError

from .collectives import Axis, copy_in, own_randomness, sum_out
from .modules import become
from .packing import mark_packed, to_rank_order


def local(parameter: Any) -> Any:
    """The part of a parameter that this process holds; what is not split is returned as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Columns:
    """Mixed into a linear layer that computes this rank's output features from all input features."""

    axis: Axis
    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features / degree)`."""
        return F.linear(copy_in(input, self.axis), local(self.weight), local(self.bias))


class Rows:
    """Mixed into a linear layer that maps this rank's input features and adds up over the ranks."""

    axis: Axis
    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features / degree)` to `(..., out_features)`, the same on every rank."""
        out = sum_out(F.linear(input, local(self.weight)), self.axis)
        bias = local(self.bias)
        return out if bias is None else out + bias


class OwnDropout:
    """Mixed into dropout over an activation of which each rank holds a part: ranks draw masks of their own."""

    axis: Axis
    p: float
    training: bool

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of this rank's part."""
        draws = self.training and self.p > 0
        with own_randomness(self.axis, input.device) if draws else nullcontext():
            return super().forward(input)  # type: ignore[misc]


class Cut(NamedTuple):
    """A parameter to split: where it is, along which dimension, and how many matrices are packed in its rows."""

    module: nn.Module
    name: str
    dim: int
    blocks: int = 1


def split_columns(linear: nn.Linear, ctx: Any, axis: str = "tensor") -> nn.Linear:
    """Split a linear layer by output features, in place: from whole inputs to this rank's part of the outputs.

    Args:
        linear: its weight must be equal on all ranks of the axis.
        ctx: a `ParallelContext`.
        axis: to split over.

    Raises:
        ConfigError: the degree does not divide the output features.
    """
    return _split_linear(linear, ctx, axis, Columns, linear.out_features, "output", 0)


def split_rows(linear: nn.Linear, ctx: Any, axis: str = "tensor") -> nn.Linear:
    """Split a linear layer by input features, in place: from this rank's part of the inputs to whole outputs.

    Args:
        linear: its weight must be equal on all ranks of the axis.
        ctx: a `ParallelContext`.
        axis: to split over.

    Raises:
        ConfigError: the degree does not divide the input features.
    """
    return _split_linear(linear, ctx, axis, Rows, linear.in_features, "input", 1)


def _split_linear(linear: Any, ctx: Any, name: str, mixin: type, size: int, what: str, dim: int) -> Any:
    axis = Axis.of(ctx, name)
    if size % axis.degree:
        raise ConfigError(f"parallel.axes.{name}: {axis.degree} does not divide the {size} {what} features of {linear}")
    cuts = [Cut(linear, "weight", dim)]
    if linear.bias is not None and dim == 0:
        cuts.append(Cut(linear, "bias", 0))
    split_parameters(cuts, ctx.mesh[name], axis)
    become(linear, mixin)
    linear.axis = axis
    return linear


@torch.no_grad()
def split_parameters(cuts: Iterable[Cut], mesh: Any, axis: Axis) -> None:
    """Put this rank's part in the place of each parameter; tied parameters stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module, name, dim, blocks in cuts:
        whole = getattr(module, name)
        if id(whole) not in done:
            ranked = whole if blocks == 1 else to_rank_order(whole, blocks, axis.degree)
            mine = ranked.chunk(axis.degree, dim)[axis.rank].clone(memory_format=torch.contiguous_format)
            split = DTensor.from_local(
                mine, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            done[id(whole)] = nn.Parameter(split, requires_grad=whole.requires_grad)
        setattr(module, name, done[id(whole)])
        if blocks > 1:
            mark_packed(module, name, blocks, axis.degree)
