"""How ranks meet outside of gradients: commits of checkpoints, common decisions, one small sum per window."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from struct import Struct
from typing import Any

import torch
import torch.distributed as dist

from danling.runners.coordinator import Coordinator


class TorchCoordinator(Coordinator):
    """The coordinator of a `torch.distributed` world.

    Args:
        group: the group for its collectives; None is the default group. Its tensors live where its backend has them.
        threaded: whether the group is used by nothing else, so that a writer thread may use it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, threaded: bool = False) -> None:
        self.group = group
        self.threaded = threaded
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather_objects(None)

    def gather_objects(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all ranks, in order of rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def broadcast_object(self, obj: Any) -> Any:
        """Give every rank the object of rank 0."""
        box = [obj if self.rank == 0 else None]
        dist.broadcast_object_list(
            box, src=0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group
        )
        return box[0]


def new_commit_group(backend: str = "gloo", timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Make a group of all ranks that only checkpoint commits use, so that they may run on a writer thread.

    Args:
        backend: gloo or nccl.
        timeout: how long a rank waits for the others.
    """
    return dist.new_group(backend=backend, timeout=timeout)


class Header:
    """A few numbers of each rank, summed over all ranks in one collective.

    The numbers are gathered and each rank adds them by itself: for so few bytes the steps between ranks are what takes time,
    and a sum made on the way takes twice as many.

    Args:
        size: how many numbers.
        group: None is the default group; one of gloo, because the numbers are on the host.
    """

    def __init__(self, size: int, *, group: dist.ProcessGroup | None = None) -> None:
        # Once per window: the group itself is asked, which costs half of what `dist.all_gather_into_tensor` does.
        self._group = group or (dist.group.WORLD if dist.is_initialized() else None)
        self._sent = torch.zeros(size, dtype=torch.float64)
        self._received = self._sent.repeat(self._group.size()) if self._group else self._sent
        # Half the time of an assignment to the array
        self._write = partial(Struct(f"{size}d").pack_into, self._sent.numpy().data.cast("B"), 0)
        self._table = self._received.view(-1, size).numpy()
        self._work: Any = None  # under way

    def send(self, values: Sequence[float]) -> None:
        """Begin to sum: `receive` has the result.

        Args:
            values: the numbers of this rank.
        """
        if self._work is not None:  # nobody has asked for the sums, because of an error
            self.receive()
        self._write(*values)
        if self._group is not None:
            self._work = self._group._allgather_base(self._received, self._sent)

    def receive(self) -> list[float]:
        """Wait for the sums over ranks of what was sent."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()
        sums: list[float] = self._table.sum(0).tolist()
        return sums

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks.

        Args:
            values: the numbers of this rank.
        """
        self.send(values)
        return self.receive()
