"""`BaseRunner`: the life of a run, told through small services; an engine below it supplies devices, steps and state."""

from __future__ import annotations

import time
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .configfile import plain
from .console import Console
from .contradictions import unsupported
from .coordinator import Coordinator
from .discovery import check_engine
from .ending import Ending
from .errors import ConfigError
from .events import Events
from .loop import Loop
from .persistence import Persistence
from .problems import Problems
from .results import Results
from .services import Services
from .splits import Splits
from .state import RunnerMode, RunnerState
from .summary import Summary
from .supervisor import Stop, Supervisor
from .surface import Surface
from .trackers import MetricsFile, Trackers
from .views import IdentityViews, ResultViews, StateViews, describe_start
from .workspace import Workspace

VALIDATION_ONLY = ("infer", "predict")


class RunnerMeta(ABCMeta):
    """Builds a runner in two steps, so that `__post_init__` sees what the user's `__init__` assigned.

    It is an `ABCMeta` so that a runner may also inherit from abstract classes.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        runner: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        try:
            type(runner).__init__(runner, *args, **kwargs)
            if "config" not in runner.__dict__:
                raise TypeError(f"{cls.__name__}.__init__ has to call super().__init__(config) first")
            runner.__post_init__()
        except BaseException as error:
            runner._abandon(error)
            raise
        return runner


class BaseRunner(StateViews, ResultViews, IdentityViews, Persistence, Services, Surface, Ending, metaclass=RunnerMeta):
    """What every runner has, whichever engine carries it.

    A user assigns `model`, `criterion`, `datasets` (or `dataloaders`) and `metrics` in `__init__`, after
    `super().__init__(config)`. Everything else has a default and a hook: a method to override, or to replace by assignment.

    Args:
        config: a `RunnerConfig` or a mapping; it is copied and validated.

    Attributes:
        stack: name of the engine, None where the configuration chooses it.
        guarantees: numbers of the documented guarantees that the engine claims.
        axes: parallel axes that the engine understands.
        features: what the engine can do of `dcp` (sharded checkpoints), `fsdp` and `ft` (fault tolerance).
    """

    stack: ClassVar[str | None] = None
    guarantees: ClassVar[frozenset[int]] = frozenset()
    axes: ClassVar[frozenset[str]] = frozenset()
    features: ClassVar[frozenset[str]] = frozenset()
    agreed: tuple[bool, bool]  # what several ranks last agreed on: stop, save
    stack_reason: str = "the class is fixed to it"
    summary_writer: ClassVar[Callable[..., Any] | None] = None  # makes TensorBoard's writer; None writes scalars alone

    # Construction

    def __init__(self, config: Any = None) -> None:
        from .config import RunnerConfig

        self._closers: list[tuple[str, Callable[[], Any]]] = []
        self._closed = False
        self._last_event = "construction"
        self._training = False
        self._mode = RunnerMode.TRAIN
        self._started_at = time.monotonic()
        self.config = RunnerConfig.of({} if config is None else config)
        check_engine(type(self), self.config)
        self.check_config()
        self.state = RunnerState()
        self.split: str | None = None
        self.model: Any = None
        self.ema: Any = None
        self.criterion: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.ft: Any = None
        self.metrics: Any = None
        self.train_metrics: Any = None
        self.evaluate_metrics: Any = None
        self.datasets = Splits()
        self.datasamplers = Splits()
        self.dataloaders = Splits()
        self.resumed_from: Any = None
        self.problems = Problems()
        self.supervisor = Supervisor(problems=self.problems)
        self.events = Events()
        self.workspace = Workspace.from_config(self.config, source=type(self))
        self.console = Console(self.config_id, rank=self.rank, progress=self.config.progress, problems=self.problems)
        self._closing("console", self.console.close)
        self.problems.logger = self.supervisor.logger = self.logger
        self._claim_directory()
        self.coordinator = Coordinator()
        self.init_distributed()
        self.state.elastic.world_size = self.world_size
        self.summary = Summary(
            self.dir / "summary.json",
            timestamp=self.timestamp,
            about={"name": self.name, "id": self.id, "config_id": self.config_id, "stack": self.stack},
            problems=self.problems,
        )
        self.init_checkpoint_manager()
        self.init_fault_tolerance()
        self.init_garbage_collection()
        self.set_seed()
        if self.config.deterministic:
            self.set_deterministic()
        self._init_logging()
        self.init_signal_handlers()
        self.init_heartbeat()
        self.results = Results(
            "step" if self.is_step_mode else "epoch",
            score_split=self.config.score_split,
            score_name=self.config.score_name,
            score_mode=self.config.score_mode,
            patience=self.config.patience,
        )

    def __post_init__(self) -> None:
        """Build what the user's `__init__` described: loaders, model, optimizer, scheduler, engine; then restore."""
        self.datasets, self.datasamplers, self.dataloaders = map(
            _as_splits, (self.datasets, self.datasamplers, self.dataloaders)
        )
        self.build_dataloaders()
        self.setup_fp8()
        self.materialize_model()
        self.build_optimizer()
        self.build_scheduler()
        self.init_engine()
        self.results.fix_score_split(self.evaluate_splits or self.train_splits)
        self.auto_restore()
        self._write_run_files()

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour.

        Raises:
            ConfigError: naming the key.
        """
        if problems := unsupported(self.config, self.stack or type(self).__name__, self.axes, self.features):
            raise ConfigError("\n  ".join(problems))

    def _claim_directory(self) -> None:
        """Hold the run directory; set an earlier run aside unless this one continues it."""
        if not self.is_main_process:
            return
        self.workspace.lock()
        self._closing("lock", self.workspace.release)
        config = self.config
        trains = config.steps is not None or config.epochs is not None
        continues = config.auto_resume or config.checkpoint.load_only or self._lies_inside(config.resume)
        if trains and not continues and not config.ft.enabled and self.workspace.has_checkpoints():
            aside = self.workspace.set_aside()
            self.logger.info("an earlier run was set aside: %s (auto_resume continues a run instead)", aside)

    def _lies_inside(self, source: Any) -> bool:
        """Whether a source for a resume is a path in the run directory, or the name of a checkpoint or alias there."""
        if not source:
            return False
        if Path(source).resolve().is_relative_to(self.dir.resolve()):
            return True
        known = (self.checkpoint_dir / source, self.checkpoint_dir / f"{source}.pointer")
        return Path(source).name == str(source) and any(path.exists() for path in known)

    def _init_logging(self) -> None:
        attempt, main = self.summary.attempt, self.is_main_process
        file = MetricsFile(self.dir / "metrics.jsonl", attempt=attempt, problems=self.problems) if main else None
        self.trackers = Trackers(file, problems=self.problems)
        self._closing("trackers", self.trackers.close)
        if main and self.config.log:
            self.console.log_to(self.log_file)
        if self.config.tensorboard:
            self.init_tensorboard()
        if self.config.wandb.enabled:
            self.init_wandb()

    def _write_run_files(self) -> None:
        self._write_config()
        if self.is_main_process:
            for name, error in self.workspace.write_metadata(
                plain(self.config),
                self.config.identity(),
                {"world_size": self.world_size, **self.describe_environment()},
            ):
                self.problems.add(f"metadata {name}", error)
            self._write_summary("running")

    # Splits

    @property
    def _split_names(self) -> list[str]:
        return list(dict.fromkeys([*self.datasets, *self.dataloaders]))

    @property
    def train_splits(self) -> list[str]:
        """Splits of an epoch, in order."""
        if self.config.train_splits is not None:
            return list(self.config.train_splits)
        names = self._split_names
        marked = [name for name in names if getattr(self.datasets.get(name), "train", None) is True]
        marked = marked or [name for name in names if getattr(self.datasets.get(name), "split", None) == "train"]
        return marked or [name for name in names if name == "train"]

    @property
    def evaluate_splits(self) -> list[str]:
        """Splits of an evaluation, in order."""
        if self.config.evaluate_splits is not None:
            return list(self.config.evaluate_splits)
        train = self.train_splits
        return [name for name in self._split_names if name not in train and not name.startswith(VALIDATION_ONLY)]

    # Mode and events

    @property
    def mode(self) -> RunnerMode:
        """What the runner is doing."""
        return self._mode

    @mode.setter
    def mode(self, mode: RunnerMode | str) -> None:
        self._mode = mode = RunnerMode(mode)
        for module in (self.model, self.ema):
            if hasattr(module, "train"):
                module.train(mode is RunnerMode.TRAIN)

    @property
    def logger(self) -> Any:
        """The logger of the run."""
        return self.console.logger

    @property
    def writer(self) -> Any:
        """TensorBoard's writer, None without one."""
        return next((tracker.writer for tracker in self.trackers if tracker.name == "tensorboard"), None)

    @property
    def callbacks(self) -> Any:
        """Objects with `on_<event>(runner, event)`, in the order in which they are called."""
        return self.events.callbacks

    def on(self, name: str, listener: Any = None) -> Any:
        """Call `listener(runner, event)` at an event; without a listener, a decorator."""
        return self.events.on(name, listener)

    def emit(self, name: str, **payload: Any) -> None:
        """Tell the listeners of an event."""
        self._last_event = name
        if self.events[name]:
            state = self.train_state
            split = payload.pop("split", self.split)
            self.events.emit(name, self, global_step=state.global_step, epoch=state.epoch, split=split, **payload)

    def request_stop(self, reason: str = "requested") -> None:
        """Stop all ranks at the next boundary, after a save."""
        self.supervisor.request_stop(reason)

    def request_save(self) -> None:
        """Save at the next boundary and go on."""
        self.supervisor.request_save()

    def stop_request(self) -> dict[str, Any]:
        """Why the run stops: payload of the `stop` event."""
        supervisor = self.supervisor
        signal = supervisor.stop.name if supervisor.stop > Stop.REQUEST else None
        return {"reason": supervisor.stop_reason, "signal": signal}

    # Training

    def train(self, train_splits: Sequence[str] | None = None, evaluate_splits: Sequence[str] | None = None) -> Results:
        """Train to the end of the budget; return all results.

        Args:
            train_splits: instead of the configured ones.
            evaluate_splits: instead of the configured ones.

        Raises:
            ValueError: without a budget, or without a train split.
            SystemExit, KeyboardInterrupt: after a signal, when everything is saved and closed.
        """
        train_splits = list(self.train_splits if train_splits is None else train_splits)
        evaluate_splits = list(self.evaluate_splits if evaluate_splits is None else evaluate_splits)
        with self._ending():
            self._check_trainable(train_splits, evaluate_splits)
            self._loop = Loop(self, train_splits, evaluate_splits)
            self.agreed = (False, False)
            used_up = "the budget is used up" if self._loop.complete else "patience has run out"
            if (self._loop.complete or self.patience_exhausted) and self.train_state.phase != "evaluate":
                self.logger.info("nothing to train: %s (%s)", used_up, self._where())
                self.train_state.phase = "done"
                self._outcome = ("finished", "budget already used" if self._loop.complete else "patience")
                return self.results
            self._announce()
            self._training = True
            try:
                self.train_steps() if self.is_step_mode else self.train_epochs()
            finally:
                self._training = False
                self.console.bar.close(self.global_step, self.epoch)
            self._outcome = self._judge(self._loop.ending)
            self.emit("end")
        self._report_end()
        error = self.supervisor.exit_error() if self._loop.ending == "stop" else None
        if error is not None:
            self.close()
            raise error
        if self._loop.ending == "stop":
            self.supervisor.clear_stop()
        return self.results

    def train_epochs(self) -> None:
        """Train to the end of a budget in epochs."""
        self._loop.run()

    def train_steps(self) -> None:
        """Train to the end of a budget in updates."""
        self._loop.run()

    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        """Train one pass over a split; return its metrics. By itself it evaluates and saves nothing."""
        self._check_splits([split])
        loop = self._loop if self._training else Loop(self, [split], [], triggers=False)
        return loop.run_pass(split)

    def _check_trainable(self, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
        if self._closed:
            raise RuntimeError("this runner is closed")
        if self.config.steps is None and self.config.epochs is None:
            raise ValueError("there is no budget: set `epochs` or `steps`")
        if not train_splits:
            raise ValueError(
                f"there is no train split among {self._split_names or 'no data sets at all'}: "
                "name one `train`, or set `train_splits`"
            )
        self._check_splits([*train_splits, *evaluate_splits])

    def _check_splits(self, splits: Sequence[str]) -> None:
        known = self._split_names
        for split in splits:
            if split not in known:
                raise ValueError(f"there is no split {split!r}; there are: {', '.join(known) or 'none'}")

    def _announce(self) -> None:
        resumed = self.resumed_from is not None
        self.trackers.start("resume" if resumed else "start", global_step=self.global_step, epoch=self.epoch)
        if self.is_main_process:
            self.console.block(f"run {self.name}-{self.config_id}", describe_start(self))
        self.emit("resume" if resumed else "start", path=self.resumed_from)
        self.console.start_progress(
            total=self.steps, completed=self.global_step, epochs=None if self.is_step_mode else self.epochs
        )

    def settle_row(self, row: Mapping[str, Any], *, index: int, scored: bool) -> bool:
        """Append a result row, show and store it; return whether it is a new best.

        Args:
            row: `{split: {metric: value}}`.
            index: epochs or updates.
            scored: whether an evaluation is part of it, which counts against `patience`.
        """
        best = self.best_result
        if scored:
            self.results.keep_best(index)
        self.append_result(row, index)
        improved = scored and self.latest_score is not None and self.is_best
        if improved:
            self._best_at = self.global_step, self.micro_step
        if scored:
            self.results.count_evaluation(scored=not set(row) <= set(self.train_splits))
        for split, values in row.items():
            event = "epoch" if split in self.train_splits else "evaluate"
            self.trackers.log(split, values, global_step=self.global_step, epoch=self.epoch, event=event)
        if self.is_main_process and row:
            mark = (self.score_split, self.score_name) if improved else None
            self.console.evaluation(self._where(), row, best, mark=mark)
            self.save_result()
        return improved

    def _where(self) -> str:
        if self.is_step_mode:
            return f"step {self.global_step}/{self.steps}"
        return f"epoch {self.epoch}/{self.epochs}, step {self.global_step}"

    @property
    def patience_exhausted(self) -> bool:
        """Whether `patience` evaluations in a row brought no new best."""
        return self.results.exhausted

    def append_result(self, row: Mapping[str, Any], index: int | None = None) -> None:
        """Add a row to the history, or merge it into the one with the same index.

        Args:
            row: `{split: {metric: value}}`.
            index: None is the current epoch or step.
        """
        if index is None:
            index = self.global_step if self.is_step_mode else self.epoch
        self.results.append(row, index)

    def evaluate(self, splits: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Evaluate splits with the EMA weights, or the model's; return the metrics by split. Training state does not move."""
        names = list(self.evaluate_splits if splits is None else splits)
        self._check_splits(names)
        mode, current = self._mode, self.split
        metrics = {}
        try:
            for split in names:
                self.split, self.mode = split, RunnerMode.EVALUATE
                self.emit("evaluate_start")
                metrics[split] = self.evaluate_epoch(split)
                self.emit("evaluate_end", metrics=metrics[split])
        finally:
            self.split, self.mode = current, mode
        if not self._training and self.is_main_process:
            self.console.evaluation("evaluation", metrics, self.best_result)
        return metrics


def _as_splits(mapping: Any) -> Splits:
    if isinstance(mapping, Splits):
        return mapping
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"datasets, samplers and loaders are mappings from split to object, got {type(mapping).__name__}"
        )
    return Splits(mapping)
