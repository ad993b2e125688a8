"""What one rank holds of a model whose tensors may be split over ranks, and what it shares with them from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .payload import clean_name

BROADCAST_BYTES = 250 * 2**20  # what is sent at once


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: that of a `DTensor`, else the tensor.

    Example:
        >>> import torch
        >>> local_tensor(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def live_state(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The tensors in the state dicts of all parts on this rank, by their names in the whole model; not copied."""
    state: dict[str, Any] = {}
    for part in parts:
        for name, value in part.state_dict().items():
            if isinstance(value, Tensor):
                state[clean_name(name)] = value
    return state


def broadcast_state(module: nn.Module, group: Any = None) -> None:
    """Give all ranks of a group the parameters and buffers of the first of them; without a group, all ranks."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    tensors = (value for value in (*module.parameters(), *module.buffers()) if value.numel())
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=source, group=group)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)


def broadcast_buffers(buffers: Sequence[Tensor], group: Any = None) -> None:
    """Give all ranks of a group the buffers of the first of them, few messages for many; without a group, all ranks."""
    if buffers:
        ranks: Any = group or dist.group.WORLD
        dist._broadcast_coalesced(ranks, list(map(local_tensor, buffers)), BROADCAST_BYTES, 0)


class Buffers:
    """Keeps buffers that training changes, such as running statistics, the same on all ranks that average gradients.

    Args:
        modules: those that have buffers.
        group: of those ranks.
    """

    def __init__(self, modules: Sequence[nn.Module], group: Any) -> None:
        self.group = group
        self.modules = modules
        self._seen = [_versions(module) for module in self.modules]

    @classmethod
    def of(cls, parts: Sequence[nn.Module], group: Any) -> Buffers | None:
        """What keeps the buffers of all parts on this rank the same; None if there are none."""
        found = [module for part in parts for module in part.modules() if any(True for _ in module.buffers(False))]
        return cls(found, group) if found else None

    def synchronise(self) -> None:
        """Give all ranks the buffers of the first, of modules that wrote to one of theirs since the last time."""
        seen = [_versions(module) for module in self.modules]
        if seen == self._seen:
            return
        changed = [module for module, now, before in zip(self.modules, seen, self._seen, strict=True) if now != before]
        broadcast_buffers([buffer for module in changed for buffer in module.buffers(False)], self.group)
        self._seen = [_versions(module) for module in self.modules]


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    # Not every kernel counts a write (that of batch normalisation does not), but some buffer of such a module is counted.
    return [(id(buffer), buffer._version) for buffer in module.buffers(False)]
