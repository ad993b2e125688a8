"""The trackers of a run, fed together and disabled one by one when they fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..problems import Problems
from ..scalars import flatten

ERRORS_IN_A_ROW = 3


class Tracker(Protocol):
    """Something that takes scalars on the axis ``global_step``.

    A tracker raises when it fails; `Trackers` counts, and disables it after three failures in a row. It may also have
    ``start(event, global_step)``, told of a start or resume before the first value, and ``state_dict`` and
    ``load_state_dict`` for what continues the same curve after a resume.
    """

    name: str

    def log(self, scalars: Mapping[str, float], *, global_step: int, epoch: int) -> None:
        """Take values named ``{split}/{metric}``."""

    def flush(self) -> None:
        """Hand on what is still held back."""

    def close(self) -> None:
        """Finish. Nothing is logged afterwards."""


class Trackers:
    """Hands each row of metrics to ``metrics.jsonl`` and to every other tracker.

    Args:
        metrics_file: a `MetricsFile`, or None on ranks that write nothing.
        problems: where failures are counted.

    All trackers share one axis, ``global_step``, with ``epoch`` as a scalar beside it. A step below the highest one
    logged so far in this attempt is raised to it, because trackers drop points that go backwards.
    """

    def __init__(self, metrics_file: Any = None, *, problems: Problems | None = None) -> None:
        self.metrics_file = metrics_file
        self.problems = Problems() if problems is None else problems
        self._others: list[Tracker] = []
        self._failures: dict[str, int] = {}
        self._highest_step = 0

    def __iter__(self) -> Any:
        return iter(self._others)

    def __getitem__(self, name: str) -> Tracker:
        for tracker in self._others:
            if tracker.name == name:
                return tracker
        raise KeyError(f"no tracker {name!r}; there are: {', '.join(t.name for t in self._others) or 'none'}")

    def add(self, tracker: Tracker) -> None:
        """Feed this tracker too, from now on."""
        self._others.append(tracker)
        self._failures[tracker.name] = 0

    def start(self, event: str = "start", *, global_step: int = 0, epoch: int = 0, **facts: Any) -> None:
        """Note a start, or ``event="resume"``, which voids earlier lines beyond ``global_step``."""
        self._highest_step = global_step
        if self.metrics_file is not None:
            self.metrics_file.append(event, global_step=global_step, epoch=epoch, values=facts)
        for tracker in tuple(self._others):
            if hasattr(tracker, "start"):
                self._guard(tracker, lambda t: t.start(event, global_step))

    def log(
        self,
        split: str | None,
        values: Mapping[str, Any],
        *,
        global_step: int,
        epoch: int,
        event: str = "log",
    ) -> None:
        """Hand on one row.

        Args:
            split: the data split the values are about, or None.
            values: numbers, nested mappings of numbers (joined with a dot), 0-d arrays. What is not a scalar is left
                out.
            global_step: applied updates so far.
            epoch: complete epochs so far.
            event: log, evaluate or epoch.
        """
        scalars = flatten(values)
        if self.metrics_file is not None:
            self.metrics_file.append(event, global_step=global_step, epoch=epoch, split=split, values=scalars)
        if not self._others:
            return
        self._highest_step = step = max(global_step, self._highest_step)
        named = {f"{split}/{name}" if split else name: value for name, value in scalars.items()}
        for tracker in tuple(self._others):
            self._guard(tracker, lambda t: t.log(named, global_step=step, epoch=epoch))

    def sync(self) -> None:
        """Make everything durable; called with each checkpoint."""
        if self.metrics_file is not None:
            self.metrics_file.sync()
        for tracker in tuple(self._others):
            self._guard(tracker, lambda t: t.flush())

    def state_dict(self) -> dict[str, Any]:
        """What trackers need to continue the same curve, such as the id of a W&B run."""
        return {t.name: t.state_dict() for t in self._others if hasattr(t, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; trackers that are not in ``state`` begin anew."""
        for tracker in self._others:
            if tracker.name in state and hasattr(tracker, "load_state_dict"):
                tracker.load_state_dict(state[tracker.name])

    def close(self) -> None:
        """Close every tracker. Idempotent."""
        while self._others:
            tracker = self._others.pop()
            try:
                tracker.close()
            except Exception as error:
                self.problems.add(tracker.name, error)
        if self.metrics_file is not None:
            self.metrics_file.close()

    def _guard(self, tracker: Tracker, call: Any) -> None:
        try:
            call(tracker)
        except Exception as error:  # whatever a tracker raises must not cost the run
            self.problems.add(tracker.name, error)
            self._failures[tracker.name] += 1
            if self._failures[tracker.name] >= ERRORS_IN_A_ROW:
                self._others.remove(tracker)
                self.problems.add(tracker.name, f"disabled after {ERRORS_IN_A_ROW} errors in a row")
                self.problems.logger.error("%s is disabled: %d errors in a row", tracker.name, ERRORS_IN_A_ROW)
        else:
            self._failures[tracker.name] = 0
