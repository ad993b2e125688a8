"""`ParallelRunner`: one model over many ranks, along several axes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling.backends.torch import TorchRunner
from danling.backends.torch.averaging import ShardedEMA
from danling.backends.torch.compiling import compile_model, load_artifacts, save_artifacts
from danling.backends.torch.fp8 import convert_to_fp8
from danling.backends.torch.local import Buffers, broadcast_state
from danling.backends.torch.payload import clean_name
from danling.runners.errors import ConfigError
from danling.runners.state import RunnerMode

from .checkpoints import Checkpoints
from .checks import check_replicas, materialize_meta
from .context import ParallelContext
from .parallelize import parallelize_part, share_axes
from .pipelining import Pipelining
from .sharding import data_mesh, shard_model, sharded_modules
from .topology import AXES, ParallelTopology


class ParallelRunner(Checkpoints, Pipelining, TorchRunner):
    """The engine for models that are replicated, sharded, cut into stages or split inside their layers.

    `parallel.axes` lays the ranks out. `replicate` and `shard` are DistributedDataParallel and FSDP2; `tensor` and
    `context` have built-in plans for torch's transformer layers; `pipeline` runs torch's schedules; everything else, the
    expert axes among it, is done by the model's own `parallelize(ctx)`. An axis that nothing keeps in step is an error.
    Checkpoints are sharded, and can be resumed with other `replicate`, `shard` and `context` degrees.

    Claims every guarantee.

    Attributes:
        topology: degrees of the axes and the place of this rank.
        parallel: meshes, groups and collectives of the axes.
        model_parts: what this rank holds of the model: one module, or several stages.
        pipeline: the stages of this rank and the schedule that drives them, None without a pipeline.
    """

    stack: ClassVar[str | None] = "parallel"
    guarantees: ClassVar[frozenset[int]] = frozenset(range(1, 12))
    axes: ClassVar[frozenset[str]] = frozenset(AXES)
    features: ClassVar[frozenset[str]] = frozenset({"dcp", "fsdp", "ft"})
    fused: ClassVar[frozenset[str]] = frozenset({"to_device", "train_context", "send_header"})
    conformance: ClassVar[dict[str, Any]] = {"bitwise": True}

    topology: ParallelTopology
    parallel: ParallelContext
    model_parts: list[Any]
    _data_mesh: Any = None
    _synchronises = True

    # Construction

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour.

        Raises:
            RuntimeError: there is only one process.
            ConfigError: the axes do not fit the number of processes, or another key cannot be honoured.
        """
        super().check_config()
        if self.world_size == 1:
            raise RuntimeError(
                "the parallel stack needs several processes, and WORLD_SIZE is 1: start it with torchrun "
                "(torchrun --nproc-per-node 4 train.py ...), or use the torch stack"
            )
        if self.config.checkpoint.backend == "file":
            raise ConfigError("checkpoint.backend: 'file' cannot hold sharded state; leave it at auto, or use dcp")
        self.model_parts = []
        self.topology = self.build_topology()
        degrees = self.topology.degrees
        if self.config.ft.enabled and (
            others := [axis for axis in AXES if axis not in ("replicate", "shard") and degrees[axis] > 1]
        ):
            raise ConfigError(
                f"ft.enabled: replica groups go with the axes replicate and shard alone, and parallel.axes.{others[0]} is "
                f"{degrees[others[0]]}; leave it at 1, or ft.enabled off"
            )

    def build_topology(self) -> ParallelTopology:
        """The layout of the ranks over the axes; the default reads `parallel.axes`.

        Raises:
            ConfigError: the degrees do not fit the number of processes.
        """
        return ParallelTopology(dict(self.config.parallel.axes), self.world_size, self.rank)

    def init_distributed(self) -> None:
        """Make the group as the torch stack does, then the meshes of all axes."""
        super().init_distributed()
        self.parallel = ParallelContext(self.topology, self.device.type)
        comm = self.config.comm
        self._set_timeouts(comm.init_timeout_seconds or comm.train_timeout_seconds)

    @property
    def device_mesh(self) -> Any:
        """The mesh of all axes."""
        return self.parallel.mesh

    @cached_property
    def data_degree(self) -> int:
        """Ranks that read different data."""
        return self.topology.degree("data")

    @cached_property
    def data_rank(self) -> int:
        """Number of this rank among those that read different data."""
        return self.topology.index("data")

    @cached_property
    def loss_degree(self) -> int:
        """Ranks whose losses, on parts of a batch, are averaged."""
        return self.topology.degree("loss")

    def describe_devices(self) -> str:
        """Devices, world and layout, for the start summary."""
        return f"{super().describe_devices()}, {self.topology.describe()}"

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed Python, NumPy, torch and the device.

        Without a bias, ranks differ by their place in the `loss` domain and by stage; ranks that differ only in tensor or
        expert coordinates hold the same activations and draw the same numbers.
        """
        if bias is None:
            topology = self.topology
            bias = topology.index("loss") + topology.degree("loss") * topology.coordinates["pipeline"]
            if self.config.ft.enabled:
                bias += self.config.ft.replica_id * self.world_size
        return super().set_seed(seed, bias)

    # Model

    def setup_fp8(self) -> None:
        """Nothing yet: layers are replaced after the model is split."""

    def materialize_model(self) -> None:
        """From the user's module to what trains on this rank.

        Order: stages, device, plans of the layers, 8-bit layers, activation checkpointing, compile, FSDP2 or DDP,
        schedule, EMA.

        Raises:
            ValueError: neither a model nor parts of one were assigned.
            ConfigError: an axis is in use that nothing keeps in step.
        """
        config = self.config
        if config.compile.enable:
            load_artifacts(config.compile.precompile_artifact_dir)
            self._closing("compile", lambda: save_artifacts(config.compile.precompile_artifact_dir))
        before = {} if self.optimizer is None else self._names_by_parameter()
        parts = self.build_pipeline_model_parts()
        self.model_parts = [self._materialize_part(part) for part in parts]
        self.model = self.model_parts[0]
        share_axes(self.parallel)
        self._wrap_data_parallel()
        if self.optimizer is not None:
            rebind(self.optimizer, before, dict(self.iter_optimizer_named_parameters()))
        self.pipeline = self.build_pipeline_schedule()
        if self.pipeline is not None:
            self.parallel.took("pipeline")
        self.parallel.require()
        self.check_replicas("at the start")
        if self.loss_degree > 1:
            self._buffers_in_step = Buffers.of(self.local_parts(), self.parallel.group("loss"))
        self._bind_ema()
        self.bind_criterion()
        self._bind_metrics()
        self.mode = RunnerMode.TRAIN

    def _names_by_parameter(self) -> dict[int, str]:
        """Names of the parameters that an optimizer of the user may hold, before they are split."""
        modules = [module for module in (self.model, *self.model_parts) if isinstance(module, nn.Module)]
        return {id(value): clean_name(name) for module in modules for name, value in module.named_parameters()}

    def _materialize_part(self, part: nn.Module) -> nn.Module:
        config = self.config
        part = materialize_meta(part, self.device)
        if self.parallel.degree("stage") > 1:
            broadcast_state(part, self.parallel.group("stage"))
        part = self.parallelize_model(part)
        if not isinstance(part, nn.Module):
            raise TypeError(f"parallelize_model must return a torch.nn.Module, got {type(part).__name__}")
        if self.precision.fp8_backend is not None:
            part = convert_to_fp8(part, self.precision.fp8_backend, self.logger)
        if config.activation_checkpoint.enabled:
            self.apply_activation_checkpointing(part)
        if config.compile.enable:
            compile_model(part, config.compile)
        return part

    def parallelize_model(self, part: nn.Module) -> nn.Module:
        """Split the layers of a part over the tensor, context and expert axes; return the module to use.

        The default calls the model's `parallelize(ctx)`, or applies the mapping of `build_parallel_plan(ctx)`; axes that are
        then left get the built-in plans.

        Raises:
            TypeError: the model's hook returned something that is no module.
            ConfigError, NotImplementedError: an axis is in use and nothing applies to this model.
        """
        return parallelize_part(part, self.parallel)

    def apply_activation_checkpointing(self, part: nn.Module) -> None:
        """Let the modules named by `activation_checkpoint` keep no activations."""
        from danling.backends.torch.activation import apply_activation_checkpointing

        options = self.config.activation_checkpoint
        classes = self.classes_here(part, options.module_classes)
        if classes is None or classes:
            apply_activation_checkpointing(part, classes, options.checkpoint_impl)

    @cached_property
    def uses_fsdp(self) -> bool:
        """Whether FSDP2 averages gradients; DDP does when `replicate` is the only axis in use."""
        degrees = self.topology.degrees
        alone = degrees["replicate"] == self.world_size
        return self.loss_degree > 1 and (not alone or bool(self.config.fsdp.enabled))

    def _wrap_data_parallel(self) -> None:
        if not any(parameter.requires_grad for part in self.model_parts for parameter in part.parameters()):
            self.parallel.took("replicate", "shard", "context")
            return
        if self.uses_fsdp:
            self._data_mesh = data_mesh(self.parallel)
            pipelined = self.is_pipelined
            for part in self.model_parts:
                classes = self.classes_here(part, self.config.fsdp.module_classes)
                shard_model(part, self._data_mesh, {**self.config.fsdp, "module_classes": classes}, pipelined=pipelined)
        elif self.loss_degree > 1:
            self.wrap_model()
            self.model_parts = [self.model]
        self.parallel.took("replicate", "shard")

    @property
    def meets_in_forward(self) -> bool:  # type: ignore[override]
        """Whether ranks that read different data wait for each other in every forward pass: FSDP2 gathers weights."""
        return self.uses_fsdp

    @property
    def meets_in_backward(self) -> bool:  # type: ignore[override]
        """Whether ranks that read different data wait for each other in every backward pass."""
        return self.uses_fsdp

    def iter_optimizer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in the whole model, and parameters that are trained, of all parts on this rank."""
        for part in self.model_parts:
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    yield clean_name(name), parameter

    def build_optimizer(self) -> None:
        """Build the optimizer named by `optim.type` unless one is bound.

        Raises:
            ConfigError: it was told to update many tensors at once, which torch does not do for split and whole ones together.
        """
        super().build_optimizer()
        for group in getattr(self.optimizer, "param_groups", ()):
            if len({hasattr(parameter, "placements") for parameter in group["params"]}) > 1:
                at_once = [key for key in ("foreach", "fused") if group.get(key)]
                if at_once:
                    raise ConfigError(
                        f"optim.{at_once[0]}: some parameters are split over {self.topology.describe()} and some are whole, "
                        "which torch cannot update in one call; leave it out, or set parallel.axes.shard above 1"
                    )
                if "foreach" in group:
                    group["foreach"] = False

    def check_replicas(self, when: str) -> None:
        """Compare what should be the same on several ranks.

        Raises:
            RuntimeError: it is not; names tensor and ranks.
        """
        check_replicas(self.local_parts(), self.parallel, when)

    def _bind_ema(self) -> None:
        if self.ema is None and self.config.ema.enabled:
            self.ema = ShardedEMA(self.local_parts(), self.config.ema.decay)
        super()._bind_ema()

    def _bind_metrics(self) -> None:
        """Let meters and metrics sum over the ranks that hold different parts of the data."""
        group = self.parallel.group("loss")
        for metrics in (*self._meters.values(), self._train_metrics, self.evaluate_metrics):
            if getattr(metrics, "group", self) is None:
                metrics.group = group

    @property
    def mode(self) -> RunnerMode:
        """What the runner is doing."""
        return self._mode

    @mode.setter
    def mode(self, mode: RunnerMode | str) -> None:
        TorchRunner.mode.fset(self, mode)  # type: ignore[attr-defined]
        for part in self.model_parts[1:]:
            part.train(self._mode is RunnerMode.TRAIN)

    # Data

    def to_device(self, batch: Any) -> Any:
        """Bring this rank's part of a batch to the device of the model."""
        if self.topology.degrees["context"] > 1:
            batch = self.shard_context(batch)
        return super().to_device(batch)

    def shard_context(self, batch: Any) -> Any:
        """Cut the sequences of a batch, and set `parallel.context_offset` to where this rank's part begins."""
        from .plans import shard_context

        return shard_context(batch, self.parallel)

    def unshard_context(self, output: Any) -> Any:
        """Join the outputs for the parts of sequences, for inference."""
        from .plans import unshard_context

        return unshard_context(output, self.parallel)

    def whole_output(self, output: Any) -> Any:
        """The outputs for whole sequences."""
        return self.unshard_context(output) if self.topology.degrees["context"] > 1 else output

    def bind_criterion(self) -> None:
        """Bind criterion, weights and metrics; under a context axis weights are those of this rank's part."""
        super().bind_criterion()
        if self.topology.degrees["context"] > 1:
            rule, rule_of_evaluation = self.weigh, self.weigh_evaluation
            self.weigh = lambda batch: rule(self.shard_context(batch))
            self.weigh_evaluation = lambda batch: rule_of_evaluation(self.shard_context(batch))

    def send_header(self, *, weight: float = 0.0, samples: int = 0, tokens: int = 0, **flags: Any) -> None:
        """Begin to tell all ranks about the window in hand: every part of the data once, requests of every rank."""
        counts_loss, counts_data = self._counts
        if not counts_data:
            samples, tokens, flags["never"] = 0, 0, False
        super().send_header(weight=weight if counts_loss else 0.0, samples=samples, tokens=tokens, **flags)

    @cached_property
    def _counts(self) -> tuple[bool, bool]:
        """Whether this rank speaks for its part of the losses, and of the samples: others hold the same."""
        counts_loss = not self.topology.index("model")
        return counts_loss, counts_loss and not self.topology.coordinates["context"]

    # Steps

    def train_context(self) -> AbstractContextManager:
        """Encloses forward and loss of a training step: precision, and no synchronisation inside a window."""
        if not self.uses_fsdp:
            return super().train_context()
        self.synchronise(self.window.is_last)
        return self.forward_context()

    @cached_property
    def _sharded_modules(self) -> list[Any]:
        return list(sharded_modules(self.model_parts))

    def shortcut(self, data: Any) -> Callable[[float, Any], bool | None] | None:
        """What trains while nothing is special, in fewer calls; only where every rank reads data of its own."""
        return super().shortcut(data) if self.topology.degree("data") == self.world_size else None

    def synchronise(self, flag: bool) -> None:
        """Let FSDP2 reduce gradients in the backward passes from here on, or keep them."""
        if flag is not self._synchronises:
            self._synchronises = flag
            for module in self._sharded_modules:
                module.set_requires_gradient_sync(flag, recurse=False)

    def no_sync(self) -> AbstractContextManager:
        """A context in which gradients are not averaged."""
        return self._no_sync() if self.uses_fsdp else super().no_sync()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        before = self._synchronises
        self.synchronise(False)
        try:
            yield
        finally:
            self.synchronise(before)

    def backward_nothing(self, loss: Tensor) -> None:
        """Backpropagate exact zeros, so that ranks that wait for gathers and gradients get them."""
        if self.uses_fsdp:
            torch.nan_to_num(loss, 0.0, 0.0, 0.0).mul(0).backward()
        elif self.loss_degree > 1:
            super().backward_nothing(loss)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.model_parts:
            part.zero_grad(set_to_none=True)

    def update_options(self) -> dict[str, Any]:
        """Norm and verdict of an update over all axes."""
        return {
            "reduce_norm": self.reduce_norm_over_stages if self.is_pipelined else None,
            "reduce_flag": partial(self.parallel.all_reduce, domain="all", op=dist.ReduceOp.MAX),
        }

    def share_buffers(self) -> None:
        """Nothing to do: every update leaves buffers the same on all ranks that average gradients."""

    def after_first_update(self) -> None:
        """What is due once, when an update has been applied: new time-outs, and a look at what should be the same."""
        super().after_first_update()
        self.check_replicas("after the first update")

    def switch_timeouts(self) -> None:
        """After the first update no group waits longer than `comm.train_timeout_seconds`."""
        super().switch_timeouts()
        self._set_timeouts(self.config.comm.train_timeout_seconds)

    def _set_timeouts(self, seconds: int | None) -> None:
        if not seconds:
            return
        try:
            self.parallel.set_timeout(timedelta(seconds=seconds))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            self.logger.warning("the time-out of a process group cannot be changed: %s", error)

    # Evaluation

    def without_gradients(self) -> AbstractContextManager:
        """Encloses evaluation and inference. FSDP2 gathers weights to the memory that training uses, if it comes later."""
        return torch.no_grad() if self.uses_fsdp else super().without_gradients()

    @contextmanager
    def _aside(self, mode: RunnerMode, split: str) -> Iterator[None]:
        averaged = isinstance(self.ema, ShardedEMA) and self._ema_ready
        with self.ema.swapped() if averaged else _nothing(), super()._aside(mode, split):
            yield

    @property
    def evaluation_model(self) -> Any:
        """What evaluation and inference run: the model, which holds the weights of the EMA meanwhile."""
        return super().evaluation_model if self._own_ema else self.unwrap(self.model)

    @property
    def _own_ema(self) -> bool:
        return self.ema is not None and not isinstance(self.ema, ShardedEMA)

    def _gather_entries(self, split: str, own: list[Any]) -> list[Any]:
        coordinates = self.topology.coordinates
        repeated = any(coordinates[axis] for axis in ("context", "tensor", "expert", "expert_tensor"))
        return super()._gather_entries(split, [] if repeated else own)

    def describe_environment(self) -> dict[str, Any]:
        """Devices, hosts and layout, for the metadata of the attempt."""
        return {**super().describe_environment(), "axes": dict(self.topology.degrees)}


def rebind(optimizer: Any, before: Mapping[int, str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Let an optimizer that was made for a whole model train what this rank holds of it.

    Args:
        optimizer: that has made no update yet.
        before: name by `id` of the parameters it was made for.
        parameters: those that take their place.

    Raises:
        ConfigError: it has state already, or holds a parameter that is not the model's.

    Example:
        >>> old, new = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
        >>> rebind(optimizer, {id(value): name for name, value in old.named_parameters()}, dict(new.named_parameters()))
        >>> optimizer.param_groups[0]["params"][0] is new.weight
        True
    """
    if optimizer.state:
        raise ConfigError("the optimizer has made updates already: bind a new one, or set optim.type")
    for group in optimizer.param_groups:
        strange = [tuple(value.shape) for value in group["params"] if id(value) not in before]
        if strange:
            raise ConfigError(f"the optimizer holds a parameter of shape {strange[0]} that is not part of the model")
        names = [before[id(value)] for value in group["params"]]
        group["params"] = [parameters[name] for name in names if name in parameters]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
