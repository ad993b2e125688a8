"""Metrics of numbers: errors, explained variance and correlation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pieces import ABS, COUNT, EE, MAX_X, MAX_Y, RELATIVE, SQUARED, XX, XY, YY
from ..state import state_from
from .descriptor import MetricFunc

MULTIOUTPUT = ("uniform_average", "raw_values", "variance_weighted")
NAN = float("nan")


class RegressionMetric(MetricFunc):
    """Base of regression metrics with `num_outputs` outputs."""

    def __init__(self, *, num_outputs: int = 1, ignore_nan: bool = False, **options: Any) -> None:
        super().__init__(**{"task": "regression", "ignore_index": None, **options})
        if isinstance(num_outputs, bool) or not isinstance(num_outputs, int) or num_outputs < 1:
            raise ValueError(f"num_outputs must be a positive integer, got {num_outputs!r}")
        self.num_outputs = num_outputs
        self.ignore_nan = ignore_nan


class MomentMetric(RegressionMetric):
    """A function of the moments of predictions, targets and errors."""

    def __init__(self, kind: str, *, multioutput: str = "uniform_average", **options: Any) -> None:
        key, _, better = MOMENTS[kind]
        super().__init__(**{"name": key, "moments": True, "higher_is_better": better, **options})
        if multioutput not in MULTIOUTPUT:
            raise ValueError(f"multioutput must be one of {', '.join(MULTIOUTPUT)}, got {multioutput!r}")
        self.kind = kind
        self.multioutput = multioutput

    def __call__(self, state: Any) -> Tensor:
        state = state_from(self, state)
        moments = with_exact_zeros(torch.stack(list(state.moments.values())))
        values = MOMENTS[self.kind][1](moments)
        if self.kind == "pearson" and bool((torch.isnan(values) & ~torch.isnan(moments).any(0)).any()):
            state.note("Pearson correlation is undefined: a side is constant, or there are fewer than two samples")
        if self.num_outputs == 1:
            return values[0]
        if self.kind in ("r2_score", "explained_variance"):
            if self.multioutput == "uniform_average":
                return values.mean()
            if self.multioutput == "variance_weighted":
                weights = moments[YY]
                return (values * weights).sum() / weights.sum() if weights.sum() > 0 else values.mean()
        return values


def with_exact_zeros(moments: Tensor) -> Tensor:
    """Set second moments to 0 that are only rounding: below n (2⁻⁵² max|x|)²."""
    moments = moments.clone()
    floor_x, floor_y = ((2.0**-52 * moments[i]) ** 2 * moments[COUNT] for i in (MAX_X, MAX_Y))
    for row, floor in ((XX, floor_x), (YY, floor_y)):
        moments[row] = torch.where(moments[row] <= floor, 0, moments[row])
    return moments


def _explained(unexplained: Tensor, m: Tensor) -> Tensor:
    """1 - unexplained / variance; for constant targets 1 if exact, else 0."""
    constant = torch.where(unexplained == 0, 1.0, torch.where(torch.isnan(unexplained), NAN, 0.0))
    return torch.where(m[YY] > 0, 1 - unexplained / m[YY], constant)


def _r2(m: Tensor) -> Tensor:
    return torch.where(m[COUNT] < 2, NAN, _explained(m[SQUARED], m))


def _explained_variance(m: Tensor) -> Tensor:
    floor = (2.0**-52 * torch.maximum(m[MAX_X], m[MAX_Y])) ** 2 * m[COUNT]
    return _explained(torch.where(m[EE] <= floor, 0, m[EE]), m)


def _pearson(m: Tensor) -> Tensor:
    spread = m[XX].sqrt() * m[YY].sqrt()
    return torch.where((spread > 0) & (m[COUNT] >= 2), m[XY] / spread, NAN).clamp(-1, 1)


# Kind: key, function of the moments (13, k), and whether more is better.
MOMENTS: dict[str, tuple[str, Callable[[Tensor], Tensor], bool]] = {
    "mse": ("mse", lambda m: m[SQUARED] / m[COUNT], False),
    "rmse": ("rmse", lambda m: (m[SQUARED] / m[COUNT]).sqrt(), False),
    "mae": ("mae", lambda m: m[ABS] / m[COUNT], False),
    "mape": ("mape", lambda m: m[RELATIVE] / m[COUNT], False),
    "r2_score": ("r2", _r2, True),
    "explained_variance": ("explained_variance", _explained_variance, True),
    "pearson": ("pearson", _pearson, True),
}


class RankCorrelation(RegressionMetric):
    """A correlation of ranks, which needs all predictions at once."""

    label = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"preds_targets": True, "higher_is_better": True, **options})

    def correlate(self, x: Tensor, y: Tensor) -> float:
        """Return the correlation of two float64 vectors; NaN if it is undefined."""
        raise NotImplementedError

    def __call__(self, state: Any) -> Tensor:
        preds, targets = (t.detach().cpu().double() for t in (state.preds, state.targets))
        if preds.dim() == 1:
            preds, targets = preds[:, None], targets[:, None]
        values = []
        for x, y in zip(preds.t().contiguous(), targets.t().contiguous(), strict=True):
            if torch.isnan(x).any() or torch.isnan(y).any():
                values.append(NAN)
                continue
            value = self.correlate(x, y) if len(x) > 1 else NAN
            if value != value:
                state.note(f"{self.label} is undefined: a side is constant, or there are fewer than two samples")
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)[0 if self.num_outputs == 1 else slice(None)]


class Spearman(RankCorrelation):
    """Pearson correlation of ranks; ties share their mean rank."""

    label = "Spearman correlation"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "spearman", **options})

    def correlate(self, x: Tensor, y: Tensor) -> float:
        a, b = (mean_ranks(v) - (len(v) + 1) / 2 for v in (x, y))
        spread = float((a @ a).sqrt() * (b @ b).sqrt())
        return max(-1.0, min(1.0, float(a @ b) / spread)) if spread else NAN


class Kendall(RankCorrelation):
    """Kendall's tau-b."""

    label = "Kendall correlation"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"name": "kendall", **options})

    def correlate(self, x: Tensor, y: Tensor) -> float:
        n = len(x)
        _, rank_x = torch.unique(x, return_inverse=True)
        _, rank_y = torch.unique(y, return_inverse=True)
        order = torch.argsort(rank_x * (n + 1) + rank_y)
        pairs = n * (n - 1) // 2
        ties_x, ties_y = _tied_pairs(rank_x), _tied_pairs(rank_y)
        ties_both = _tied_pairs(torch.unique(rank_x * (n + 1) + rank_y, return_inverse=True)[1])
        # Sorted by x and then y, an inversion of y is a discordant pair.
        discordant = count_inversions(rank_y[order])
        balance = pairs - ties_x - ties_y + ties_both - 2 * discordant
        spread = ((pairs - ties_x) * (pairs - ties_y)) ** 0.5
        return balance / spread if spread else NAN


def mean_ranks(x: Tensor) -> Tensor:
    """Return ranks from 1 as float64; equal values share their mean rank."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def _tied_pairs(ranks: Tensor) -> int:
    counts = torch.bincount(ranks)
    return int((counts * (counts - 1) // 2).sum())


def count_inversions(ranks: Tensor) -> int:
    """Count pairs i < j with `ranks[i] > ranks[j]`, in n log n steps.

    From the highest bit down, elements that agree in all higher bits lie together in their original order; within such
    a block each 1 before a 0 is an inversion that this bit decides.
    """
    if len(ranks) < 2:
        return 0
    inversions = 0
    block = torch.zeros_like(ranks)
    for bit in reversed(range(int(ranks.max()).bit_length())):
        ones = (ranks >> bit) & 1
        before = ones.cumsum(0) - ones
        starts = torch.cat([block.new_ones(1, dtype=torch.bool), block[1:] != block[:-1]])
        # Ones before the start of the block do not count.
        base = before[starts][starts.cumsum(0) - 1]
        inversions += int(((before - base) * (1 - ones)).sum())
        order = torch.argsort((block << 1) | ones, stable=True)
        ranks, block = ranks[order], ((block << 1) | ones)[order]
    return inversions
