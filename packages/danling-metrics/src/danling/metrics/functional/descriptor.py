"""`MetricFunc`: a metric as a description of what it reads and a function of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chunk import View
from ..inputs import TASKS, Spec
from ..pieces import Checks, Confusion, Histogram, Moments, Piece

AVERAGES = ("micro", "macro", "weighted", None)


class MetricFunc:
    """A metric: what state it reads, and a function of that state without side effects.

    Containers own the state and hold each needed piece once, however many metrics read it. To write a metric of your
    own, declare what it reads and implement `__call__`, which gets a `MetricState` and returns a scalar or a vector.

    Args:
        name: key under which containers report it.
        preds_targets: reads `state.preds` and `state.targets`.
        confmat: reads `state.confmat` or `state.stats`.
        scores: reads `state.ranking`.
        moments: reads `state.moments`: count, means, central second moments `m2_*`, cross moment `cross` and error
            sums `absolute`, `squared`, `relative` per output.
        task: `"binary"`, `"multiclass"`, `"multilabel"`, `"regression"`, or None for the task of its container.
        num_classes: number of classes (multiclass).
        num_labels: number of labels (multilabel).
        threshold: probability above which a binary or multilabel prediction is positive; 0.5 if None.
        ignore_index: target value that does not count; no number is left out for regression.
        higher_is_better: direction of improvement, None if there is none.

    Raises:
        ValueError: unknown task, or a confusion matrix of unknown size.

    Examples:
        >>> class Prevalence(MetricFunc):
        ...     def __init__(self):
        ...         super().__init__(name="prevalence", confmat=True, task="binary")
        ...     def __call__(self, state):
        ...         return state.stats.support / state.stats.total
        >>> from danling.metrics import GlobalMetrics
        >>> metrics = GlobalMetrics(Prevalence())
        >>> metrics.update(torch.tensor([0.9, 0.2, 0.4, 0.3]), torch.tensor([1, 0, 0, 0]))
        >>> metrics.avg
        RoundDict({'prevalence': 0.25})
    """

    def __init__(
        self,
        *,
        name: str,
        preds_targets: bool = False,
        confmat: bool = False,
        scores: bool = False,
        moments: bool = False,
        task: str | None = None,
        num_classes: int | None = None,
        num_labels: int | None = None,
        threshold: float | None = None,
        ignore_index: int | None = -100,
        higher_is_better: bool | None = None,
    ) -> None:
        if task is not None and task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)} or None, got {task!r}")
        for key, count in (("num_classes", num_classes), ("num_labels", num_labels)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{key} must be a positive integer, got {count!r}")
        if task is None and num_classes is not None:
            task = "multiclass"
        if task is None and num_labels is not None:
            task = "multilabel"
        if confmat and task == "multiclass" and num_classes is None:
            raise ValueError(f"metric {name!r} counts classes, so it needs num_classes")
        if confmat and task == "multilabel" and num_labels is None:
            raise ValueError(f"metric {name!r} counts labels, so it needs num_labels")
        if threshold is not None and not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
        self.name = name
        self.preds_targets = preds_targets
        self.confmat = confmat
        self.scores = scores
        self.moments = moments
        self.task = task
        self.num_classes = num_classes
        self.num_labels = num_labels
        self.num_outputs: int | None = 1 if task == "regression" else None
        self.threshold = 0.5 if threshold is None else float(threshold)
        self.ignore_index = None if task == "regression" else ignore_index
        self.ignore_nan = False
        self.higher_is_better = higher_is_better
        self.k = 1

    def __call__(self, state: Any) -> Any:
        """Return the value on a state."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(state)")

    @property
    def view(self) -> View:
        """Which targets are left out."""
        return View(self.ignore_index, self.ignore_nan)

    @property
    def spec(self) -> Spec:
        """What a row is for this metric."""
        width = {
            "binary": 1,
            "multiclass": self.num_classes,
            "multilabel": self.num_labels,
            "regression": self.num_outputs,
        }.get(self.task or "")
        return Spec(self.task, width)

    @property
    def confusion(self) -> Confusion:
        """The confusion matrix this metric reads."""
        return Confusion(self.view, self.threshold, self.k)

    def sums(self) -> tuple[Piece, ...]:
        """Further state pieces that this metric reads."""
        return ()

    def pieces(self, bins: int | None = None) -> tuple[Piece, ...]:
        """Return the state this metric reads, besides rows.

        Args:
            bins: number of score bins; None where rows are kept instead.
        """
        pieces: list[Piece] = [Checks(self.view, self.task == "ranking")]
        if self.confmat:
            pieces.append(self.confusion)
        if self.scores and bins is not None:
            pieces.append(Histogram(self.view, bins))
        if self.moments:
            pieces.append(Moments(self.view))
        return (*pieces, *self.sums())

    def describe(self) -> dict[str, Any]:
        """Return class and options as plain values, equal on ranks that hold the same metric."""
        options = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        return {"class": type(self).__name__} | {
            k: v if isinstance(v, (bool, int, float, str, type(None))) else _plain(v) for k, v in options.items()
        }

    def __repr__(self) -> str:
        given = {"num_classes": self.num_classes, "num_labels": self.num_labels}
        shown = [repr(self.name), *(f"{k}={v}" for k, v in given.items() if v is not None)]
        return f"{type(self).__name__}({', '.join(shown)})"


class CallableMetric(MetricFunc):
    """A plain callable `(preds, targets)` as a metric; it gets the valid rows as given."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], name: str | None = None) -> None:
        super().__init__(name=name or callable_name(function), preds_targets=True)
        self.function = function

    def __call__(self, state: Any) -> Any:
        source = getattr(state, "source", None)
        if source is None:
            return self.function(state.preds, state.targets)
        return self.function(*source.valid_rows(state.view, probabilities=False))


def callable_name(function: Any) -> str:
    """Return the name of a callable, or of what a partial wraps."""
    while hasattr(function, "func"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_average(average: str | None) -> str | None:
    """Return `average`, or raise `ValueError` if it is not known."""
    if average not in AVERAGES:
        raise ValueError(f"average must be one of 'micro', 'macro', 'weighted' or None, got {average!r}")
    return average


def defined_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the values that are not NaN; NaN if there are none."""
    keep = ~torch.isnan(values)
    weights = keep.to(values.dtype) if weights is None else torch.where(keep, weights.to(values.dtype), 0)
    total = weights.sum()
    return torch.where(total > 0, (torch.where(keep, values, 0) * weights).sum() / total, float("nan"))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(k): _plain(item) for k, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    return callable_name(value) if callable(value) else str(value)
