"""`AccelerateRunner`: the runner of plain PyTorch with an `accelerate.Accelerator` in the engine's place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from danling.backends.torch import TorchRunner
from danling.backends.torch.buckets import fix_buckets

from .settings import Settings, launch_environment, read_settings
from .sharding import Sharding
from .step import AcceleratedStep

_PATCHED = ("forward", "_original_forward", "_is_accelerate_prepared")  # what `prepare` leaves on a module


class AccelerateRunner(Sharding, TorchRunner):
    """The engine for those whose launch and configuration are Accelerate's.

    One `accelerate.Accelerator`, made from the section `accelerate` of the configuration and from the environment that
    `accelerate launch` sets, prepares model and optimizer, and does autocast, backward, clipping, updates and
    collectives. Loaders, sampling, schedules, windows, checkpoints and the loop are danling's, so the guarantees are
    those of the torch stack, and full checkpoints go both ways between the two.

    With an FSDP2 plugin each rank holds a part of every weight, and checkpoints are sharded. Claims every guarantee.
    FSDP1, DeepSpeed and Megatron plugins are refused.

    Attributes:
        accelerator: the Accelerator.
    """

    stack: ClassVar[str | None] = "accelerate"
    guarantees: ClassVar[frozenset[int]] = frozenset(range(1, 12))
    axes: ClassVar[frozenset[str]] = frozenset()
    fused: ClassVar[frozenset[str]] = frozenset({"forward_context", "backpropagate"})
    features: ClassVar[frozenset[str]] = frozenset({"dcp"})
    conformance: ClassVar[dict[str, Any]] = {"bitwise": True}

    accelerator: Accelerator
    settings: Settings

    # Construction

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour.

        Raises:
            ConfigError: naming the key.
            RuntimeError: Accelerate's process-wide state was made by somebody else.
        """
        self.settings = read_settings(self.config)
        super().check_config()
        self.check_sharding()
        if AcceleratorState._shared_state or PartialState._shared_state:
            raise RuntimeError(
                "an Accelerator (or a PartialState) exists already in this process; danling makes its own from the "
                "section `accelerate`, in runner.accelerator: close the runner that made it, or leave yours out"
            )

    def choose_device(self) -> torch.device:
        """What configuration or environment of Accelerate say, else the accelerator of this rank, or the CPU."""
        return self.settings.device or super().choose_device()

    def init_distributed(self) -> None:
        """Make the group as the torch stack does, then the Accelerator.

        Raises:
            RuntimeError: somebody else has made a process group already.
        """
        super().init_distributed()
        self._closing("accelerator", self._release)
        with launch_environment(self.world_size):
            self.accelerator = Accelerator(**self.settings.arguments, cpu=self.device.type == "cpu")
        self.enable_fsdp()

    def _release(self) -> None:
        """Give the process-wide state of Accelerate back, and the module as it was."""
        if (module := self.unwrap(self.__dict__.get("model"))) is not None:
            for name in set(_PATCHED) & set(vars(module)) - self.__dict__.get("_patched_before", set()):
                delattr(module, name)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    @property
    def precision_name(self) -> str | None:
        """The precision said by `precision`, by the section `accelerate` or by the environment."""
        return self.settings.precision

    def wrap_model(self) -> None:
        """Let the Accelerator prepare the model; one without anything to train stays as it is."""
        parameters = list(self.model.parameters())
        self._patched_before = set(vars(self.unwrap(self.model)))
        if self.is_sharded and parameters:
            self.shard_model()
        elif any(parameter.requires_grad for parameter in parameters):
            self.model = self.accelerator.prepare(self.model)
            if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
                fix_buckets(self.model)

    def build_optimizer(self) -> None:
        """Build the optimizer unless one is bound, and let the Accelerator prepare it."""
        super().build_optimizer()
        if self.optimizer is not None:
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

    def bind_updater(self) -> None:
        """Bind the one sequence of an update; the gradient scaler is the Accelerator's."""
        self.grad_scaler = self.accelerator.scaler
        self.updater = self.optimizer and AcceleratedStep(
            self.accelerator,
            self.optimizer,
            self.scheduler,
            interval="step" if self.scheduler_interval == "step" else "epoch",
            clip_value=self.max_grad_value,
            clip_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite_grad,
            reduce_flag=partial(self.all_reduce, op=dist.ReduceOp.MAX) if self.is_sharded else None,
        )

    # Steps

    def forward_context(self) -> AbstractContextManager:
        """Encloses forward and loss: the Accelerator's autocast, which ends with the runner."""
        if self.precision.dtype is None or self._closed:
            return super().forward_context()
        return self.accelerator.autocast()

    def no_sync(self) -> AbstractContextManager:
        """A context in which gradients of replicas are not averaged."""
        return self.accelerator.no_sync(self.model)

    def backpropagate(self, loss: Tensor) -> None:
        """Backpropagate a loss that has its factor, scaled for fp16."""
        self.accelerator.backward(loss)

    # Collectives

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        """Reduce a tensor over all ranks, in place; the sum unless `op` says otherwise."""
        if op is None or op == dist.ReduceOp.SUM:
            return tensor.copy_(self.accelerator.reduce(tensor, "sum")) if self.distributed else tensor
        return super().all_reduce(tensor, op)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all ranks."""
        return self.accelerator.reduce(tensor, "mean") if self.distributed else tensor.clone()

    def gather_objects(self, obj: Any) -> list[Any]:
        """The objects of all ranks, in order of rank, on every rank."""
        return gather_object([obj]) if self.distributed else [obj]
