"""Metrics of a confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pieces import ExactMatch, Piece
from ..state import count_stats, state_from
from .descriptor import MetricFunc, check_average, defined_mean

Ratio = Callable[[Any, bool, float], tuple[Tensor, Tensor]]


def _accuracy(s: Any, multiclass: bool, beta: float) -> tuple[Tensor, Tensor]:
    return (s.tp, s.support) if multiclass else (s.tp + s.tn, s.total)


def _errors(s: Any, multiclass: bool, beta: float) -> tuple[Tensor, Tensor]:
    return _accuracy(s, multiclass, beta)


def _fbeta(s: Any, multiclass: bool, beta: float) -> tuple[Tensor, Tensor]:
    square = beta * beta
    return (1 + square) * s.tp, (1 + square) * s.tp + square * s.fn + s.fp


# Suffix: key, numerator and denominator per class, and whether more is better.
RATIOS: dict[str, tuple[str, Ratio, bool]] = {
    "accuracy": ("acc", _accuracy, True),
    "precision": ("precision", lambda s, multiclass, beta: (s.tp, s.tp + s.fp), True),
    "recall": ("recall", lambda s, multiclass, beta: (s.tp, s.support), True),
    "specificity": ("specificity", lambda s, multiclass, beta: (s.tn, s.tn + s.fp), True),
    "f1_score": ("f1", _fbeta, True),
    "fbeta_score": ("fbeta", _fbeta, True),
    "hamming_loss": ("hamming_loss", _errors, False),
    "jaccard_index": ("jaccard", lambda s, multiclass, beta: (s.tp, s.tp + s.fp + s.fn), True),
    "iou": ("iou", lambda s, multiclass, beta: (s.tp, s.tp + s.fp + s.fn), True),
}


class CountMetric(MetricFunc):
    """A ratio of counts per class, averaged over classes.

    `"micro"` divides the sums of the counts; `"macro"` is the mean over classes that occur in targets or predictions
    (over all labels for multilabel); `"weighted"` weights classes by their targets; None gives one value per class.
    """

    def __init__(
        self,
        suffix: str,
        *,
        average: str | None = "macro",
        beta: float = 1.0,
        zero_division: float = 0.0,
        k: int = 1,
        **options: Any,
    ) -> None:
        key, _, better = RATIOS[suffix]
        super().__init__(**{"name": key, "confmat": True, "higher_is_better": better, **options})
        if beta < 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.suffix = suffix
        self.average = check_average(average)
        self.beta = float(beta)
        self.zero_division = float(zero_division)
        self.k = check_k(k, self.num_classes)

    def __call__(self, state: Any) -> Tensor:
        stats = count_stats(state_from(self, state).confmat, self.task == "multiclass")
        multiclass = self.task == "multiclass"
        loss = self.suffix == "hamming_loss"
        fallback = 0.0 if self.suffix in ("accuracy", "hamming_loss") else self.zero_division
        numerator, denominator = (x.to(torch.float64) for x in RATIOS[self.suffix][1](stats, multiclass, self.beta))
        if self.average == "micro":
            numerator, denominator = numerator.sum(), denominator.sum()
        score = torch.where(denominator > 0, numerator / denominator, fallback)
        score = 1 - score if loss else score
        if self.task == "binary" or self.average in ("micro", None):
            return score
        if self.average == "weighted":
            return defined_mean(score, stats.support)
        present = (stats.tp + stats.fp + stats.fn) > 0 if multiclass else torch.ones_like(stats.tp)
        return defined_mean(score, present)


class BalancedAccuracy(MetricFunc):
    """Mean recall over the classes that occur in the targets."""

    def __init__(self, *, average: str | None = "macro", k: int = 1, **options: Any) -> None:
        super().__init__(**{"name": "balanced_accuracy", "confmat": True, "higher_is_better": True, **options})
        if k != 1:
            raise ValueError(f"balanced accuracy is defined for k=1 only, got k={k}")
        if self.task == "multiclass" and average != "macro":
            raise ValueError(f"balanced accuracy of classes is a macro average, got average={average!r}")
        self.average = check_average(average)

    def __call__(self, state: Any) -> Tensor:
        stats = count_stats(state_from(self, state).confmat, self.task == "multiclass")
        if self.task == "multiclass":
            return defined_mean(stats.tp.double() / stats.support)
        tp, fn, tn, fp = stats.tp, stats.fn, stats.tn, stats.fp
        if self.task == "multilabel" and self.average == "micro":
            tp, fn, tn, fp = (x.sum() for x in (tp, fn, tn, fp))
        recalls = torch.stack([tp.double() / (tp + fn), tn.double() / (tn + fp)])
        known = ~torch.isnan(recalls)
        value = torch.where(known, recalls, 0).sum(0) / known.sum(0)
        if self.task == "multilabel" and self.average in ("macro", "weighted"):
            return defined_mean(value, stats.support if self.average == "weighted" else None)
        return value


class CohenKappa(MetricFunc):
    """Agreement beyond chance; NaN if both sides hold one class only."""

    def __init__(self, *, weights: str | None = None, **options: Any) -> None:
        super().__init__(**{"name": "cohen_kappa", "confmat": True, "higher_is_better": True, **options})
        if weights not in (None, "linear", "quadratic"):
            raise ValueError(f"weights must be None, 'linear' or 'quadratic', got {weights!r}")
        self.weights = weights

    def __call__(self, state: Any) -> Tensor:
        confmat = state_from(self, state).confmat.double()
        size = confmat.shape[0]
        distance = (torch.arange(size)[:, None] - torch.arange(size)).abs().to(confmat)
        cost = {None: (distance > 0).to(confmat), "linear": distance, "quadratic": distance**2}[self.weights]
        expected = confmat.sum(1)[:, None] * confmat.sum(0) / confmat.sum()
        return 1 - (cost * confmat).sum() / (cost * expected).sum()


class MatthewsCorrelation(MetricFunc):
    """Matthews correlation coefficient; 0 where a class is missing on one side entirely."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "mcc", "confmat": True, "higher_is_better": True, **options})

    def __call__(self, state: Any) -> Tensor:
        confmat = state_from(self, state).confmat
        confmat = (confmat.sum(0) if confmat.dim() == 3 else confmat).double()
        actual, predicted, total = confmat.sum(1), confmat.sum(0), confmat.sum()
        covariance = confmat.trace() * total - (actual * predicted).sum()
        spread = (total**2 - (predicted**2).sum()) * (total**2 - (actual**2).sum())
        return torch.where(spread > 0, covariance / spread.clamp(min=1).sqrt(), 0.0)


