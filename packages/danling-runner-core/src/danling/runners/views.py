"""What a runner shows of its configuration, state, results and identity, read only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .interval import Interval

if TYPE_CHECKING:
    from .base_runner import BaseRunner

TRIGGERS_PER_BUDGET = 20
LOGS_PER_BUDGET = 100


_Host: Any = object  # part of BaseRunner: what is used here and not defined here is the runner's


class _Of:
    """A read-only view of something that a part of the runner knows: `name = _Of("results.best_score", "what it is")`."""

    def __init__(self, path: str, doc: str) -> None:
        self._path = path.split(".")
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, runner: Any, owner: type | None = None) -> Any:
        if runner is None:
            return self
        value = runner
        for part in self._path:
            value = getattr(value, part)
        return value

    def __set__(self, runner: Any, value: Any) -> None:
        raise AttributeError(f"{type(runner).__name__}.{self._name} is read only: it is {'.'.join(self._path)}")


class StateViews(_Host):
    """Counters, targets and cadence."""

    train_state = _Of("state.train", "counters and positions")
    elastic_state = _Of("state.elastic", "restarts and world size of this attempt")
    rng_state = _Of("state.rng", "the seed in force")
    global_step = _Of("state.train.global_step", "updates applied")
    micro_step = _Of("state.train.micro_step", "micro-batches run")
    epoch = _Of("state.train.epoch", "complete epochs")
    accum_steps = _Of("config.accum_steps", "micro-batches behind one update")
    max_grad_value = _Of("config.max_grad_value", "limit of each gradient element")
    max_grad_norm = _Of("config.max_grad_norm", "limit of the gradient norm")
    skip_nonfinite_grad = _Of("config.skip_nonfinite_grad", "whether updates with non-finite gradients are skipped")
    scheduler_monitor = _Of("config.scheduler.monitor", "what a metric scheduler looks at; None is the score")

    @property
    def is_step_mode(self) -> bool:
        """Whether the budget counts updates."""
        return self.config.steps is not None

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates in one epoch over the train splits; None when a loader has no length."""
        lengths = [self.pass_length(split) for split in self.train_splits]
        if any(length is None for length in lengths):
            return None
        return sum(math.ceil(length / self.accum_steps) for length in lengths)

    @property
    def steps(self) -> int | None:
        """Target in updates: the budget, or what the epochs of the budget amount to; None when that is unknown."""
        config = self.config
        if config.steps is not None:
            return config.steps
        per_epoch = self.updates_per_epoch if config.epochs is not None else None
        return None if per_epoch is None else config.epochs * per_epoch

    @property
    def epochs(self) -> int | None:
        """Target in epochs; in step mode the epochs that the updates amount to, None when that is unknown."""
        config = self.config
        if config.steps is None:
            return config.epochs
        per_epoch = self.updates_per_epoch
        return math.ceil(config.steps / per_epoch) if per_epoch else None

    total_steps = _Of("steps", "the target in updates")
    total_epochs = _Of("epochs", "the target in epochs")

    @property
    def progress(self) -> float:
        """How much of the budget is used, from 0 to 1."""
        if self.is_step_mode:
            return min(1.0, self.global_step / self.config.steps)
        steps, epochs = self.steps, self.epochs
        if steps:
            return min(1.0, self.global_step / steps)
        return min(1.0, self.epoch / epochs) if epochs else 0.0

    def _interval(self, value: Any) -> Interval:
        unit = "steps" if self.is_step_mode else "epochs"
        if value is not None:
            return Interval.parse(value, unit)
        if self.is_step_mode:
            return Interval(math.ceil(self.config.steps / TRIGGERS_PER_BUDGET), unit)
        return Interval(1, unit)

    @property
    def evaluation_interval(self) -> Interval:
        """How often to evaluate during training."""
        return self._interval(self.config.eval_interval)

    @property
    def checkpoint_interval(self) -> Interval:
        """How often to save during training."""
        return self._interval(self.config.checkpoint.interval)

    @property
    def log_interval(self) -> int:
        """Updates between two log points; 0 is never."""
        value = self.config.log_interval
        if value is not None:
            return value
        steps = self.steps
        return 100 if steps is None else min(1000, max(1, math.ceil(steps / LOGS_PER_BUDGET)))

    @property
    def batch_size(self) -> int | None:
        """Samples per micro-batch and rank; None when the data set makes its own batches."""
        return self.config.dataloader.batch_size

    @property
    def batch_size_equivalent(self) -> int | None:
        """Samples behind one update: batch × data ranks × accum_steps."""
        size = self.batch_size
        return None if size is None else size * self.data_degree * self.replica_groups * self.accum_steps


