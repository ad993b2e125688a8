"""The one loop behind epoch mode and step mode: windows, boundaries, triggers.

Epochs follow one another, each running the train splits in order; epoch mode ends after a number of epochs, step mode
after a number of updates, wherever in a pass that is. Everything else (logging, evaluation, result rows, schedulers,
early stop, checkpoints, stopping) happens at *boundaries*: the instants after a window when nothing is half done. The
order at a boundary is

    window → update → ``step`` event → log → evaluate → row, score, scheduler, patience → checkpoint → stop check

The loop holds no tensor and imports no torch: the engine gives it windows and carries out what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .crash import crash_point, is_armed
from .state import RunnerMode

if TYPE_CHECKING:
    from .base_runner import BaseRunner
    from .interval import Interval

MAX_SKIPS_IN_A_ROW = 100


class EvaluationInterrupted(Exception):
    """A stop was asked for during an evaluation; the evaluation is run again from its start after a resume."""


class Loop:
    """One `train()` call.

    Args:
        runner: whose hooks are called.
        train_splits: passes of an epoch, in order.
        evaluate_splits: what an evaluation runs over.
        triggers: False runs passes only: no log, evaluation, row or checkpoint.

    Attributes:
        ending: why the loop ended before its budget: `stop` (asked for, saved as it stands), `patience`, or None.
    """

    def __init__(
        self,
        runner: BaseRunner,
        train_splits: Sequence[str],
        evaluate_splits: Sequence[str],
        *,
        triggers: bool = True,
    ) -> None:
        self.runner = runner
        self.state = runner.train_state
        self.train_splits = list(train_splits)
        self.evaluate_splits = list(evaluate_splits)
        self.triggers = triggers
        self.evaluate_at: Interval = runner.evaluation_interval
        self.save_at: Interval = runner.checkpoint_interval
        self.log_every = runner.log_interval
        self.rows_by_step = runner.is_step_mode
        self.ending: str | None = None
        self.last_metrics: dict[str, Any] = {}
        self._next_step = self._next_trigger()

    # The budget

    @property
    def complete(self) -> bool:
        """Whether the budget is used up."""
        runner = self.runner
        if runner.is_step_mode:
            return self.state.global_step >= runner.steps
        return runner.epochs is not None and self.state.epoch >= runner.epochs

    @property
    def over(self) -> bool:
        """Whether nothing more is to be trained, for whatever reason."""
        return self.ending is not None or (self.triggers and self.complete)

    # Epochs and passes

    def run(self) -> None:
        """Train from where the state is to the end of the budget, or until something asks for a stop."""
        state = self.state
        if state.phase == "evaluate":
            self._settle(updated=True, epoch_ended=state.epoch_ended, evaluate=True)
        while not self.over:
            self._run_epoch()
        if self.ending != "stop":
            self.runner.save_checkpoint(last_step=True)
            state.phase = "done"

    def _run_epoch(self) -> None:
        runner, state = self.runner, self.state
        before = state.micro_step, state.epoch
        begun = any(position.get("samples") for position in state.positions.values())
        if not begun:
            runner.emit("epoch_start")
        for split in self.train_splits:
            if state.positions.get(split, {}).get("complete"):
                continue
            runner.train_epoch(split)
            if self.over:
                return
        if before == (state.micro_step, state.epoch):
            raise RuntimeError(f"the train splits {self.train_splits} yield no batch: there is nothing to train on")
        if state.micro_step == before[0] and not begun:  # nothing may be left of a pass that a resume goes on with
            raise RuntimeError(f"an epoch over the train splits {self.train_splits} yields no batch")

    def run_pass(self, split: str) -> dict[str, Any]:
        """Train on one split from its position to its end; return its metrics."""
        runner, state = self.runner, self.state
        runner.split = split
        runner.mode = RunnerMode.TRAIN
        listeners = runner.events["step"]
        bar = runner.console.bar if runner.console.bar.live else None
        dies = is_armed("step.end")
        shortcut: Any = None
        first = True
        self.last_metrics = {}
        with runner.open_pass(split) as data:
            while True:
                updated = None
                if shortcut is not None:
                    updated = shortcut(0 if listeners or dies else self._next_step, bar)
                if updated is None:
                    window = data.next_window()
                    if window is None:  # the end of data of unknown length: a boundary without an update
                        if data.interrupted:
                            self._stop()
                        else:
                            self._boundary(updated=False, epoch_ended=self._complete_pass(split))
                        break
                    self._train_window(window)
                    updated = window.applied
                    data.advance()
                    if bar is not None:
                        bar.advance(state.global_step, state.epoch)
                    if first:
                        shortcut, first = runner.shortcut(data), False
                if updated:
                    if listeners:
                        runner.emit("step")
                elif self.triggers:
                    self._skipped()
                if dies:
                    crash_point("step.end")
                if data.exhausted or state.global_step >= self._next_step or runner.pending:
                    if updated and self.triggers and self.log_every and state.global_step % self.log_every == 0:
                        runner.log_training()
                    epoch_ended = self._complete_pass(split) if data.exhausted else False
                    self._boundary(updated=updated, epoch_ended=epoch_ended)
                    if data.exhausted or self.over:
                        break
                    if runner.split != split or runner.mode is not RunnerMode.TRAIN:
                        runner.split, runner.mode = split, RunnerMode.TRAIN
        return self.last_metrics

    def _train_window(self, window: Any) -> None:
        runner, state = self.runner, self.state
        for batch in window:
            before = state.micro_step
            output = runner.train_step(batch)
            if state.micro_step != before + 1:
                _fail_unstepped(state.micro_step - before)
            try:
                loss = output[1]
            except (TypeError, IndexError, KeyError):
                _fail_output(output)
            if loss is not None:
                runner.record_loss(loss)

    def _skipped(self) -> None:
        state = self.state
        self.runner.emit("skip")
        if state.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{state.skipped_in_a_row} updates in a row were skipped (non-finite gradients, or windows of weight zero); "
                f"the last applied update is {state.global_step}. Lower the learning rate or look at the data."
            )

    def _complete_pass(self, split: str) -> bool:
        """Note that a split is consumed; return whether that completes the epoch."""
        state = self.state
        state.positions.setdefault(split, {})["complete"] = True
        keep = self.rows_by_step and len(self.train_splits) == 1
        self.last_metrics = self.runner.read_training(split, reset=not keep)
        if not keep:
            state.row[split] = self.last_metrics
        if not all(state.positions.get(name, {}).get("complete") for name in self.train_splits):
            return False
        state.epoch += 1
        state.positions = {}
        return True

    # Boundaries

    def _boundary(self, *, updated: bool, epoch_ended: bool) -> None:
        if not self.triggers:
            return
        unevaluated = self.state.evaluated_step != self.state.global_step
        evaluate = self._due(self.evaluate_at, updated, epoch_ended) or (self.complete and unevaluated)
        self._settle(updated=updated, epoch_ended=epoch_ended, evaluate=evaluate)
        self._next_step = self._next_trigger()

    def _settle(self, *, updated: bool, epoch_ended: bool, evaluate: bool) -> None:
        """Everything at a boundary from the evaluation on; a resume in the middle of an evaluation enters here."""
        runner, state = self.runner, self.state
        metrics: dict[str, Any] = {}
        if evaluate:
            if state.phase != "evaluate":
                open_split = runner.split if runner.split in self.train_splits else None
                if open_split is not None and (self.rows_by_step or not epoch_ended):
                    state.row[open_split] = runner.read_training(open_split, reset=self.rows_by_step)
                state.phase, state.epoch_ended = "evaluate", epoch_ended
            if self.evaluate_splits:
                try:
                    metrics = runner.evaluate(self.evaluate_splits)
                except EvaluationInterrupted:
                    self._stop()
                    return
                crash_point("evaluate.end")
            state.phase, state.evaluated_step = "train", state.global_step
        improved = False
        if evaluate or (epoch_ended and not self.rows_by_step):
            row, state.row = {**state.row, **metrics}, {}
            improved = runner.settle_row(row, index=self._row_index(epoch_ended), scored=evaluate)
        runner.step_schedulers(epoch_ended=epoch_ended, evaluated=metrics if evaluate else None)
        if epoch_ended:
            runner.emit("epoch_end", metrics=runner.latest_result)
            crash_point("epoch.end")
        if evaluate and runner.patience_exhausted:
            self.ending = "patience"
        stop, save = runner.requests()
        if stop:
            self._stop()
        elif not self.over and (improved or save or self._due(self.save_at, updated, epoch_ended)):
            runner.save_periodically()
        else:
            runner.report_saves()

    def _stop(self) -> None:
        """Save what stands and end the loop."""
        self.ending = "stop"
        self.runner.emit("stop", **self.runner.stop_request())
        self.runner.prepare_for_shutdown_checkpoint()
        self.runner.save_checkpoint()

    def _row_index(self, epoch_ended: bool) -> int:
        if self.rows_by_step:
            return self.state.global_step
        return self.state.epoch if epoch_ended or self.complete else self.state.epoch + 1

    # Triggers

    def _due(self, interval: Interval, updated: bool, epoch_ended: bool) -> bool:
        if not interval.count:
            return False
        if interval.unit == "epochs":
            return epoch_ended and self.state.epoch % interval.count == 0
        return updated and self.state.global_step % interval.count == 0

    def _next_trigger(self) -> float:
        """The first step from now on at which a boundary has something to do; end of data and requests aside."""
        step = self.state.global_step
        counts = [self.log_every, *(i.count for i in (self.evaluate_at, self.save_at) if i.unit == "steps")]
        following = [(step // count + 1) * count for count in counts if count]
        if self.runner.is_step_mode:
            following.append(self.runner.steps)
        return min(following, default=float("inf"))


def _fail_unstepped(count: int) -> NoReturn:
    raise RuntimeError(
        f"train_step must call advance(loss), or backward(loss) and then step(), exactly once; step ran {count} times"
    )


def _fail_output(output: Any) -> NoReturn:
    raise TypeError(
        "train_step must return (prediction, loss), with None for a loss that is not to be recorded; "
        f"got {type(output).__name__}"
    )
