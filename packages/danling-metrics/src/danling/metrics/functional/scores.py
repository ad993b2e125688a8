"""Metrics of scores: ranking, calibration and likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pieces import ENTRIES, ROWS, Calibration, LogLoss, Ndcg, Piece
from ..state import state_from
from .descriptor import MetricFunc, check_average, defined_mean


class RankingMetric(MetricFunc):
    """Base of AUROC and average precision: one value per class, averaged over those that are defined.

    `"weighted"` weights classes by their positives; `"micro"` ranks the scores of all classes together.
    """

    label = ""
    lacks = ""

    def __init__(self, *, average: str | None = "macro", **options: Any) -> None:
        super().__init__(**{"scores": True, "higher_is_better": True, **options})
        self.average = check_average(average)

    def area(self, ranking: Any) -> float:
        """Return the value of one class."""
        raise NotImplementedError

    def bound(self, ranking: Any) -> float:
        """Return the binning error bound of one class."""
        raise NotImplementedError

    def __call__(self, state: Any) -> Tensor:
        ranking = self.ranked(state_from(self, state))
        values = torch.tensor([self.area(r) for r in ranking], dtype=torch.float64)
        if undefined := torch.isnan(values).nonzero().flatten().tolist():
            single = len(values) == 1
            which = f" of {'label' if self.task == 'multilabel' else 'class'} {', '.join(map(str, undefined))}"
            rest = "" if len(undefined) == len(values) or self.average is None else "; the others are averaged"
            state.note(f"{self.label}{'' if single else which} is undefined: {self.lacks}{rest}")
        return self.combine(values, ranking)

    def ranked(self, state: Any) -> Any:
        """Return the ranking that is averaged: one per class, or one of all classes."""
        return state.pooled_ranking if self.average == "micro" and self.task != "binary" else state.ranking

    def error_bound(self, state: Any) -> Tensor:
        """Return how far binning may have moved the value."""
        ranking = self.ranked(state)
        return self.combine(torch.tensor([self.bound(r) for r in ranking], dtype=torch.float64), ranking)

    def combine(self, values: Tensor, ranking: Any) -> Tensor:
        """Average the values of the classes."""
        if self.task == "binary" or self.average == "micro":
            return values[0]
        if self.average is None:
            return values
        weights = torch.tensor([r.positives for r in ranking]) if self.average == "weighted" else None
        return defined_mean(values, weights)


class Auroc(RankingMetric):
    """Area under the ROC curve: the share of pairs of a positive and a negative that are in order, ties one half."""

    label = "AUROC"
    lacks = "only one class is present"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "auroc", **options})

    def area(self, ranking: Any) -> float:
        return ranking.auroc

    def bound(self, ranking: Any) -> float:
        return ranking.auroc_bound


class Auprc(RankingMetric):
    """Average precision: the mean over positives of the precision at their score; tied scores are one threshold."""

    label = "AUPRC"
    lacks = "there are no positives"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "auprc", **options})

    def area(self, ranking: Any) -> float:
        return ranking.auprc

    def bound(self, ranking: Any) -> float:
        return ranking.auprc_bound


class CalibrationError(MetricFunc):
    """Distance of confidence and accuracy over equal confidence bins: mean (l1), root mean square (l2) or max.

    The confidence is the probability of the positive class (binary) or the highest one (multiclass).
    """

    def __init__(self, *, n_bins: int = 15, norm: str = "l1", **options: Any) -> None:
        super().__init__(**{"name": "calibration_error", "higher_is_better": False, **options})
        if norm not in ("l1", "l2", "max"):
            raise ValueError(f"norm must be 'l1', 'l2' or 'max', got {norm!r}")
        if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
            raise ValueError(f"n_bins must be a positive integer, got {n_bins!r}")
        self.n_bins = n_bins
        self.norm = norm

    def sums(self) -> tuple[Piece, ...]:
        return (Calibration(self.view, self.n_bins),)

    def __call__(self, state: Any) -> Tensor:
        count, confidence, hits = state_from(self, state).piece(self.sums()[0])
        gap = torch.where(count > 0, (confidence - hits).abs() / count.clamp(min=1), 0)
        share = count / count.sum()
        if self.norm == "max":
            return gap.max()
        return (gap * share).sum() if self.norm == "l1" else (gap**2 * share).sum().sqrt()


class LogLossMetric(MetricFunc):
    """Mean negative log-likelihood in nats: per row, or per valid entry for labels."""

    exponential = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "log_loss", "higher_is_better": False, **options})

    def sums(self) -> tuple[Piece, ...]:
        return (LogLoss(self.view),)

    def __call__(self, state: Any) -> Tensor:
        state = state_from(self, state)
        checks = state.source.checks(self.view)
        loss = state.piece(self.sums()[0])[0] / checks[ENTRIES if self.task == "multilabel" else ROWS]
        return loss.exp() if self.exponential else loss


class Perplexity(LogLossMetric):
    """Exponential of the mean negative log-likelihood over valid tokens."""

    exponential = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "perplexity", **options})


class NdcgMetric(MetricFunc):
    """Mean over queries of the normalised discounted cumulative gain; ties share their gain."""

    def __init__(self, *, top_k: int | None = None, **options: Any) -> None:
        super().__init__(**{"name": "ndcg", "task": "ranking", "higher_is_better": True, **options})
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}")
        self.top_k = top_k

    def sums(self) -> tuple[Piece, ...]:
        return (Ndcg(self.view, self.top_k),)

    def __call__(self, state: Any) -> Tensor:
        total, queries = state_from(self, state).piece(self.sums()[0])
        return total / queries


def perplexity(
    num_classes: int | None = None, *, ignore_index: int | None = -100, name: str = "perplexity"
) -> Perplexity:
    """Return the perplexity over valid tokens: exp of the mean negative log-likelihood.

    Args:
        num_classes: size of the vocabulary; taken from the data if None.
        ignore_index: target value that does not count.
        name: key in results.

    Examples:
        >>> from danling.metrics import OnlineMetrics
        >>> metrics = OnlineMetrics(perplexity(), from_logits=True)
        >>> metrics.update(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.long))
        >>> round(metrics.avg.perplexity, 4)
        8.0
    """
    return Perplexity(task="multiclass", num_classes=num_classes, ignore_index=ignore_index, name=name)


def ndcg(top_k: int | None = None, *, ignore_index: int | None = -100, name: str = "ndcg") -> NdcgMetric:
    """Return the mean normalised discounted cumulative gain; each row of `(queries, documents)` is a query.

    Args:
        top_k: number of documents that count, all if None.
        ignore_index: relevance that marks a document as missing.
        name: key in results.

    Examples:
        >>> from danling.metrics import GlobalMetrics
        >>> metrics = GlobalMetrics(ndcg())
        >>> metrics.update(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[3, 2, 1]]))
        >>> metrics.avg.ndcg
        1.0
    """
    return NdcgMetric(top_k=top_k, ignore_index=ignore_index, name=name)
