"""What an engine supplies: devices, ranks, wrapping, passes, steps. Here, one process and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .supervisor import Stop

_Host: Any = object  # part of BaseRunner: what is used here and not defined here is the runner's


class Surface(_Host):
    """The methods and properties that engines override."""

    @property
    def device(self) -> Any:
        """Where the model is."""
        return None

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return 1

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return 0

    @property
    def data_degree(self) -> int:
        """Ranks that read different data."""
        return self.world_size

    @property
    def data_rank(self) -> int:
        """Number of this rank among those that read different data."""
        return self.rank

    @property
    def replica_groups(self) -> int:
        """Groups of processes that train the same model, each with a launcher of its own."""
        return self.config.ft.group_size if self.config.ft.enabled else 1

    @property
    def loss_degree(self) -> int:
        """Ranks whose losses are averaged: those that read different data, or parts of the same samples."""
        return self.data_degree

    @property
    def distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_rank == 0

    def describe_devices(self) -> str:
        """Devices and world, for the start summary."""
        return f"{self.device} × {self.world_size}"

    def describe_engine(self) -> dict[str, str]:
        """What the start summary should say of the engine."""
        return {}

    def describe_environment(self) -> dict[str, Any]:
        """What `metadata` should say about devices and hosts."""
        return {}

    def broadcast_object(self, obj: Any) -> Any:
        """Return rank 0's object on every rank."""
        return self.coordinator.broadcast_object(obj)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.coordinator.barrier()

    def build_dataloaders(self) -> None:
        """Build a loader for every split in `datasets` that has none."""

    def setup_fp8(self) -> None:
        """Prepare 8-bit training when asked for."""

    def materialize_model(self) -> None:
        """Bring the model to its device in its final form."""

    def build_optimizer(self) -> None:
        """Build the optimizer from the configuration unless one is bound."""

    def build_scheduler(self) -> None:
        """Build the scheduler from the configuration unless one is bound."""

    def init_engine(self) -> None:
        """For engines that wrap model and optimizer together."""

    def open_pass(self, split: str) -> Any:
        """A context that yields windows of a train split from its position on."""
        raise NotImplementedError(f"{type(self).__name__} has no engine: subclass danling.runners.Runner")

    def pass_length(self, split: str) -> int | None:
        """Micro-batches of one pass over a train split on this rank; None when unknown."""
        loader = self.dataloaders.get(split)
        try:
            return len(loader) if loader is not None else None
        except TypeError:
            return None

    def split_size(self, split: str) -> int | None:
        """Samples in a split, None when unknown."""
        for source in (self.datasets, self.dataloaders):
            if split in source:
                try:
                    return len(source[split])
                except TypeError:
                    return None
        return None

    def train_step(self, data: Any) -> tuple[Any, Any]:
        """Train on one micro-batch; return the prediction and the loss."""
        raise NotImplementedError

    def shortcut(self, data: Any) -> Callable[[float, Any], bool | None] | None:
        """What trains window after window without the loop, or None where the loop has to call every hook itself.

        Args:
            data: the pass, after its first window.

        Returns:
            A function of the update to stop at and of the progress bar (or None). It stops at the latest there, at the
            last window of the pass, and where a request is pending, and returns whether the last window was applied; or
            None if the next window is not for it, or there is none.
        """
        return None

    def evaluate_epoch(self, split: str) -> dict[str, Any]:
        """Evaluate one split; return its metrics."""
        raise NotImplementedError

    def read_training(self, split: str, *, reset: bool) -> dict[str, Any]:
        """Metrics of the training since the last reset, over all ranks."""
        raise NotImplementedError

    def log_training(self) -> None:
        """Report a log point."""
        raise NotImplementedError

    def step_schedulers(self, *, epoch_ended: bool, evaluated: Mapping[str, Any] | None) -> None:
        """Move schedulers that follow epochs or evaluations."""

    @property
    def pending(self) -> bool:
        """Whether a stop or a save is asked for that the boundary in hand has to serve."""
        return self.supervisor.pending

    def requests(self) -> tuple[bool, bool]:
        """Whether all ranks agree on a stop, and on a save."""
        supervisor = self.supervisor
        return supervisor.stop is not Stop.NONE, supervisor.save_requested
