"""Collectives that gradients flow through, and the random numbers of split activations.

Each is a function of an `Axis`. Which backward is right follows from what the ranks hold: where all hold the same tensor the
gradient is the same on all of them and must be counted once; where each holds a part, parts are put together or added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave these functions new names and warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Axis:
    """One axis as a plan needs it: its ranks, how many there are and which of them this is.

    Copies of a module share it, because a process group cannot be copied.
    """

    name: str
    group: Any
    degree: int
    rank: int

    @classmethod
    def of(cls, ctx: Any, name: str) -> Axis:
        """The axis `name` of a parallel context."""
        return cls(name, ctx.group(name), ctx.degree(name), ctx.rank(name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self

    def share(self, size: int) -> int:
        """This rank's part of `size`, which the degree divides."""
        return size // self.degree


def copy_in(tensor: Tensor, axis: Axis) -> Tensor:
    """Hand a tensor that all ranks hold to work that is split: the tensor itself; its gradients are added up."""
    return _CopyIn.apply(tensor, axis)


def sum_out(tensor: Tensor, axis: Axis) -> Tensor:
    """Add up what the ranks computed, each a summand; each summand's gradient is that of the sum."""
    return _SumOut.apply(tensor, axis)


def gather_parts(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Put together equal parts that ranks will use *differently*: gradients of each part are added up over the ranks."""
    return _GatherParts.apply(tensor, axis, dim)


def join(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Put together equal parts to what all ranks go on with *alike*: each takes its part of the one gradient."""
    return _Join.apply(tensor, axis, dim)


def take_part(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of a tensor that all ranks hold; the parts' gradients are put together."""
    return _TakePart.apply(tensor, axis, dim)


def exchange(tensor: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send rows to each rank and receive theirs; gradients travel back.

    Args:
        tensor: `(sum(sent), ...)`: the rows for rank 0, for rank 1, and so on.
        axis: the ranks.
        sent: how many rows go to each rank.
        received: how many come from each.

    Returns:
        `(sum(received), ...)`: the rows of rank 0, of rank 1, and so on.
    """
    return _Exchange.apply(tensor, axis, list(sent), list(received))


def _reduced(tensor: Tensor, axis: Axis) -> Tensor:
    tensor = tensor.contiguous().clone()
    dist.all_reduce(getattr(tensor, "concat", tensor), group=axis.group)  # of a ragged batch, its packed values
    return tensor


def _gathered(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    tensor = tensor.contiguous()
    whole = tensor.new_empty(axis.degree, *tensor.shape)
    _all_gather(whole.flatten(0, 1) if tensor.dim() else whole, tensor, group=axis.group)
    return torch.cat(whole.unbind(), dim)


def _scattered(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    parts = torch.stack(tensor.chunk(axis.degree, dim))
    result = torch.empty_like(parts[0])
    _reduce_scatter(result, parts.flatten(0, 1), group=axis.group)
    return result


def _part(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    return tensor.chunk(axis.degree, dim)[axis.rank]


def _exchanged(tensor: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    result = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=axis.group)
    return result


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _reduced(grads[0], ctx.axis), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return _reduced(tensor, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gathered(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scattered(grads[0], ctx.axis, ctx.dim), None, None


class _Join(_GatherParts):
    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _part(grads[0], ctx.axis, ctx.dim), None, None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _part(tensor, axis, dim).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gathered(grads[0], ctx.axis, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchanged(tensor, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], ctx.axis, ctx.received, ctx.sent), None, None, None


@contextmanager
def own_randomness(axis: Axis, device: torch.device) -> Iterator[None]:
    """Draw random numbers of this rank's own in a region where ranks of `axis` hold different parts of an activation.

    Outside, these ranks draw the same numbers because they hold the same activations. All of them take one number from
    that common stream and seed the region with it and their rank; afterwards the common stream goes on where it was, so
    it stays common and is all that a checkpoint has to keep.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_()) ^ (axis.rank * 0x9E3779B97F4A7C15 & (1 << 62) - 1)
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    before = module.get_rng_state()
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        module.manual_seed(seed)
    try:
        yield
    finally:
        module.set_rng_state(before)