class TopKAccuracy(MetricFunc):
    """Share of rows whose target is among the `k` highest scores; among equal scores the first class comes first."""

    def __init__(self, *, k: int = 5, **options: Any) -> None:
        super().__init__(**{"name": "top_k_accuracy", "confmat": True, "higher_is_better": True, **options})
        self.k = check_k(k, None)

    def __call__(self, state: Any) -> Tensor:
        confmat = state_from(self, state).confmat.double()
        return confmat.trace() / confmat.sum()


class ExactMatchRatio(MetricFunc):
    """Share of samples of which every valid position is right."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "exact_match", "higher_is_better": True, **options})

    def sums(self) -> tuple[Piece, ...]:
        return (ExactMatch(self.view, self.threshold),)

    def __call__(self, state: Any) -> Tensor:
        matched, counted = state_from(self, state).piece(self.sums()[0]).double()
        return matched / counted


def check_k(k: int, classes: int | None) -> int:
    """Return `k`, or raise `ValueError` if it is not a number of classes."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or (classes is not None and k > classes):
        raise ValueError(f"k must be an integer from 1 to the number of classes ({classes}), got {k!r}")
    return k


def mcc(
    *,
    task: str = "binary",
    num_classes: int | None = None,
    num_labels: int | None = None,
    threshold: float = 0.5,
    ignore_index: int | None = -100,
    name: str = "mcc",
) -> MatthewsCorrelation:
    """Return the Matthews correlation coefficient.

    Args:
        task: `"binary"`, `"multiclass"` or `"multilabel"` (labels pooled).
        num_classes: number of classes (multiclass).
        num_labels: number of labels (multilabel).
        threshold: probability above which a prediction is positive (binary, multilabel).
        ignore_index: target value that does not count.
        name: key in results.

    Examples:
        >>> mcc(task="multiclass", num_classes=3)
        MatthewsCorrelation('mcc', num_classes=3)
    """
    if task not in ("binary", "multiclass", "multilabel"):
        raise ValueError(f"task must be 'binary', 'multiclass' or 'multilabel', got {task!r}")
    return MatthewsCorrelation(
        task=task,
        num_classes=num_classes if task == "multiclass" else None,
        num_labels=num_labels if task == "multilabel" else None,
        threshold=threshold,
        ignore_index=ignore_index,
        name=name,
    )
