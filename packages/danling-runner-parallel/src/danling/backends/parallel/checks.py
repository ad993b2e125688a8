"""Replicas that start equal and stay equal: weights are broadcast before anything is split, and compared afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling.backends.torch.local import live_state, local_tensor
from danling.runners.errors import ConfigError

from .context import ParallelContext
from .topology import AXES


def materialize_meta(part: nn.Module, device: torch.device) -> nn.Module:
    """Bring a module to its device; one on the meta device is allocated and initialised there.

    Raises:
        ConfigError: a module on the meta device has no `reset_parameters`.
    """
    on_meta = [
        (name, module)
        for name, module in part.named_modules()
        if any(value.is_meta for value in (*module.parameters(False), *module.buffers(False)))
    ]
    if not on_meta:
        return part.to(device)
    initialisers: list[Any] = []
    whole = getattr(part, "init_weights", None)
    for name, module in on_meta:
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None and whole is None:
            raise ConfigError(
                f"{name or 'the model'} ({type(module).__name__}) is on the meta device and has no reset_parameters(): "
                "give it one, give the model an init_weights(), or build the model on a real device"
            )
        initialisers.append(reset)
    part.to_empty(device=device)
    for reset in [whole] if whole is not None else initialisers:
        reset()
    return part


def check_replicas(parts: Sequence[nn.Module], ctx: ParallelContext, when: str) -> None:
    """Compare, bit by bit through checksums, every tensor that several ranks hold whole or in equal parts.

    Raises:
        RuntimeError: on every rank of an axis along which one differs; names tensor and ranks.
    """
    state = live_state(parts)
    sums = {name: checksum(local_tensor(value)) for name, value in state.items()}
    for axis in AXES:
        if axis == "pipeline" or ctx.degree(axis) == 1:
            continue
        names = [name for name, value in state.items() if not is_split(value, axis, ctx)]
        if not names:
            continue
        own = torch.stack([sums[name] for name in names])
        least, most = own.clone(), own.clone()
        ctx.all_reduce(least, axis, dist.ReduceOp.MIN)
        ctx.all_reduce(most, axis, dist.ReduceOp.MAX)
        bad = [name for name, differs in zip(names, (least != most).any(1).tolist(), strict=True) if differs]
        if bad:
            more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
            raise RuntimeError(
                f"{bad[0]}{more} should be the same on ranks {ctx.topology.domain(axis)} (axis {axis}) and differs "
                f"{when}: something trains it without keeping these ranks in step"
            )


def is_split(value: Tensor, axis: str, ctx: ParallelContext) -> bool:
    """Whether ranks along an axis hold different parts of a tensor."""
    mesh = getattr(value, "device_mesh", None)
    if mesh is None:
        return False
    ranks = set(ctx.topology.domain(axis))
    for dim, placement in enumerate(value.placements):  # type: ignore[attr-defined]
        if mesh.size(dim) > 1 and not placement.is_replicate():
            if ranks & set(dist.get_process_group_ranks(mesh.get_group(dim))) - {ctx.topology.rank}:
                return True
    return False


def checksum(tensor: Tensor) -> Tensor:
    """Two integers that depend on every bit of a tensor and on the order of its elements.

    Example:
        >>> bool((checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))).all())
        False
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = 8 if data.numel() % 8 == 0 else 1
    words = data.view(torch.int64) if size == 8 and data.storage_offset() % 8 == 0 else data.to(torch.int64)
    places = torch.arange(1, words.numel() + 1, device=words.device) * 2654435761
    return torch.stack([words.sum(), (words * places).sum()])
