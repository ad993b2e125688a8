"""A model that Accelerate's FSDP2 plugin spreads over the ranks: each holds a part of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from danling.backends.torch.averaging import ShardedEMA
from danling.backends.torch.export import cast_floating
from danling.backends.torch.local import Buffers, live_state
from danling.runners.errors import ConfigError
from danling.runners.state import RunnerMode

_Host: Any = object  # part of AccelerateRunner: what is used here and not defined here is the runner's


class Sharding(_Host):
    """The part of `AccelerateRunner` that is about an FSDP2 plugin; without one, nothing here does anything."""

    fused: ClassVar[frozenset[str]] = frozenset({"train_context"})

    model: Any
    ema: Any
    optimizer: Any

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over the ranks."""
        return self.settings.fsdp is not None and self.world_size > 1

    def check_sharding(self) -> None:
        """Refuse what split weights rule out.

        Raises:
            ConfigError: naming the key.
        """
        if self.is_sharded and self.config.checkpoint.backend == "file":
            raise ConfigError(
                "checkpoint.backend: 'file' cannot hold the parts that an FSDP2 plugin leaves each rank with; leave it at "
                "auto, or use dcp"
            )

    def enable_fsdp(self) -> None:
        """Let the Accelerator shard on a CPU too, where it would pass over its plugin: the same code runs over gloo."""
        state, plugin = self.accelerator.state, self.settings.fsdp
        if self.is_sharded and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no device to pin memory for
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)

    # Model

    def shard_model(self) -> None:
        """Let the Accelerator spread the model over the ranks, which hold the same weights.

        Raises:
            ConfigError: the plugin does not fit the model, or something that is trained stays whole, with nobody who would
                keep it in step.
        """
        bound = self.optimizer
        # Model and optimizer are prepared together or not at all.
        stand_in = torch.optim.SGD(self.model.parameters(), lr=0.0)
        try:
            self.model, optimizer = self.accelerator.prepare(self.model, stand_in if bound is None else bound)
        except ValueError as error:
            raise ConfigError(f"accelerate.fsdp_plugin: {error}") from error
        if bound is None:
            self.accelerator._optimizers.remove(optimizer)
        else:
            self.optimizer = optimizer
        whole = [name for name, value in self.iter_optimizer_named_parameters() if not hasattr(value, "placements")]
        if whole:
            raise ConfigError(
                f"accelerate.fsdp_plugin: {', '.join(whole[:8])} would be trained on every rank by itself: take its module out "
                "of ignored_modules, or freeze it"
            )
        self.meets_in_forward = self.meets_in_backward = True  # FSDP2 gathers weights in both
        self._buffers_in_step = Buffers.of([self.model], torch.distributed.group.WORLD)
        self._bind_ema()

    def _units(self) -> Iterator[FSDPModule]:
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _bind_ema(self) -> None:
        """Bind the average of the parts, once there are any."""
        if self.is_sharded and (self.ema is not None or self.config.ema.enabled):
            if not isinstance(self.model, FSDPModule):
                return
            if self.ema is not None:
                raise ConfigError(
                    "an FSDP2 plugin splits the weights, which an average of your own cannot follow: set ema.enabled instead"
                )
            self.ema = ShardedEMA(self.local_parts(), self.config.ema.decay)
        super()._bind_ema()

    @property
    def uses_dcp(self) -> bool:
        """Whether checkpoints are sharded."""
        return self.is_sharded or super().uses_dcp

    # Steps

    def train_context(self) -> AbstractContextManager:
        """Encloses forward and loss of a training step: precision, and no synchronisation inside a window."""
        if not self.is_sharded:
            return super().train_context()
        # FSDP2 looks at it in the backward pass, which comes after this context.
        self.model.set_requires_gradient_sync(self.window.is_last)
        return self.forward_context()

    def backward_nothing(self, loss: Tensor) -> None:
        """Backpropagate exact zeros, so that ranks that wait for weights and gradients get them."""
        if self.is_sharded:
            torch.nan_to_num(loss, 0.0, 0.0, 0.0).mul(0).backward()
        else:
            super().backward_nothing(loss)

    def share_buffers(self) -> None:
        """Give every rank the buffers of rank 0, where not every update does."""
        if not self.is_sharded:
            super().share_buffers()

    # Evaluation

    def without_gradients(self) -> AbstractContextManager:
        """Encloses evaluation and inference. FSDP2 gathers weights to the memory that training uses, if it comes later."""
        return torch.no_grad() if self.is_sharded else super().without_gradients()

    @property
    def _averages(self) -> ShardedEMA | None:
        return self.ema if isinstance(self.ema, ShardedEMA) and self._ema_ready else None

    @property
    def evaluation_model(self) -> Any:
        """What evaluation and inference run: a split model holds the weights of its EMA meanwhile."""
        return self.unwrap(self.model) if isinstance(self.ema, ShardedEMA) else super().evaluation_model

    @contextmanager
    def _aside(self, mode: RunnerMode, split: str) -> Iterator[None]:
        with ExitStack() as stack:
            if self._averages is not None:
                stack.enter_context(self._averages.swapped())
            stack.enter_context(super()._aside(mode, split))
            yield

    # Checkpoints

    def local_parts(self) -> list[Any]:
        """The user's module, with its parameters in their split form."""
        for unit in self._units():
            unit.reshard()
        return super().local_parts()

    def ema_tensors(self) -> dict[str, Any] | None:
        """The tensors of the average on this rank."""
        return self.ema.averages if isinstance(self.ema, ShardedEMA) else super().ema_tensors()

    def export_state(self, dtype: str | None = None, ema: bool = True) -> dict[str, Any]:
        """Whole weights, those of the EMA when there is one, floating tensors cast.

        Of split weights every rank calls it, and the main process gets them.
        """
        if not self.is_sharded:
            return super().export_state(dtype, ema)
        averages = self._averages if ema else None
        tensors = live_state(self.local_parts()) if averages is None else averages.averages
        whole = {}
        for name, value in tensors.items():
            value = value.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            if self.is_main_process:
                whole[name] = value.cpu()
        return cast_floating(whole, dtype)

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Load the optimizer, by parameter name; whole state, as a run without a plugin saves it, is split."""
        if self.is_sharded and "tensors" not in state:
            parameters = dict(self.iter_optimizer_named_parameters())
            state = {
                **state,
                "state": {name: _split(parameters.get(name), own) for name, own in state["state"].items()},
            }
        super().load_optimizer(state)


def _split(parameter: nn.Parameter | None, state: Mapping[str, Any]) -> dict[str, Any]:
    """State of an optimizer for one parameter, with this rank's part of what has the shape of the parameter."""
    from danling.backends.torch.dcp import assign

    split = dict(state)
    for key, value in state.items():
        if parameter is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
            split[key] = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
            assign(split[key], value)
    return split
