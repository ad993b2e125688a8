"""`DeepSpeedRunner`: the runner of plain PyTorch with a DeepSpeed engine in the place of DDP and optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from danling.backends.torch import TorchRunner
from danling.backends.torch.export import cast_floating, write_safetensors
from danling.backends.torch.local import broadcast_buffers
from danling.backends.torch.payload import EMA, MODEL, load_model_state, rank_file, read_weights, strip_prefixes
from danling.runners.atomic import write_json
from danling.runners.errors import CheckpointError, ConfigError, ResumeError
from danling.runners.persistence import COMPONENTS, RECORDED
from danling.runners.state import RunnerMode

from .casting import SHORT, to_dtype, to_float32
from .engine import (
    accelerator,
    announce_local_rank,
    check_mapping,
    destroy_groups,
    is_pipeline,
    remember_functions,
    start_engine,
)
from .files import ENGINE_KEYS, TAG, EngineFiles, find_foreign, read_common, read_engine_weights, zero_stage
from .gathering import gathered, whole_state
from .quiet import quiet_steps
from .settings import Settings, read_settings
from .step import EngineStep

_NO_CONTEXT = nullcontext()


class DeepSpeedRunner(TorchRunner):
    """The engine for models, or optimizers, that are too large for one device.

    A DeepSpeed engine, made from the section `deepspeed` of the configuration, carries the model: it reduces gradients,
    clips and updates, and splits optimizer state, gradients and weights as `zero_optimization.stage` says. Loaders,
    sampling, windows, schedules, results and the commit of checkpoints are danling's. ZeRO 0 to 3, on accelerators and
    on CPUs.

    Claims every guarantee; saves are synchronous, so a save holds the weights of the step it names in any case.

    Attributes:
        engine: the `deepspeed.DeepSpeedEngine`; None without an optimizer, unless the weights are split.
    """

    stack: ClassVar[str | None] = "deepspeed"
    guarantees: ClassVar[frozenset[int]] = frozenset(range(1, 12))
    axes: ClassVar[frozenset[str]] = frozenset()
    fused: ClassVar[frozenset[str]] = frozenset({"train_context", "forward_context", "forward", "backpropagate"})
    features: ClassVar[frozenset[str]] = frozenset()
    conformance: ClassVar[dict[str, Any]] = {"dtype": "float32", "tolerance": 1e-5, "bf16": 3e-2}

    engine: Any = None
    writes_together = True
    settings: Settings

    # Configuration

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour.

        Raises:
            ConfigError: naming the key.
        """
        self.settings = read_settings(self.config, world_size=self.world_size, device=accelerator().device_name())
        super().check_config()
        check_mapping(self.settings.engine)

    def get_deepspeed_config(self) -> dict[str, Any]:
        """The mapping that the engine is made with: the section `deepspeed`, completed from the rest of the configuration.

        Raises:
            ConfigError: the two contradict each other.
        """
        return read_settings(self.config, world_size=self.world_size, device=self.device.type).engine

    def describe_engine(self) -> dict[str, str]:
        """What the start summary says of the engine."""
        said = {"engine": f"ZeRO {self.settings.stage}", "saves": "synchronous"}
        looks = self.updater is not None and self.updater.engine_looks
        if looks and not self.skip_nonfinite_grad:
            said["non-finite gradients"] = "skipped by the engine, although skip_nonfinite_grad is off"
        return said

    def _write_run_files(self) -> None:
        super()._write_run_files()
        if self.is_main_process:
            try:
                write_json(self.workspace.metadata_dir / "deepspeed.json", self.get_deepspeed_config())
            except (OSError, TypeError) as error:
                self.problems.add("metadata deepspeed.json", error)

    # Construction

    def choose_device(self) -> torch.device:
        """The device of this rank that DeepSpeed drives."""
        kind = accelerator().device_name()
        return torch.device(kind) if kind == "cpu" else torch.device(kind, self.local_rank)

    def init_distributed(self) -> None:
        """Make the process group, also for one process, because an engine needs one.

        Raises:
            RuntimeError: somebody else has made a process group already.
        """
        super().init_distributed()
        if not self.distributed:
            if dist.is_initialized():
                raise RuntimeError(
                    "a torch.distributed process group exists already: destroy it before a runner is built"
                )
            backend = self.config.comm.backend or ("nccl" if self.device.type == "cuda" else "gloo")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._closing("local rank", announce_local_rank(self.local_rank))
        self._closing("group", destroy_groups)

    def init_checkpoint_manager(self) -> None:
        """Bind the checkpoint store; saves are synchronous, because all ranks take part in writing."""
        super().init_checkpoint_manager()
        self._store.asynchronous = False

    @property
    def precision_name(self) -> str | None:
        """The precision said by `precision` or by the section `deepspeed`."""
        return self.settings.precision

    def check_model(self) -> None:
        """Refuse models that this engine cannot carry.

        Raises:
            ConfigError: a pipeline module, or an average of weights that no rank has whole.
        """
        super().check_model()
        if is_pipeline(self.model):
            raise ConfigError("the model is a deepspeed PipelineModule: pipelines are for --stack parallel")
        if self.ema is not None and self.settings.stage == 3:
            raise ConfigError("ema: ZeRO 3 leaves no rank with whole weights to average; use stage 0, 1 or 2")

    def wrap_model(self) -> None:
        """Leave the model as it is: the engine is made when the optimizer is there."""

    def build_optimizer(self) -> None:
        """Build the optimizer unless one is bound, or let the engine make it."""
        super().build_optimizer()
        if self.settings.makes_optimizer:
            if self.optimizer is not None:
                raise ConfigError(
                    "deepspeed.optimizer: given, and an optimizer is bound already; leave one of them out"
                )
            self._start_engine()
            self.optimizer = self.engine.basic_optimizer

    def init_engine(self) -> None:
        """Make the engine, which from here on is `self.model`."""
        if self.engine is None and (self.optimizer is not None or self.settings.stage == 3):
            self._start_engine()
        self.bind_updater()

    def _start_engine(self) -> None:
        from .saving import attach

        model = self.model
        self._closing("quiet", quiet_steps())
        self._closing("functions", remember_functions())
        self.engine = start_engine(model, self.optimizer, self.settings.engine)
        self._closing("engine", self._destroy_engine)
        attach(self.engine)
        self.model = self.engine
        self._carried = {id(model), id(self.engine)}
        self._number_format = next((p.dtype for p in model.parameters() if p.dtype in SHORT), None)
        self._shared_buffers = [buffer for buffer in model.buffers() if self.distributed]
        broadcast_buffers(self._shared_buffers)

    def _destroy_engine(self) -> None:
        self.model = self.unwrap(self.model)
        self.engine.destroy()
        for hook in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook):
            hook.remove()

    def unwrap(self, model: Any) -> Any:
        """The user's module, without the engine and other layers around it."""
        return super().unwrap(model.module if model is not None and model is self.engine else model)

    def bind_updater(self) -> None:
        """Bind the update, once there is an engine to do it; loss scaling is the engine's."""
        self.grad_scaler = None
        self.updater = self.engine and EngineStep(
            self.engine,
            self.optimizer,
            self.scheduler,
            interval="step" if self.scheduler_interval == "step" else "epoch",
            skip_nonfinite=self.skip_nonfinite_grad,
        )

    # Steps

    @property
    def meets_in_backward(self) -> bool:  # type: ignore[override]
        """Whether ranks wait for each other in every backward pass."""
        return self.distributed and self.settings.stage >= 2

    @property
    def meets_in_forward(self) -> bool:  # type: ignore[override]
        """Whether ranks wait for each other in every forward pass."""
        return self.distributed and self.settings.stage == 3

    def without_gradients(self) -> AbstractContextManager:
        """Encloses evaluation and inference; ZeRO 3 goes on using, in training, weights that it has gathered here."""
        return torch.no_grad() if self.settings.stage == 3 else super().without_gradients()

    def train_context(self) -> AbstractContextManager:
        """Encloses forward and loss of a training step: nothing, the engine knows its precision and its windows."""
        return _NO_CONTEXT

    def forward_context(self) -> AbstractContextManager:
        """Encloses forward and loss: nothing."""
        return _NO_CONTEXT

    def no_sync(self) -> AbstractContextManager:
        """A context in which gradients of replicas are not averaged: nothing, boundaries are announced instead."""
        return _NO_CONTEXT

    def forward(self, model: Any, data: Any) -> Any:
        """Call a model on the input of a batch, in the engine's number format; short floats come back as float32."""
        if self.engine is None or id(model) not in self._carried:
            return super().forward(model, data)
        if self._shared_buffers and self._mode is RunnerMode.TRAIN and self.window.index == 0:
            if self.config.ddp.broadcast_buffers:
                broadcast_buffers(self._shared_buffers)
        if self._number_format is None:
            return super().forward(model, data)
        return to_float32(super().forward(model, to_dtype(data, self._number_format)))

    def backpropagate(self, loss: Tensor) -> None:
        """Backpropagate a loss that has its factor, telling the engine whether the window ends with it."""
        self.engine.set_gradient_accumulation_boundary(self.window.is_last)
        self.engine.backward(loss)

    def backward_nothing(self, loss: Tensor) -> None:
        """Backpropagate exact zeros, whatever the loss is: the engine counts backward passes on every rank."""
        if self.settings.stage == 3:  # weights are not here as a whole: go the way of the loss
            nothing = torch.nan_to_num(loss, 0.0, 0.0, 0.0).mul(0)
        else:
            trained = [p for p in self.engine.module.parameters() if p.requires_grad]
            nothing = torch.stack([(p * torch.zeros_like(p)).sum().float() for p in trained]).sum()
        self.backpropagate(nothing)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.engine.zero_grad()
        if self.settings.stage:
            self.engine.optimizer.zero_grad()

    # Saving

    def capture(self) -> Callable[[Path], list[str]]:
        """Copy what this rank has beside the engine; return a function that writes it, and with all ranks the engine."""
        if self.engine is None:
            return super().capture()
        files = self.side_state() if self.is_main_process else {}
        write_rest = self._captured({**files, rank_file(self.rank): self.rank_state()})

        def write(directory: Path) -> list[str]:
            from .saving import save_engine

            return [*save_engine(self.engine, directory), *write_rest(directory)]

        return write

    def export_state(self, dtype: str | None = None, ema: bool = True) -> dict[str, Any]:
        """Weights for use elsewhere: those of the EMA when there is one, floating tensors cast.

        Under ZeRO 3 all ranks call it, and the main process gets them.
        """
        if self.engine is None or self.settings.stage != 3:
            return super().export_state(dtype, ema)
        return cast_floating(whole_state(self.unwrap(self.model), keep=self.is_main_process), dtype)

    def export(self, path: Any, dtype: str | None = None, ema: bool = True) -> None:
        """Write the weights as safetensors, on the main process; all ranks call it.

        Args:
            path: the file.
            dtype: fp32, fp16, bf16 or fp64 for the floating tensors; None keeps theirs.
            ema: prefer the EMA's.
        """
        state = self.export_state(ema=ema)
        if self.is_main_process:
            write_safetensors(path, state, dtype=dtype)

    def _meta(self, kind: str) -> dict[str, Any]:
        return {**super()._meta(kind), "zero_stage": self.settings.stage}

    # Restoring

    def read_checkpoint(self, src: Any) -> dict[str, Any]:
        """Read a checkpoint; also what DeepSpeed has saved without danling, with the state its caller gave it."""
        if (files := find_foreign(src)) is None:
            return super().read_checkpoint(src)
        common = read_common(files.folder)
        payload = {key: value for key, value in common.items() if key not in ENGINE_KEYS}
        if set(payload) >= {"runner", "state", "results"}:
            payload["record"] = {key: payload.pop(key, {}) for key in RECORDED}
        stage, ranks = zero_stage(common), common["dp_world_size"]
        manifest = {"stack": self.stack, "world_size": ranks, "zero_stage": stage}
        return {**payload, "path": files.folder, "manifest": manifest, "model": files, "optimizer": files}

    def read_state(self, directory: Path) -> dict[str, Any]:
        """Read what `write_state` wrote, by component; the engine reads its own files when they are loaded."""
        payload = super().read_state(directory)
        if (directory / TAG).is_dir():
            payload["model"] = payload["optimizer"] = EngineFiles(directory, TAG)
        return payload

    def _check_resumable(self, payload: Mapping[str, Any]) -> None:
        super()._check_resumable(payload)
        manifest = payload.get("manifest", {})
        for name, here, what in (
            ("world_size", self.world_size, "ranks"),
            ("zero_stage", self.settings.stage, "as its ZeRO stage"),
        ):
            if (there := manifest.get(name, here)) != here:
                raise ResumeError(
                    f"{payload.get('path', 'the mapping')} was saved with {there} {what} and this run has {here}: the state "
                    "of the engine cannot be dealt out anew; its weights can be taken over with `pretrained`"
                )

    def load_model(self, state: Any) -> None:
        """Load weights; with those of an engine its optimizer and counters as well, unless `optimizer` is excluded."""
        from .saving import load_engine_state

        if not isinstance(state, EngineFiles):
            self._load_weights(state, skip=self.excluded_names(list(state)))
        elif self.engine is not None and not self._excluded() - _OTHER_COMPONENTS:
            load_engine_state(self.engine, state)
        elif "optimizer" in self._excluded() or self.optimizer is None:
            weights = strip_prefixes(read_engine_weights(state.folder))
            self._load_weights(weights, skip=self.excluded_names(list(weights)))
        else:
            raise ResumeError(
                "checkpoint.exclude_from_loading: the engine restores weights together with their optimizer state; to leave "
                "some out, exclude 'optimizer' as well"
            )

    def load_optimizer(self, state: Any) -> None:
        """Load the optimizer; that of an engine came with the weights."""
        if not isinstance(state, EngineFiles):
            raise ResumeError(
                "the state of this optimizer was not saved by a DeepSpeed engine; "
                "to start it afresh, add 'optimizer' to checkpoint.exclude_from_loading"
            )

    def load_pretrained(self, src: Any, strict: bool = True) -> None:
        """Load weights alone: those of an EMA when the source has one.

        Args:
            src: whatever the torch stack takes, and a directory that DeepSpeed has saved to.
            strict: an error when names differ; wrong shapes always are.
        """
        state, source = self.read_weights(src), "the mapping" if isinstance(src, Mapping) else src
        self._load_weights(state, strict=strict, error=CheckpointError, source=source)
        if self._ema_weights() is not None:
            load_model_state(self.ema, state, strict=strict, error=CheckpointError, source=source)
        self.logger.info("weights loaded from %s", source)

    def _load_weights(self, state: Mapping[str, Tensor], **options: Any) -> None:
        module = self.unwrap(self.model)
        with gathered(module.parameters(), modifier_rank=0) if self.settings.stage == 3 else _NO_CONTEXT:
            load_model_state(module, state, **options)
        refresh = getattr(getattr(self.engine, "optimizer", None), "refresh_fp32_params", None)
        if refresh is not None:
            refresh()

    def read_weights(self, src: Any) -> Mapping[str, Tensor]:
        """The weights in a source, under the names of a plain module."""
        if (files := find_foreign(src)) is not None:
            return strip_prefixes(read_engine_weights(files.folder))
        return super().read_weights(src)

    @staticmethod
    def checkpoint_weights(directory: Path, *, ema: bool = True) -> Mapping[str, Tensor]:
        """Read the whole weights in a checkpoint directory of this stack.

        Args:
            directory: verified.
            ema: prefer the moving average where there is one.
        """
        directory = Path(directory)
        if (directory / MODEL).exists() or (ema and (directory / EMA).exists()):
            return read_weights(directory, ema=ema)
        return strip_prefixes(read_engine_weights(directory / TAG))


_OTHER_COMPONENTS = frozenset(COMPONENTS) - {"optimizer"}
