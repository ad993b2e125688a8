"""The progress bar of a run, over its whole budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..text import format_duration, values_line

REDRAW_SECONDS = 0.25
SHOWN = ("loss", "lr", "grad_norm")


class Progress:
    """A bar over the whole budget, and a second one beneath it while an evaluation runs.

    `advance` is called after every update and costs one reading of the clock; a loop that counts every microsecond may
    call it from `due` on and once before anything else is shown. The bar is drawn at most four times a second. Neither
    ``sys.stdout`` nor ``sys.stderr`` is redirected. Without ``console`` nothing is drawn and every call is cheap.

    Args:
        console: a ``rich.console.Console``, or None.
        total: updates in the whole budget, None if unknown.
        completed: updates already done by earlier attempts.
        epochs: epochs in the budget, None in step mode.

    Attributes:
        due: when it is drawn again, on the clock of `time.monotonic`.
    """

    def __init__(
        self, console: Any = None, *, total: int | None = None, completed: int = 0, epochs: int | None = None
    ) -> None:
        self.total, self.epochs = total, epochs
        self._console = console
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._values = ""
        self.due = 0.0 if console is not None else float("inf")
        self._rate = _Rate(completed)
        self._step, self._epoch = completed, 0
        if console is not None:
            self._bars = _bars(console)
            self._tasks["train"] = self._bars.add_task(self._label(), total=total, completed=completed, info="")
            self._bars.start()
            console.show_cursor(True)  # rich hides it; a process that is killed could not bring it back

    @property
    def live(self) -> bool:
        """Whether a bar is on the screen."""
        return self._bars is not None

    @property
    def console(self) -> Any:
        """The rich console the bar is drawn on, or None."""
        return self._console

    def advance(self, global_step: int, epoch: int) -> None:
        """Note that an update is done; draws if the last drawing is old enough."""
        self._step, self._epoch = global_step, epoch
        if time.monotonic() >= self.due:
            self._draw()

    def log(self, values: Mapping[str, Any]) -> None:
        """Show the loss, learning rates and gradient norm among these values from the next drawing on."""
        self._values = values_line({name: v for name, v in values.items() if name.startswith(SHOWN)})

    def start_evaluation(self, split: str, total: int | None) -> None:
        """Show a second bar of ``total`` batches."""
        if self._bars is not None:
            self.end_evaluation()
            self._bars.update(self._tasks["train"], completed=self._step)
            self._tasks["evaluate"] = self._bars.add_task(f"  {split}", total=total, info="")
            self.due = 0.0

    def advance_evaluation(self, batches: int) -> None:
        """Note how many batches of the evaluation are done."""
        if time.monotonic() >= self.due and "evaluate" in self._tasks:
            self._bars.update(self._tasks["evaluate"], completed=batches)
            self._draw()

    def end_evaluation(self) -> None:
        """Take the second bar away."""
        if (task := self._tasks.pop("evaluate", None)) is not None:
            self._bars.remove_task(task)
            self._draw()

    def close(self, global_step: int | None = None, epoch: int | None = None) -> None:
        """Draw the last state and leave it on the screen. Idempotent."""
        if self._bars is None:
            return
        self.end_evaluation()
        self._step = self._step if global_step is None else global_step
        self._epoch = self._epoch if epoch is None else epoch
        self._draw()
        self._bars.stop()
        self._bars, self.due = None, float("inf")

    def _label(self) -> str:
        if self.epochs is None:
            return "step"
        return f"epoch {min(self._epoch + 1, self.epochs)}/{self.epochs}"

    def _draw(self) -> None:
        now = time.monotonic()
        speed = self._rate.update(self._step, now)
        info = []
        if speed:
            info.append(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")
            if self.total is not None and self._step < self.total:
                info.append(f"ETA {format_duration((self.total - self._step) / speed)}")
        if self._values:
            info.append(self._values)
        if self._bars is not None:
            self._bars.update(
                self._tasks["train"], description=self._label(), completed=self._step, info="  ".join(info)
            )
            self._bars.refresh()
        self.due = now + REDRAW_SECONDS


class _Rate:
    """Updates per second of this attempt, evaluations and saves included, so that the ETA is honest about them.

    The clock starts at the first update seen, which leaves out compilation and the start of the loaders.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.since: float | None = None

    def update(self, step: int, now: float) -> float | None:
        if self.since is None:
            if step > self.step:
                self.step, self.since = step, now
            return None
        return (step - self.step) / (now - self.since) if step > self.step and now > self.since else None


def _bars(console: Any) -> Any:
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[info]}"),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
