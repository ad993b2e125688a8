"""Replica groups that may come and go: a manager of TorchFT, and what a window, a save and a return mean with it.

Every replica group is a run of its own launcher with a `WORLD_SIZE` of its own. Before each window the groups that are healthy
form a quorum; the window is weighed over all of them, gradients are averaged within a group and then across groups, and an
update is applied only where the group votes to commit it. A window that is refused is run again, with the groups that are left.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .healing import shared_state, take_state
from .local import local_tensor
from .positions import Positions

if TYPE_CHECKING:
    from .distributed import WindowHeader

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
MAX_REFUSALS = 10


def require_torchft() -> None:
    """Refuse, before anything is built, what replica groups cannot do without.

    Raises:
        ImportError: TorchFT is not installed.
        RuntimeError: no lighthouse is named.
    """
    if importlib.util.find_spec("torchft") is None:
        raise ImportError("ft.enabled needs TorchFT: pip install torchft-nightly", name="torchft")
    if not os.environ.get(LIGHTHOUSE):
        raise RuntimeError(
            f"ft.enabled needs a lighthouse: start one (torchft_lighthouse --min_replicas 1 --bind [::]:29510) and set "
            f"{LIGHTHOUSE} to its address (http://host:29510) for every replica group"
        )


class FaultTolerance:
    """The manager of this replica group, and the group of the ranks that share a place in all replica groups.

    Args:
        runner: whose `ft` section is in force.

    Attributes:
        manager: of TorchFT.
        group: the managed process group: its collectives never raise, an error makes the window be refused.
        positions: where this group is in its share of the data, on disk.
    """

    def __init__(self, runner: Any) -> None:
        from torchft import Manager, ProcessGroupGloo
        from torchft.checkpointing import HTTPTransport
        from torchft.process_group import ManagedProcessGroup, ProcessGroupNCCL

        options = runner.config.ft
        self.runner, self.options = runner, options
        self.timeout = timedelta(milliseconds=options.process_group_timeout_ms)
        self.patience = 3 * self.timeout  # for a quorum: others may have to wait a lost collective out first
        host, port = self._open_store()
        kind = ProcessGroupNCCL if options.process_group == "nccl" else ProcessGroupGloo
        self._transport_group = kind(timeout=self.timeout)
        self._transport: Any = HTTPTransport(timeout=self.timeout, num_chunks=0)
        self.manager = Manager(
            pg=self._transport_group,
            load_state_dict=self._heal,
            state_dict=self._state,
            min_replica_size=options.min_replica_size,
            use_async_quorum=False,  # a group that was behind is healed before it computes anything
            init_sync=False,  # it would give each rank of a group the weights of another one
            timeout=self.timeout,
            quorum_timeout=self.patience,
            connect_timeout=self.timeout,
            rank=runner.rank,
            world_size=runner.world_size,
            store_addr=host,
            store_port=port,
            hostname=host,
            replica_id=f"{runner.name}_{options.replica_id:05d}",
            checkpoint_transport=self._transport,
        )
        self.group = ManagedProcessGroup(self.manager)
        checkpoint = runner.config.checkpoint
        self.positions: Positions | None = None
        if checkpoint.enable_ft_dataloader_checkpoints:
            replica = checkpoint.ft_replica_id or os.environ.get("FT_REPLICA_ID") or str(options.replica_id)
            folder = Path(runner.checkpoint_dir) / f"{checkpoint.ft_dataloader_checkpoint_prefix}-{replica}"
            self.positions = Positions(folder, runner.rank)
        self._joined = False
        self._formed = False  # whether there is a quorum that no window has used
        self._healed = False  # whether this group has taken the state of another one since it was last asked
        self._refusals = 0

    def _open_store(self) -> tuple[str, int]:
        """A store for the manager of this group alone, so that a restarted group finds nothing of the one before."""
        runner = self.runner
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        self._store: Any = None
        if runner.is_main_process:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
        address: tuple[str, int] = runner.broadcast_object(
            (host, self._store.port) if self._store is not None else None
        )
        return address

    # What the groups are

    @property
    def replica_id(self) -> int:
        """Number of this group."""
        return self.options.replica_id

    @property
    def group_size(self) -> int:
        """Groups that the data is dealt to, present or not."""
        return self.options.group_size

    @property
    def participants(self) -> int:
        """Groups in the quorum."""
        return self.manager.num_participants()

    @property
    def leads(self) -> bool:
        """Whether this group writes the checkpoints: it is the first of the quorum."""
        return self.manager.participating_rank() == 0

    # Quorum

    def join(self) -> None:
        """Form the first quorum: groups become equal, whatever their seeds, and a returning one catches up.

        Raises:
            RuntimeError: there were not enough healthy groups until the time-out.
        """
        if self._joined:
            return
        self._joined = True
        state = self.runner.train_state
        self.manager.load_state_dict({"step": state.global_step + state.skipped, "batches_committed": 0})
        seconds = self.runner.config.comm.init_timeout_seconds
        epoch, positions = state.epoch, state.positions
        self._form_quorum(max(self.patience, timedelta(seconds=seconds or 0)))
        self._formed = True
        if self._was_healed():
            self._find_position(epoch, positions)
        elif self.leads:
            self.runner.checkpoint_manager.repair()  # no group was ahead: nobody is in the middle of a save

    def _form_quorum(self, timeout: timedelta) -> None:
        """Wait until enough groups are healthy, and take the state of one that is ahead."""
        deadline = time.monotonic() + timeout.total_seconds()
        manager, least = self.manager, self.options.min_replica_size
        while True:
            cause: BaseException | None = None
            left = max(0.1, deadline - time.monotonic())
            try:
                manager.start_quorum(timeout=timedelta(seconds=left))
                found = manager.num_participants()
                failed = manager.errored()
                if failed is None and found >= least and (manager.current_step() or self._equalise()):
                    return
                cause = failed
            except (TimeoutError, RuntimeError) as error:
                found, cause = 0, error
                manager._quorum_future = None  # its error has been seen; the next quorum would raise it again
            if time.monotonic() >= deadline or left <= 0.1:
                raise RuntimeError(
                    f"no quorum within {timeout.total_seconds():g} s: a step needs ft.min_replica_size = {least} healthy "
                    f"replica groups of {self.group_size}, {found or 'none'} answered; look at the other groups and at the "
                    f"lighthouse {os.environ.get(LIGHTHOUSE)}, or raise ft.process_group_timeout_ms"
                ) from cause
            time.sleep(0.1)

    # Windows

    def open_window(self, facts: Mapping[str, Any]) -> WindowHeader:
        """Form a quorum and weigh a window over all groups in it.

        Args:
            facts: what this rank knows of the window; see `exchange_header`.

        Raises:
            RuntimeError: no quorum, or ten refusals in a row.
        """
        runner = self.runner
        while True:
            if not self._formed:
                epoch = runner.train_state.epoch
                self._form_quorum(self.patience)
                if self._was_healed():
                    self._require_same_epoch(epoch)
            self._formed = False
            header: WindowHeader = runner.exchange_header(**facts)
            if header.abort:
                return header
            mine = [header.weight, header.samples, header.tokens, header.present, header.left]
            sums = self._sum(torch.tensor(mine, dtype=torch.float64, device=runner.device))
            if sums is not None:
                weight, samples, tokens, present, left = sums
                return header._replace(
                    weight=weight, samples=int(samples), tokens=int(tokens), present=int(present), left=left > 0
                )
            self.manager.should_commit()  # the vote of a rank that has seen an error is no
            self._refuse()

    def _sum(self, values: Tensor) -> list[float] | None:
        """Sum numbers over the groups; None, on all ranks of this one, when that failed on any."""
        self.manager.allreduce(values, reduce_op=dist.ReduceOp.SUM).wait()
        return values.tolist() if self._all_well() else None

    def _all_well(self) -> bool:
        """Whether no rank of this group has seen an error since the quorum was formed."""
        failed = torch.tensor(float(self.manager.errored() is not None), device=self.runner.device)
        return not self.runner.all_reduce(failed)

    def commit(self) -> bool:
        """Average the gradients over the groups and vote; whether the update is to be applied."""
        self._average_gradients()
        if self.manager.should_commit():
            self._refusals = 0
            return True
        self._refuse()
        return False

    def _average_gradients(self) -> None:
        buckets: dict[torch.dtype, list[Tensor]] = {}
        for _, parameter in self.runner.iter_optimizer_named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # another group may have one
            gradient = local_tensor(parameter.grad)
            buckets.setdefault(gradient.dtype, []).append(gradient)
        for gradients in buckets.values():
            bucket = torch.cat([gradient.flatten() for gradient in gradients])
            self.manager.allreduce(bucket).wait()
            means = bucket.split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def _refuse(self) -> None:
        self._refusals += 1
        runner = self.runner
        runner.logger.warning(
            "the window after step %d was refused (%d in a row) and is run again: %s",
            runner.global_step,
            self._refusals,
            self._error() or "another rank or group has seen an error",
        )
        if self._refusals >= MAX_REFUSALS:
            raise RuntimeError(
                f"{MAX_REFUSALS} windows in a row were refused; the last error: {self._error()}. "
                "Look at the network between the replica groups, and at ft.process_group_timeout_ms"
            )

    def _error(self) -> str | None:
        """What this rank has seen go wrong since the quorum was formed."""
        error = self.manager.errored()
        if error is None:
            return None
        cause = getattr(error, "original_exception", error)
        return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"

    # Healing

    def _state(self) -> dict[str, Any]:
        return shared_state(self.runner)

    def _heal(self, state: Any) -> None:
        """Take the state of another group; random states and the position in the data stay this group's own."""
        take_state(self.runner, state)
        self._take_seed(state["seed"])
        self._healed = True
        self.runner.logger.info("took the state of another replica group at step %d", self.runner.global_step)

    def _was_healed(self) -> bool:
        """Whether any rank of this group has taken the state of another group since this was last asked."""
        flag = torch.tensor(float(self._healed), device=self.runner.device)
        self._healed = False
        return bool(self.runner.all_reduce(flag))

    def _equalise(self) -> bool:
        """Before the first update: give all groups the weights and the seed of the first; whether that went well."""
        runner = self.runner
        seed = torch.tensor([runner.rng_state.seed], dtype=torch.float64, device=runner.device)
        tensors = [*runner.model_tensors().values(), *(runner.ema_tensors() or {}).values()]
        with torch.no_grad():
            for tensor in (seed, *map(local_tensor, tensors)):
                number = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
                whole = number.clone() if self.leads else torch.zeros_like(number)
                self.manager.allreduce(whole, reduce_op=dist.ReduceOp.SUM).wait()
                if not self._all_well():
                    return False
                tensor.copy_(whole)
        self._take_seed(int(seed))
        return True

    def _take_seed(self, seed: int) -> None:
        """Let the training splits be dealt in the order of another group's seed."""
        runner = self.runner
        runner.rng_state.seed = seed
        for split in runner.train_splits:
            if (sampler := runner.datasamplers.get(split)) is not None:
                sampler.seed = seed

    def _find_position(self, epoch: int, positions: dict[str, Any]) -> None:
        """After a return: go on in this group's share of the epoch where its own file says, else start the share anew."""
        state = self.runner.train_state
        found = self.positions.newest() if self.positions is not None else None
        state.positions = {}
        if found is not None and found["epoch"] == state.epoch:
            self.restore_position(found)
            self.runner.logger.info("this group goes on in its share of epoch %d where it was", state.epoch + 1)
        elif state.global_step:
            why = "it has no position of this epoch" if self.positions is not None else (
                "checkpoint.enable_ft_dataloader_checkpoints is off"
            )  # fmt: skip
            self.runner.logger.warning("this group starts its share of epoch %d anew: %s", state.epoch + 1, why)

    def _require_same_epoch(self, epoch: int) -> None:
        if self.runner.train_state.epoch != epoch:
            raise RuntimeError(
                "this replica group fell behind at the end of an epoch, which the others have left; start it again, and it "
                "catches up"
            )

    # Positions

    def position(self) -> dict[str, Any]:
        """Where this rank is in its share of the data, with its random states."""
        runner = self.runner
        state = runner.train_state
        own = runner.rank_state()
        return {
            "epoch": state.epoch,
            "global_step": state.global_step,
            "positions": state.positions,
            "dataloaders": own["dataloaders"],
            "rng": own["rng"],
        }

    def restore_position(self, found: Mapping[str, Any]) -> None:
        """Go to a position that was saved."""
        runner = self.runner
        runner.train_state.positions = dict(found["positions"])
        runner.load_dataloaders(found["dataloaders"])
        runner.load_rng(found["rng"])

    def close(self) -> None:
        """Leave the quorum and give everything back."""
        self.manager.shutdown(wait=False)
        if (server := getattr(self._transport, "_server", None)) is not None:
            server.server_close()  # which the transport's own shutdown leaves open
        self._transport_group.shutdown()
        self._store = None