class ResultViews(_Host):
    """Scores and rows."""

    latest_result = _Of("results.latest_result", "the last row, with its index")
    best_result = _Of("results.best_result", "the best row, with its index")
    scores = _Of("results.scores", "the score of each row that has one, by index")
    latest_score = _Of("results.latest_score", "the score of the last row")
    best_score = _Of("results.best_score", "the best score")
    best_index = _Of("results.best_index", "the index of the best row")
    is_best = _Of("results.is_best", "whether the last row is the best")
    score_split = _Of("results.score_split", "the split the score is read from")
    score_name = _Of("results.score_name", "the metric that is the score")
    score_mode = _Of("results.direction", "min or max: which score is better")

    @property
    def best_fn(self) -> Any:
        """`min` or `max`, the function that picks the better of two scores."""
        return min if self.results.direction == "min" else max


class IdentityViews(_Host):
    """Names and places."""

    name = _Of("workspace.name", "the name of the run")
    id = _Of("workspace.id", "code and configuration")
    config_id = _Of("workspace.config_id", "hash of what identifies the run")
    run_id = _Of("workspace.config_id", "the config_id")
    code_id = _Of("workspace.code_id", "revision of the code, None without git")
    experiment_id = _Of("workspace.code_id", "the code_id")
    uuid = _Of("workspace.uuid", "uuid of the run and its code")
    run_uuid = _Of("workspace.run_uuid", "uuid of the run")
    experiment_uuid = _Of("workspace.experiment_uuid", "uuid of the code")
    lineage = _Of("config.lineage", "directory level above the experiment")
    experiment = _Of("config.experiment", "directory level above the run")
    timestamp = _Of("workspace.timestamp", "start of the attempt, UTC")
    dir = _Of("workspace.dir", "the run directory")
    checkpoint_dir = _Of("workspace.checkpoint_dir", "where checkpoints are")
    log_file = _Of("workspace.log_file", "the log of this attempt")


def describe_start(runner: BaseRunner) -> dict[str, Any]:
    """The facts of the block at the start of a run."""
    config = runner.config
    size, degree = runner.batch_size, runner.data_degree
    batch = f"{size if size is not None else 'by the data set'} × {degree} × {runner.accum_steps}"
    if size is not None:
        batch += f" = {runner.batch_size_equivalent}"
    budget = f"{config.steps} steps" if runner.is_step_mode else f"{config.epochs} epochs"
    if not runner.is_step_mode and runner.steps is not None:
        budget += f" ({runner.steps} updates)"
    return {
        "id": runner.id,
        "directory": str(runner.dir),
        "stack": f"{runner.stack} ({runner.stack_reason})",
        "devices": runner.describe_devices(),
        **runner.describe_engine(),
        "precision": config.precision or "fp32",
        "batch × ranks × accum": batch,
        "splits": ", ".join(_sizes(runner)),
        "budget": budget,
        "score": f"{runner.score_split}/{runner.score_name}, {runner.score_mode} is best",
        "resumed from": runner.resumed_from and str(runner.resumed_from),
    }


def _sizes(runner: BaseRunner) -> list[str]:
    sizes = []
    for split in [*runner.train_splits, *runner.evaluate_splits]:
        length = runner.split_size(split)
        sizes.append(split if length is None else f"{split} {length}")
    return sizes
