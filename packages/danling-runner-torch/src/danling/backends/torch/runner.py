"""`TorchRunner`: one process, or several with DistributedDataParallel."""

from __future__ import annotations

import socket
from typing import Any, ClassVar

import torch

from danling.metrics import AverageMeters
from danling.runners.base_runner import BaseRunner

from .building import Building
from .distributed import Distributed
from .evaluation import Evaluation
from .replicas import Replicas
from .restoring import Restoring
from .training import MUTED, Training
from .window import Window
from .workers import stop_workers


class TorchRunner(Replicas, Training, Evaluation, Building, Restoring, Distributed, BaseRunner):
    """The engine of plain PyTorch.

    One process runs on the accelerator of its rank, or on the CPU; several, under `torchrun`, train one model with
    DistributedDataParallel. Claims every guarantee.

    Attributes:
        fused: hooks that an engine overrides so that training in float32, a micro-batch per update, may pass over them
            (contexts), or call them without what is around them (`forward`, `backpropagate`). It holds for the class that
            defines it alone.
    """

    stack: ClassVar[str | None] = "torch"
    guarantees: ClassVar[frozenset[int]] = frozenset(range(1, 12))
    features: ClassVar[frozenset[str]] = frozenset({"dcp", "ft"})
    fused: ClassVar[frozenset[str]] = frozenset()
    conformance: ClassVar[dict[str, Any]] = {"bitwise": True}

    @staticmethod
    def summary_writer(directory: str, purge_step: int | None = None) -> Any:
        """TensorBoard's writer: torch's own, which takes images, histograms and graphs too."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(directory, purge_step=purge_step)

    def __init__(self, config: Any = None) -> None:
        self.window = Window()
        self.weigh: Any = None
        self.weigh_evaluation: Any = None
        self._first_update = True
        self.updater: Any = None
        self.grad_scaler: Any = None
        self.grad_norm: Any = None
        self.scheduler_interval = "step"
        self._ema_schedule: Any = None
        self._buffers: Any = None
        self._log_mark: tuple[float, float] | None = None
        self._loader_states: dict[str, Any] = {}
        super().__init__(config)
        self._meters = {mode: AverageMeters(distributed=self.distributed) for mode in (True, False)}
        self.init_precision()
        self.init_profiler()
        self.start_clock()

    def shares_payload(self, stack: str) -> bool:
        """Whether full checkpoints of another stack can be resumed here."""
        return {self.stack, stack} <= {"torch", "accelerate"}

    def describe_devices(self) -> str:
        """Devices and world, for the start summary."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.device}"
        return f"{name} × {self.world_size}" + (f" ({torch.get_num_threads()} threads)" if name == "cpu" else "")

    def describe_environment(self) -> dict[str, Any]:
        """Devices and hosts, for the metadata of the attempt."""
        return {"device": self.describe_devices(), "host": socket.gethostname(), "torch": torch.__version__}

    @property
    def train_metrics(self) -> Any:
        """Metrics of training; silent while a batch is run that counts for nothing."""
        window = self.window
        return MUTED if window.fillers <= window.index < len(window.batches) else self._train_metrics

    @train_metrics.setter
    def train_metrics(self, metrics: Any) -> None:
        self._train_metrics = metrics

    def close_loaders(self) -> None:
        """Stop the workers of the loaders."""
        for loader in self.__dict__.get("dataloaders", {}).values():  # none yet when a construction fails early
            stop_workers(loader)
