"""What AUROC, average precision and their curves share: for each class, the scores of its positives and how many
positives and negatives score higher.

Between two positives a ROC curve runs level and a precision-recall curve only falls, so the positives alone determine
both areas and all corners. One sort of the scores (values only) and a search of the positives in it give exact integer
ranks; ties are one threshold. The binned form has the same four vectors, one entry per bin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")


@dataclass
class ClassRanking:
    """The ranking of one class; one entry per positive (exact), or per bin with positives or negatives (binned).

    Attributes:
        weight: positives an entry stands for, int64.
        true_above: positives with a higher score than the entry, int64.
        false_above: negatives with a higher score, int64.
        false_equal: negatives with the same score, int64.
        true_equal: positives with the same score, the entry included, int64.
        threshold: the score of the entry, or the lower edge of its bin (as a logit).
        positives, negatives: totals.
    """

    weight: Tensor
    true_above: Tensor
    false_above: Tensor
    false_equal: Tensor
    true_equal: Tensor
    threshold: Tensor
    positives: int
    negatives: int

    @property
    def auroc(self) -> float:
        """Share of pairs of a positive and a negative that are in order, ties one half; NaN with one class only."""
        if not (self.positives and self.negatives):
            return NAN
        below = 2 * (self.negatives - self.false_above) - self.false_equal
        return int((self.weight * below).sum()) / (2 * self.positives * self.negatives)

    @property
    def auprc(self) -> float:
        """Average precision: the mean, over positives, of the precision at their score; NaN without positives."""
        if not self.positives:
            return NAN
        true = (self.true_above + self.true_equal).to(torch.float64)
        precision = true / (true + (self.false_above + self.false_equal))
        return float((precision * self.weight).sum()) / self.positives

    @property
    def auroc_bound(self) -> float:
        """How far binning may have moved `auroc`: half the share of pairs within one bin."""
        if not (self.positives and self.negatives):
            return NAN
        return 0.5 * float((self.weight * self.false_equal).double().sum()) / self.positives / self.negatives

    @property
    def auprc_bound(self) -> float:
        """How far binning may have moved `auprc`: the order within a bin is best or worst for its positives."""
        if not self.positives:
            return NAN
        keep = self.weight > 0
        weight, above, below = self.weight[keep], self.true_above[keep], self.false_above[keep]
        high = (weight * (above + weight).double() / (above + weight + below)).sum() / self.positives
        entry = torch.repeat_interleave(torch.arange(len(weight)), weight)
        first = torch.cumsum(weight, 0) - weight
        true = (above[entry] + torch.arange(self.positives) - first[entry] + 1).double()
        low = (true / (true + (below + self.false_equal[keep])[entry])).sum() / self.positives
        value = self.auprc
        return max(float(high) - value, value - float(low), 0.0)

    def roc(self) -> tuple[Tensor, Tensor]:
        """Corners of the ROC curve: false and true positive rates, rising."""
        true = torch.stack([self.true_above, self.true_above + self.true_equal], 1).flatten()
        false = torch.stack([self.false_above, self.false_above + self.false_equal], 1).flatten()
        order = torch.argsort(false + true, stable=True)
        true, false = true[order].double() / self.positives, false[order].double() / self.negatives
        one = torch.ones(1, dtype=torch.float64)
        return torch.cat([0 * one, false, one]), torch.cat([0 * one, true, one])

    def pr(self) -> tuple[Tensor, Tensor]:
        """Recall and precision at every threshold that has a positive, by rising recall."""
        keep = self.weight > 0
        true = (self.true_above + self.true_equal)[keep].double()
        false = (self.false_above + self.false_equal)[keep]
        order = torch.argsort(true, stable=True)
        return (true / self.positives)[order], (true / (true + false))[order]


Ranking = list[ClassRanking]


def rank_scores(column: Callable[[int], tuple[Tensor, Tensor]], classes: int) -> Ranking:
    """Rank each class exactly.

    Args:
        column: gives the scores of one class `(n,)`, which may be overwritten, and which of them are positive.
        classes: number of classes.
    """
    ranking = []
    for index in range(classes):
        scores, positive = column(index)
        own = _sort(scores[positive])
        everything = _sort(scores)
        total, positives = everything.numel(), own.numel()
        # Positions of each positive among all scores and among the positives, before and after its ties.
        low, high = _span(everything, own)
        own_low, own_high = _span(own, own)
        true_above = positives - own_high
        true_equal = own_high - own_low
        entry = ClassRanking(
            weight=torch.ones_like(low),
            true_above=true_above,
            false_above=total - high - true_above,
            false_equal=high - low - true_equal,
            true_equal=true_equal,
            threshold=own,
            positives=positives,
            negatives=total - positives,
        )
        ranking.append(_to_host(entry))
    return ranking


def rank_bins(histogram: Tensor) -> Ranking:
    """Rank each class from positives and negatives per bin, `(2, classes, bins)`."""
    bins = histogram.shape[-1]
    u = torch.arange(bins, dtype=torch.float64) * 2 / bins - 1
    edges = 4 * u / (1 - u.abs())
    ranking = []
    for positive, negative in zip(*histogram.unbind(0), strict=True):
        used = (positive + negative) > 0
        p, q = positive[used], negative[used]
        positives, negatives = int(p.sum()), int(q.sum())
        ranking.append(
            ClassRanking(
                weight=p,
                true_above=positives - p.cumsum(0),
                false_above=negatives - q.cumsum(0),
                false_equal=q,
                true_equal=p,
                threshold=edges[used],
                positives=positives,
                negatives=negatives,
            )
        )
    return ranking


def _sort(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        values = x.numpy()
        values.sort()  # vectorised, and without the indices that torch.sort would carry along
        return x
    return torch.sort(x).values


def _span(haystack: Tensor, needles: Tensor) -> tuple[Tensor, Tensor]:
    if haystack.device.type == "cpu":
        import numpy as np

        hay, keys = haystack.numpy(), needles.numpy()
        return torch.from_numpy(np.searchsorted(hay, keys, "left")), torch.from_numpy(
            np.searchsorted(hay, keys, "right")
        )
    return torch.searchsorted(haystack, needles), torch.searchsorted(haystack, needles, right=True)


def _to_host(entry: ClassRanking) -> ClassRanking:
    if entry.weight.device.type == "cpu":
        return entry
    names = ("weight", "true_above", "false_above", "false_equal", "true_equal")
    for name, values in zip(names, torch.stack([getattr(entry, n) for n in names]).cpu(), strict=True):
        setattr(entry, name, values)
    entry.threshold = entry.threshold.cpu()
    return entry
