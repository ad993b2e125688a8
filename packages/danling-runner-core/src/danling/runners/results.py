"""The history of a run: one row of metrics per evaluation, which one is the best, and when to lose patience."""

from __future__ import annotations

import bisect
import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .atomic import read_json, write_json
from .crash import crash_point
from .scores import choose_score_split, find_score, is_better, score_direction


class Results:
    """Rows `{split: {metric: value}}` ordered by index: complete epochs in epoch mode, `global_step` in step mode.

    Args:
        unit: `"epoch"` or `"step"`: what the index counts.
        score_split: split the score is read from; None chooses the validation split at the first use.
        score_name: metric name, or dotted path into nested metrics.
        score_mode: `min`, `max`, or `auto` (see `score_direction`).
        higher_is_better: what the metric declares about itself.
        patience: evaluations in a row without a new best before `exhausted`; None is never.

    Examples:
        >>> results = Results(score_name="accuracy")
        >>> results.append({"val": {"accuracy": 0.5}}, 1)
        >>> results.append({"val": {"accuracy": 0.75}}, 2)
        >>> results.append({"val": {"accuracy": 0.75}}, 3)
        >>> results.best_index, results.best_score, results.is_best
        (2, 0.75, False)
        >>> results.latest_result
        {'index': 3, 'val': {'accuracy': 0.75}}
    """

    def __init__(
        self,
        unit: str = "epoch",
        *,
        score_split: str | None = None,
        score_name: str = "loss",
        score_mode: str = "auto",
        higher_is_better: bool | None = None,
        patience: int | None = None,
    ) -> None:
        self.unit = unit
        self.score_split = score_split
        self.score_name = score_name
        self.score_mode = score_mode
        self.higher_is_better = higher_is_better
        self.patience = patience
        self.stale = 0
        self._rows: dict[int, dict[str, Any]] = {}
        self._order: list[int] = []
        self._kept: tuple[int, dict[str, Any]] | None = None  # a row that was the best before another took its place
        self._warned = False

    # ---------------------------------------------------------------- rows

    def append(self, row: Mapping[str, Any], index: int) -> None:
        """Add a row, or merge it into the one that is there under the same index.

        Args:
            row: `{split: {metric: value}}`; values are numbers, or nested mappings and lists of them.
            index: complete epochs, or `global_step`.

        Raises:
            ValueError: the index is negative.
            TypeError: the row does not say to which split each metric belongs.
        """
        if index < 0:
            raise ValueError(f"a results index counts epochs or steps from 0, got {index}")
        if not isinstance(row, Mapping) or not all(isinstance(metrics, Mapping) for metrics in row.values()):
            raise TypeError(f"a row of results is {{split: {{metric: value}}}}, got {row!r}")
        if index not in self._rows:
            bisect.insort(self._order, index)
            self._rows[index] = {}
        _merge(self._rows[index], row)
        self._check_score(index)

    def keep_best(self, index: int) -> None:
        """Remember the row of an index if it is the best: another evaluation of the same epoch is to take its place.

        Examples:
            >>> results = Results()
            >>> for loss in (0.5, 0.75):
            ...     results.keep_best(1)
            ...     results.append({"val": {"loss": loss}}, 1)
            >>> results.best_result, results.is_best
            ({'index': 1, 'val': {'loss': 0.5}}, False)
        """
        best = self._best()
        if best is not None and index in self._rows and best[1] is self._rows[index]:
            self._kept = index, copy.deepcopy(best[1])

    def __len__(self) -> int:
        return len(self._order)

    def __bool__(self) -> bool:
        return bool(self._order)

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self._rows[index])

    @property
    def indices(self) -> list[int]:
        """All indices, ascending."""
        return list(self._order)

    def rows(self) -> dict[int, dict[str, Any]]:
        """All rows by index, ascending; copies."""
        return {index: copy.deepcopy(self._rows[index]) for index in self._order}

    @property
    def latest_result(self) -> dict[str, Any] | None:
        """A copy of the last row with its `index`; None without rows."""
        return self._result(self._order[-1]) if self._order else None

    @property
    def best_result(self) -> dict[str, Any] | None:
        """A copy of the best row with its `index`; None when no row has a score."""
        best = self._best()
        return None if best is None else {"index": best[0], **copy.deepcopy(best[1])}

    def _result(self, index: int) -> dict[str, Any]:
        return {"index": index, **copy.deepcopy(self._rows[index])}

    # --------------------------------------------------------------- score

    @property
    def direction(self) -> str:
        """`"min"` or `"max"`: which score is the best."""
        return score_direction(self.score_name, self.score_mode, self.higher_is_better)

    def fix_score_split(self, splits: Iterable[str] = ()) -> str | None:
        """Settle the split the score is read from, once, and return it.

        Args:
            splits: the splits that will be evaluated, in order; without any, those of the first row.
        """
        if self.score_split is None:
            self.score_split = choose_score_split(splits)
        if self.score_split is None and self._order:
            self.score_split = choose_score_split(self._rows[self._order[0]])
        return self.score_split

    def score_at(self, index: int) -> float | None:
        """The score of one row; None when the row has none."""
        return self._score(self._rows[index])

    def _score(self, row: Mapping[str, Any]) -> float | None:
        return find_score(row, self.fix_score_split(), self.score_name)

    @property
    def scores(self) -> dict[int, float]:
        """The score by index, of the rows that have one."""
        found = ((index, self.score_at(index)) for index in self._order)
        return {index: score for index, score in found if score is not None}

    @property
    def latest_score(self) -> float | None:
        """The score of the last row; None when it has none."""
        return self.score_at(self._order[-1]) if self._order else None

    @property
    def best_index(self) -> int | None:
        """The index of the best row, the earliest of several; None when no row has a score that is a number."""
        best = self._best()
        return None if best is None else best[0]

    def _best(self) -> tuple[int, dict[str, Any]] | None:
        best, best_score, direction = None, None, self.direction
        rows = [(index, self._rows[index]) for index in self._order]
        if self._kept is not None:  # it came before the one in its place
            rows.insert(bisect.bisect_left(self._order, self._kept[0]), self._kept)
        for index, row in rows:
            score = self._score(row)
            if is_better(score, best_score, direction):
                best, best_score = (index, row), score
        return best

    @property
    def best_score(self) -> float | None:
        """The score of the best row."""
        best = self._best()
        return None if best is None else self._score(best[1])

    @property
    def is_best(self) -> bool:
        """Whether the last row is the best: True without rows, False when it has no score, ties go to the earlier."""
        best = self._best()
        return not self._order or best is not None and best[1] is self._rows[self._order[-1]]

    def _check_score(self, index: int, *, complete: bool = False) -> None:
        if self._warned or self.score_at(index) is not None:
            return
        split = self.score_split
        row = self._rows[index].get(split) if split is not None else None
        if row is None and not complete:  # the split may be merged into the row later
            return
        self._warned = True
        if row is None:
            problem = f"no split {split!r} was evaluated ({', '.join(self._rows[index]) or 'none was'})"
        else:
            names = ", ".join(map(str, row)) if isinstance(row, Mapping) else "nothing"
            problem = f"{self.score_name!r} is not a number among the metrics of split {split!r} ({names})"
        warnings.warn(f"there is no score: {problem}; set score_name and score_split", UserWarning, stacklevel=3)

    # ------------------------------------------------------------ patience

    def count_evaluation(self, *, scored: bool = True) -> bool:
        """Count one complete evaluation of the last row; returns `exhausted`.

        Args:
            scored: whether a score is to be expected; without one, this is warned about once.
        """
        if scored and self._order:
            self._check_score(self._order[-1], complete=True)
        self.stale = 0 if self.is_best else self.stale + 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row brought no new best."""
        return self.patience is not None and self.stale >= self.patience

    # --------------------------------------------------------------- state

    def score_info(self) -> dict[str, Any]:
        """The split, name and direction of the score."""
        return {"split": self.fix_score_split(), "name": self.score_name, "mode": self.direction}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, ready for JSON."""
        return {
            "unit": self.unit,
            "score_split": self.score_split,
            "stale": self.stale,
            "rows": {str(index): copy.deepcopy(self._rows[index]) for index in self._order},
            "kept": None if self._kept is None else [self._kept[0], copy.deepcopy(self._kept[1])],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the history; the score's name, mode and patience stay those of this run.

        Raises:
            ValueError: the saved rows are counted in another unit.
        """
        if state["unit"] != self.unit and state["rows"]:
            raise ValueError(f"the saved results are counted in {state['unit']}s, this run counts {self.unit}s")
        self._rows = {int(index): copy.deepcopy(dict(row)) for index, row in state["rows"].items()}
        self._order = sorted(self._rows)
        kept = state.get("kept")
        self._kept = None if kept is None else (int(kept[0]), copy.deepcopy(dict(kept[1])))
        self.stale = int(state["stale"])
        if self.score_split is None:
            self.score_split = state["score_split"]

    # --------------------------------------------------------------- files

    def as_dict(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `results.json`.

        Args:
            header: `name`, `id`, `uuid`, `config_id` and `timestamp` of the run.
        """
        return {
            **{key: header.get(key) for key in ("name", "id", "uuid", "config_id", "timestamp")},
            "unit": self.unit,
            "score": self.score_info(),
            "best_index": self.best_index,
            "results": {str(index): self._rows[index] for index in self._order},
        }

    def row_dict(
        self,
        index: int,
        header: Mapping[str, Any],
        position: Mapping[str, Any] | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The content of `latest.json` or `best.json`: one row with where it belongs.

        Args:
            index: which row.
            header: as in `as_dict`.
            position: `global_step` and `epoch` at which the row was complete.
            row: a row that has lost its place at the index; None is the one there.
        """
        position = position or {}
        row = self._rows[index] if row is None else row
        return {
            **{key: header.get(key) for key in ("name", "id", "timestamp")},
            "index": index,
            "global_step": position.get("global_step", index if self.unit == "step" else None),
            "epoch": position.get("epoch", index if self.unit == "epoch" else None),
            "score": self._score(row),
            **copy.deepcopy(dict(row)),
        }

    def write(
        self, directory: str | os.PathLike[str], header: Mapping[str, Any], position: Mapping[str, Any] | None = None
    ) -> None:
        """Write `results.json`, `latest.json` and, when the last row is the best or there is none yet, `best.json`.

        Args:
            directory: the run directory.
            header: as in `as_dict`.
            position: `global_step` and `epoch` of the last row.

        Raises:
            OSError: a file cannot be written; those before it are complete, the others as they were.
        """
        directory = Path(directory)
        write_json(directory / "results.json", self.as_dict(header))
        crash_point("results.write")
        if not self._order:
            return
        write_json(directory / "latest.json", self.row_dict(self._order[-1], header, position))
        if (best := self._best()) is not None:
            content = self.row_dict(best[0], header, position if self.is_best else None, best[1])
            if self.is_best or not _names(directory / "best.json", content):
                write_json(directory / "best.json", content)


def _names(path: Path, content: Mapping[str, Any]) -> bool:
    try:
        stored = read_json(path)
        return all(stored.get(key) == content[key] for key in ("index", "score"))
    except (OSError, ValueError, AttributeError):
        return False


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping):
            node = target.get(key)
            if not isinstance(node, dict):
                node = target[key] = {}
            _merge(node, value)
        else:
            target[key] = value
