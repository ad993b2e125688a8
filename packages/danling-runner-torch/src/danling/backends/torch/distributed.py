"""Ranks and what they tell each other."""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling.runners.supervisor import Stop

from .collective import Header, TorchCoordinator, new_commit_group
from .local import broadcast_buffers, broadcast_state

_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's

_base_store: Any = None  # kept for the life of the process: a second rendezvous at the same address would fail
_groups_made = 0


class WindowHeader(NamedTuple):
    """What all ranks together know about a window.

    Attributes:
        weight: sum of the weights.
        samples: in the window.
        tokens: in the window.
        present: ranks that have a micro-batch.
        left: whether any rank has data beyond this window.
        never: ranks that have had no batch in this epoch at all.
        never_rank: one of them.
        abort: a rank cannot run this window, because it is to stop.
        stop: the strongest reason to stop that any rank has, 0 for none.
        save: whether any rank is asked to save.
    """

    weight: float
    samples: int
    tokens: int
    present: int
    left: bool
    never: int = 0
    never_rank: int = -1
    abort: bool = False
    stop: Stop = Stop.NONE
    save: bool = False


class Distributed(_Host):
    """Processes, devices and collectives of `TorchRunner`."""

    coordinator: Any
    agreed: tuple[bool, bool] = (False, False)
    _world: tuple[int, int, int] | None = None

    def _read_world(self) -> tuple[int, int, int]:
        """World size, rank and local rank, as the launcher gave them when the runner was built."""
        if self._world is None:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            ranks = (int(os.environ.get(name, "0")) if size > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
            self._world = size, *ranks  # type: ignore[assignment]
        return self._world  # type: ignore[return-value]

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self._read_world()[0]

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._read_world()[1]

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self._read_world()[2]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def init_distributed(self) -> None:
        """Choose the device; with several processes make the group and agree on timestamp and seed.

        Raises:
            RuntimeError: somebody else has made a process group already.
        """
        self.state.elastic.restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._device = self.choose_device()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if self.world_size == 1:
            self._control, self._header = None, Header(_HEADER_SIZE)  # of one rank, for a replica group of one process
            super().init_distributed()
            return
        self._make_group()
        comm, checkpoint = self.config.comm, self.config.checkpoint
        timeout = comm.train_timeout_seconds and timedelta(seconds=comm.train_timeout_seconds)
        threaded = checkpoint.dedicated_async_process_group
        group = new_commit_group(checkpoint.async_process_group_backend, timeout or None) if threaded else None
        self.coordinator = TorchCoordinator(group, threaded=threaded)
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout or None)
        self._control = control
        self._header = Header(_HEADER_SIZE, group=control)
        seed = self.choose_seed() if self.is_main_process else None
        self.workspace.timestamp, self.state.rng.seed = self.coordinator.broadcast_object((self.timestamp, seed))

    def choose_device(self) -> torch.device:
        """The accelerator of this rank, or the CPU."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, self.local_rank)

    def _make_group(self) -> None:
        global _base_store, _groups_made
        if dist.is_initialized():
            raise RuntimeError(
                "a torch.distributed process group exists already; danling makes its own from RANK and WORLD_SIZE: "
                "destroy the other one before a runner is built"
            )
        comm = self.config.comm
        backend = comm.backend or ("nccl" if self.device.type == "cuda" else "gloo")
        seconds = comm.init_timeout_seconds or comm.train_timeout_seconds
        timeout = timedelta(seconds=seconds) if seconds else None
        if _base_store is None:
            rendezvous = dist.rendezvous("env://", self.rank, self.world_size, timeout=timeout or timedelta(minutes=5))
            _base_store = next(iter(rendezvous))[0]
        _groups_made += 1
        store = dist.PrefixStore(f"danling/{self.state.elastic.restart_count}/{_groups_made}", _base_store)
        hook = sys.excepthook
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self._closing("excepthook", partial(_restore_hook, hook, sys.excepthook))
        self._closing("group", _destroy_group)

    def switch_timeouts(self) -> None:
        """After the first update the groups made here wait no longer than `comm.train_timeout_seconds`."""
        seconds = self.config.comm.train_timeout_seconds
        if not self.distributed or not seconds:
            return
        from torch.distributed.distributed_c10d import _set_pg_timeout

        groups = {dist.group.WORLD, self._control, getattr(self.coordinator, "group", None)} - {None}
        for group in groups:
            try:
                _set_pg_timeout(timedelta(seconds=seconds), group)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                self.logger.warning("the time-out of a process group cannot be changed: %s", error)

    # Collectives

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        """Reduce a tensor over all ranks, in place; the sum unless `op` says otherwise."""
        if self.distributed:
            dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
        return tensor

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all ranks."""
        return self.all_reduce(tensor.clone()) / self.world_size

    def gather_objects(self, obj: Any) -> list[Any]:
        """The objects of all ranks, in order of rank, on every rank."""
        if not self.distributed:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self._control)
        return gathered

    def broadcast_object(self, obj: Any) -> Any:
        """Return rank 0's object on every rank."""
        if not self.distributed:
            return obj
        box = [obj if self.is_main_process else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.distributed:
            self.gather_objects(None)

    def _group_for(self, module: nn.Module) -> Any:
        """A group that can send the tensors of a module: one of gloo for those on the host, else that of all ranks."""
        tensor = next(chain(module.parameters(), module.buffers()), None)
        return self._control if tensor is not None and tensor.is_cpu else None

    def share_state(self) -> None:
        """Start all replicas, and an average of the user's own, with the parameters and buffers of rank 0."""
        for module in (self.model, self.ema):
            if self.distributed and isinstance(module, nn.Module):
                broadcast_state(module, self._group_for(module))

    def share_buffers(self) -> None:
        """Give every rank the buffers of rank 0: each has updated its running statistics by itself since the last forward.

        DistributedDataParallel does so before the next one. This is for what reads them in between: an evaluation, or
        whoever looks at the model after training.
        """
        if self.distributed and self.config.ddp.broadcast_buffers:
            for module in (self.unwrap(self.model), self.ema):
                if isinstance(module, nn.Module):
                    broadcast_buffers(list(module.buffers()), self._group_for(module))

    def reduce_log(self, sums: list[float], longest: float) -> tuple[list[float], float]:
        """Sum numbers over all ranks and take the largest of another."""
        if not self.distributed:
            return sums, longest
        table = torch.zeros(self.world_size, len(sums) + 1, dtype=torch.float64)
        table[self.rank] = torch.tensor([*sums, longest], dtype=torch.float64)
        dist.all_reduce(table, group=self._control)
        return table[:, :-1].sum(0).tolist(), table[:, -1].max().item()

    def exchange_header(self, **facts: Any) -> WindowHeader:
        """Tell all ranks about the window in hand and about requests on this rank; the one collective of a window.

        Args:
            facts: see `send_header`.
        """
        self.window.settle()
        self.send_header(**facts)
        return self.receive_header()

    def send_header(
        self,
        *,
        weight: float = 0.0,
        samples: int = 0,
        tokens: int = 0,
        present: bool = False,
        left: bool = False,
        never: bool = False,
        abort: bool = False,
    ) -> None:
        """Begin to exchange what ranks know of a window, and requests; `receive_header` has the result.

        Args:
            weight: sum of the weights.
            samples: in the window.
            tokens: in the window.
            present: there is a micro-batch here.
            left: there is data beyond this window.
            never: there has been no batch in this epoch at all.
            abort: the window cannot be run, because of a stop.
        """
        supervisor = self.supervisor
        asked = _NO_REQUESTS
        if supervisor.pending:
            stop = supervisor.stop
            asked = stop == Stop.REQUEST, stop == Stop.SIGINT, stop == Stop.SIGTERM, supervisor.save_requested
        rank = self.rank if never else 0
        self._header.send((weight, samples, tokens, present, left, never, rank, abort, *asked))

    def receive_header(self) -> WindowHeader:
        """Wait for the header that was sent last, and take over the requests in it."""
        sums = self._header.receive()
        if sums[5:] == _NOTHING_ASKED:
            self.agreed = (False, False)
            return WindowHeader(sums[0], int(sums[1]), int(sums[2]), int(sums[3]), sums[4] > 0)
        save = sums[11] > 0
        stop = max((level for level, count in zip(_LEVELS, sums[8:11], strict=True) if count), default=Stop.NONE)
        if stop or save:
            self.supervisor.agree(stop, save)
        self.agreed = bool(stop), save
        never_rank = int(sums[6]) if sums[5] == 1 else -1
        return WindowHeader(
            sums[0], int(sums[1]), int(sums[2]), int(sums[3]), sums[4] > 0, int(sums[5]), never_rank,
            sums[7] > 0, stop, save,
        )  # fmt: skip

    @property
    def pending(self) -> bool:
        """Whether a stop or a save is asked for that all ranks know of."""
        if self._world[0] == 1:  # type: ignore[index]
            return self.supervisor.pending
        return any(self.agreed)

    def requests(self) -> tuple[bool, bool]:
        """Whether all ranks agree on a stop, and on a save."""
        return self.agreed if self.distributed else super().requests()


_HEADER_SIZE = 12
_LEVELS = (Stop.REQUEST, Stop.SIGINT, Stop.SIGTERM)
_NO_REQUESTS = (False, False, False, False)
_NOTHING_ASKED = [0.0] * (_HEADER_SIZE - 5)


def _destroy_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # ends their threads here, before a fork could inherit the groups without them


def _restore_hook(before: Any, of_torch: Any) -> None:
    """Give the hook for uncaught exceptions back, which torch replaces by one that says the rank."""
    if sys.excepthook is of_torch:
        sys.excepthook = before
