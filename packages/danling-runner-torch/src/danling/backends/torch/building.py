"""From what the user assigned to what trains: device, loaders, model, optimizer, scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from danling.optim import OPTIMIZERS, SCHEDULERS, OptimizerStep
from danling.runners.errors import ConfigError

from . import payload
from .activation import apply_activation_checkpointing
from .buckets import fix_buckets
from .compiling import compile_model, load_artifacts, save_artifacts
from .data import build_dataloader, is_map_style
from .determinism import ask_for_determinism
from .ema import EMASchedule, build_ema
from .fp8 import convert_to_fp8
from .payload import clean_name
from .precision import Precision
from .profiling import StepProfiler
from .sampler import build_sampler
from .weights import WeightRule

_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's


class Building(_Host):
    """The construction hooks of `TorchRunner`."""

    model: Any
    ema: Any
    criterion: Any
    optimizer: Any
    scheduler: Any
    train_metrics: Any
    evaluate_metrics: Any

    # Data

    def build_dataloaders(self) -> None:
        """Build a loader for every split in `datasets` that has none."""
        self._check_split_options()
        train = set(self.train_splits)
        stateless = [
            name for name in self.train_splits if name in self.dataloaders and not _keeps_state(self.dataloaders[name])
        ]
        if stateless and self.is_main_process and not self.config.checkpoint.load_only:
            self.logger.warning(
                "the loader of %s has no state_dict and load_state_dict: a run that stops in the middle of an epoch "
                "cannot be resumed there",
                ", ".join(map(repr, stateless)),
            )
        for split, dataset in self.datasets.items():
            if split in self.dataloaders or dataset is None:
                continue
            options = self.loader_options(split)
            shuffle = options.pop("shuffle", None)
            shuffle = split in train if shuffle is None else shuffle
            if is_map_style(dataset):
                self.datasamplers.setdefault(split, self.build_datasampler(dataset, split, shuffle))
            self.dataloaders[split] = build_dataloader(
                dataset,
                split,
                options,
                self.datasamplers.get(split),
                self.collate_fn,
                seed=self.rng_state.seed,
                rank=self.data_share(split in train)[0],
                device=self.device,
                ranks=self.data_share(split in train)[1],
                train=split in train,
                shared=self.data_degree < self.world_size,
            )

    def pass_length(self, split: str) -> int | None:
        """Micro-batches of one whole pass over a split on this rank; None when unknown."""
        sampler = self.datasamplers.get(split)
        return super().pass_length(split) if sampler is None else sampler.pass_length()

    def build_datasampler(self, dataset: Any, split: str, shuffle: bool) -> Any:
        """Return the batch sampler of a map-style split."""
        options = self.loader_options(split)
        train = split in self.train_splits
        drop_last = options.get("drop_last")
        return build_sampler(
            dataset,
            split,
            seed=self.rng_state.seed,
            shuffle=shuffle,
            drop_last=train if drop_last is None else drop_last,
            batch_size=options.get("batch_size"),
            data_rank=self.data_share(train)[0],
            data_ranks=self.data_share(train)[1],
            train=train,
        )

    def loader_options(self, split: str) -> dict[str, Any]:
        """The `dataloader` section as it applies to one split."""
        section = self.config.dataloader
        shared = {key: value for key, value in section.items() if not isinstance(value, Mapping)}
        own = section.get(split)
        return {**shared, **(own if isinstance(own, Mapping) else {})}

    def _check_split_options(self) -> None:
        known = self._split_names
        for name, value in self.config.dataloader.items():
            if isinstance(value, Mapping) and name not in known:
                raise ConfigError(f"dataloader.{name}: there is no split {name!r}; there are: {', '.join(known)}")
        for key in ("train_splits", "evaluate_splits"):
            for name in self.config[key] or []:
                if name not in known:
                    raise ConfigError(f"{key}: there is no split {name!r}; there are: {', '.join(known)}")

    @staticmethod
    def collate_fn(batch: list[Any]) -> Any:
        """Stack samples to a batch; ragged tensors become a NestedTensor when danling.tensors is in use."""
        from torch.utils.data import default_collate

        return default_collate(batch)

    def to_device(self, batch: Any) -> Any:
        """Bring a batch to the device of the model; containers keep their types."""
        if self.device.type == "cpu":
            return batch
        from danling.utils import to_device

        return to_device(batch, self.device, non_blocking=True)

    # Model

    def setup_fp8(self) -> None:
        """Replace linear layers by 8-bit ones when the precision says so."""
        backend = self.precision.fp8_backend
        if backend is not None and self.model is not None:
            self.model = convert_to_fp8(self.model.to(self.device), backend, self.logger)

    def materialize_model(self) -> None:
        """Device, activation checkpointing, compile, EMA copy, replicas; train mode.

        Raises:
            ValueError: no model was assigned.
        """
        self.check_model()
        config = self.config
        self.model = self.model.to(self.device)
        if config.activation_checkpoint.enabled:
            options = config.activation_checkpoint
            apply_activation_checkpointing(self.model, options.module_classes, options.checkpoint_impl)
        self.share_state()
        self._bind_ema()
        if config.compile.enable:
            load_artifacts(config.compile.precompile_artifact_dir)
            self.model = compile_model(self.model, config.compile)
            self._closing("compile", lambda: save_artifacts(config.compile.precompile_artifact_dir))
        self.model.train()
        self.wrap_model()
        self.bind_criterion()

    def check_model(self) -> None:
        """Refuse to go on without a model.

        Raises:
            ValueError: none was assigned.
            TypeError: it is no module.
        """
        if self.model is None:
            raise ValueError(f"{type(self).__name__} has no model: assign `self.model` in __init__")
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")

    def bind_criterion(self) -> None:
        """Bind criterion, the weights of losses, and metrics."""
        if isinstance(self.criterion, nn.Module):
            self.criterion = self.criterion.to(self.device)
        self.weigh = WeightRule(self.criterion, self._overridden_weight())
        self.weigh_evaluation = WeightRule(self.criterion, self._overridden_weight())
        if self.train_metrics is None:
            self.train_metrics = self.metrics
        if self.evaluate_metrics is None:
            self.evaluate_metrics = _copy(self.metrics)
        score = getattr(self.evaluate_metrics, "higher_is_better", None)
        if isinstance(score, Mapping):
            self.results.higher_is_better = score.get(self.config.score_name)

    def _bind_ema(self) -> None:
        options = self.config.ema
        if self.ema is None and options.enabled:
            self.ema = build_ema(self.unwrap(self.model), options.decay)
        self._ema_schedule = None
        if self.ema is not None:
            self._ema_schedule = EMASchedule(self.ema, interval=options.interval, start_step=options.start_step)

    def wrap_model(self) -> None:
        """Make replicas of several ranks act as one; with one rank there is nothing to do."""
        if not self.distributed:
            return
        options = self.config.ddp
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if not trained:
            return
        on_device = self.device.type != "cpu"
        renamed = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": options.broadcast_buffers}
        self.model = nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if on_device else None,
            find_unused_parameters=options.find_unused_parameters,
            static_graph=options.static_graph,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
            bucket_cap_mb=options.bucket_cap_mb,
            **buffers,
        )
        fix_buckets(self.model)

    def unwrap(self, model: Any) -> Any:
        """The user's module, without DDP, compile or EMA layers around it."""
        return model if model is None else payload.unwrap(model)

    def iter_optimizer_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in the user's module, and parameters that are trained."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield clean_name(name), parameter

    def _overridden_weight(self) -> Any:
        from .runner import TorchRunner

        own = self.__dict__.get("loss_weight")
        if own is not None:
            return own
        return None if type(self).loss_weight is TorchRunner.loss_weight else self.loss_weight

    # Optimizer and scheduler

    def build_optimizer(self) -> None:
        """Build the optimizer named by `optim.type` unless one is bound."""
        config = dict(self.config.optim)
        name, rules = config.pop("type", None), config.pop("param_groups", None)
        no_decay = config.pop("no_decay", False)
        rules = self.applicable_rules(rules or ())
        if self.optimizer is None and name is not None:
            if rules or no_decay:
                config |= {"param_groups": rules or (), "no_decay": no_decay}
            try:
                self.optimizer = OPTIMIZERS.build(name, list(self.iter_optimizer_named_parameters()), **config)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"optim: {error}") from error

    def applicable_rules(self, rules: Sequence[Any]) -> Sequence[Any]:
        """The rules of `optim.param_groups` that are about parameters on this rank."""
        return rules

    def build_scheduler(self) -> None:
        """Build the scheduler named by `scheduler.type` unless one is bound; bind optimizer, scheduler and clipping."""
        config = dict(self.config.scheduler)
        name, interval = config.pop("type", None), config.pop("interval", "auto")
        config.pop("monitor", None)
        if self.scheduler is None and name is not None:
            if self.optimizer is None:
                raise ConfigError("scheduler.type is set, but there is no optimizer: set optim.type")
            try:
                accepted = SCHEDULERS.accepts(name)
                if "total_steps" in accepted and "total_steps" not in config:
                    config["total_steps"] = self._schedule_length(interval)
                self.scheduler = SCHEDULERS.build(name, self.optimizer, **config)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"scheduler: {error}") from error
        self.scheduler_interval = self._resolve_interval(interval)
        self.grad_scaler = self.precision.scaler()
        self.bind_updater()

    def update_options(self) -> dict[str, Any]:
        """Further arguments of `OptimizerStep`, for engines whose ranks hold parts of the model."""
        return {}

    def bind_updater(self) -> None:
        """Bind the one sequence of an update: unscale, check, clip, step, schedule, clear."""
        if self.optimizer is None:
            self.updater = None
            return
        self.updater = OptimizerStep(
            self.optimizer,
            self.scheduler,
            interval="step" if self.scheduler_interval == "step" else "epoch",
            clip_value=self.max_grad_value,
            clip_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite_grad,
            scaler=self.grad_scaler,
            **self.update_options(),
        )

    def _is_metric_scheduler(self) -> bool:
        return isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)

    def _resolve_interval(self, interval: str) -> str:
        if self._is_metric_scheduler():
            if interval == "step":
                raise ConfigError(
                    "scheduler.interval: a scheduler that follows a metric moves after evaluations, not steps"
                )
            return "metric"
        return "step" if interval == "auto" else interval

    def _schedule_length(self, interval: str) -> int:
        """Length of the whole budget in the unit of the scheduler.

        Raises:
            ValueError: it is not known.
        """
        length = self.epochs if interval == "epoch" else self.steps
        if length is None:
            what = "loader without a length" if self.config.epochs is not None else "run without a budget"
            raise ValueError(f"the length of the schedule is unknown (a {what}): set `steps`, or scheduler.total_steps")
        return length

    def scale_lr(self, lr: float, batch_size_base: int) -> float:
        """Scale a learning rate linearly from a base batch size to the equivalent batch size of this run."""
        size = self.batch_size_equivalent
        if size is None:
            raise ValueError("the data set makes its own batches: their size is not known")
        return lr * size / batch_size_base

    def step_schedulers(self, *, epoch_ended: bool, evaluated: Mapping[str, Any] | None) -> None:
        """Move a scheduler that follows epochs, or one that follows a metric after an evaluation."""
        if self.scheduler is None or self.updater is None:
            return
        if self.scheduler_interval == "metric":
            if evaluated is not None:
                self.updater.step_scheduler(self.monitored(evaluated))
        elif self.scheduler_interval == "epoch" and epoch_ended:
            self.updater.step_scheduler()

    def monitored(self, evaluated: Mapping[str, Any]) -> float:
        """The value that a metric scheduler looks at.

        Raises:
            ValueError: it is missing or ambiguous; the message lists the candidates.
        """
        wanted = self.scheduler_monitor
        if wanted is None:
            if self.latest_score is not None:
                return self.latest_score
            wanted = f"{self.score_split}.{self.score_name}"
        from danling.runners.trackers.base import flatten

        row = self.results.latest_result or {}
        row.pop("index", None)
        found = flatten(row)
        matches = [name for name in found if name == wanted or name.split(".", 1)[-1] == wanted]
        if len(matches) > 1 and f"{self.score_split}.{wanted}" in matches:
            matches = [f"{self.score_split}.{wanted}"]
        if len(matches) != 1:
            problem = "is ambiguous" if matches else "is not among the metrics"
            raise ValueError(f"scheduler.monitor {wanted!r} {problem}: {', '.join(sorted(matches or found))}")
        return found[matches[0]]

    # Environment

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour."""
        super().check_config()  # type: ignore[misc]
        Precision.resolve(self.precision_name, self.choose_device())

    @property
    def precision_name(self) -> str | None:
        """The precision that is configured."""
        return self.config.precision

    def init_precision(self) -> None:
        """Read `precision` for this device."""
        self.precision = Precision.resolve(self.precision_name, self.device)

    def init_profiler(self) -> None:
        """Start the profiler when it is enabled."""
        self.profiler = None
        if self.config.profiling.enabled:
            self.profiler = StepProfiler(self.config.profiling, self.dir, self.timestamp, self.rank)
            self._closing("profiler", self.profiler.close)

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed Python, NumPy, torch and the device."""
        seed = super().set_seed(seed, bias)
        torch.manual_seed(seed)
        return seed

    def set_deterministic(self) -> None:
        """Deterministic algorithms, cuDNN and cuBLAS, TF32 off; everything is put back at close."""
        self._closing("deterministic", ask_for_determinism())


def _copy(metrics: Any) -> Any:
    from copy import deepcopy

    return deepcopy(metrics)


def _keeps_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
