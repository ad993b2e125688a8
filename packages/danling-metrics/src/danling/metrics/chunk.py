"""A stretch of rows as the state pieces see it: which positions count, labels, log-probabilities.

Everything a piece may need is computed once per chunk, on the device, without waiting for it. Scores lie class-first,
`(width, n)`, because reductions over a short leading dim are several times faster than over a short last one. Only
operations are used whose result for a row does not depend on where in the chunk it lies, so that values do not depend
on how rows were cut into chunks (torch's own softmax and sigmoid do, in the last bit).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .inputs import Rows, Spec

T = TypeVar("T")


class View(NamedTuple):
    """Which targets a metric leaves out: one value, and NaN."""

    ignore_index: int | None = -100
    ignore_nan: bool = False


class Chunk:
    """Rows of one task with everything the pieces derive from them.

    Attributes:
        n: number of rows.
        labelled: whether the input holds class labels instead of scores.
        x: scores `(width, n)` in float32 or float64 (float64 for regression); absent for labels.
        t: targets, `(n,)` for multiclass and `(width, n)` otherwise.
    """

    def __init__(self, spec: Spec, rows: Rows) -> None:
        self.spec = spec
        self.rows = rows
        self.n = rows.scores.shape[0]
        self.labelled = spec.task == "multiclass" and not rows.scores.dtype.is_floating_point
        self._memo: dict = {}

    def once(self, key: tuple, make: Callable[[], T]) -> T:
        """Return `make()`, computed on the first call with this key."""
        memo = self._memo
        if key not in memo:
            memo[key] = make()
        return memo[key]

    @property
    def device(self) -> torch.device:
        return self.rows.scores.device

    # inputs, class-first

    @property
    def x(self) -> Tensor:
        return self.once(("x",), self._x)

    def _x(self) -> Tensor:
        scores = self.rows.scores
        dtype = torch.float64 if self.spec.task == "regression" and self.device.type != "mps" else compute_dtype(scores)
        scores = scores[None] if scores.dim() == 1 else scores.t()
        return scores.to(dtype).contiguous()

    @property
    def t(self) -> Tensor:
        return self.once(("t",), self._t)

    def _t(self) -> Tensor:
        targets = self.rows.targets
        if self.spec.task == "multiclass":
            return targets.to(torch.int64)
        if self.spec.task is None:
            return targets
        targets = targets[None] if targets.dim() == 1 else targets.t()
        return targets.to(self.x.dtype) if self.spec.task == "regression" else targets

    @property
    def mask(self) -> Tensor | None:
        mask = self.rows.mask
        if mask is None or self.spec.task in ("multiclass", None):
            return mask
        return mask[None] if mask.dim() == 1 else mask.t()

    # which positions count

    def valid(self, view: View) -> Tensor:
        """Positions that are data and not ignored, of the shape of `t`."""
        return self.once(("valid", view), lambda: self._valid(view))

    def _valid(self, view: View) -> Tensor:
        t, valid = self.t, self.mask
        if self.spec.task is None and t.dim() > 1:  # rows of a shape of their own count as a whole
            return torch.ones(self.n, dtype=torch.bool, device=self.device)
        if view.ignore_index is not None and not (t.dtype.is_floating_point and not self.spec.elementwise):
            kept = t != view.ignore_index
            valid = kept if valid is None else valid & kept
        if view.ignore_nan and t.dtype.is_floating_point:
            kept = ~torch.isnan(t)
            valid = kept if valid is None else valid & kept
        return torch.ones_like(t, dtype=torch.bool) if valid is None else valid

    def bad(self, view: View) -> Tensor:
        """Valid positions whose target is not a class."""
        return self.once(("bad", view), lambda: self._bad(view))

    def _bad(self, view: View) -> Tensor:
        t = self.t
        if self.spec.task == "multiclass":
            width = self.spec.width or (None if self.labelled else self.x.shape[0])
            out = t < 0
            return self.valid(view) & (out if width is None else out | (t >= width))
        if self.spec.elementwise:
            return self.valid(view) & (torch.zeros_like(t) if t.dtype == torch.bool else (t != 0) & (t != 1))
        return torch.zeros_like(self.valid(view))

    def nan(self, view: View) -> Tensor:
        """Valid positions without a usable prediction: a NaN score, or a label that is no class."""
        return self.once(("nan", view), lambda: self._nan(view))

    def _nan(self, view: View) -> Tensor:
        if self.labelled or self.spec.task is None:
            return torch.zeros_like(self.valid(view))
        if self.spec.task == "multiclass":
            return self.valid(view) & torch.isnan(self.top[0])
        return self.valid(view) & torch.isnan(self.x)

    def good(self, view: View) -> Tensor:
        """Positions that are counted: valid, with a target in range and a score that is a number."""
        return self.once(("good", view), lambda: self.valid(view) & ~(self.bad(view) | self.nan(view)))

    def wrong_labels(self, view: View) -> Tensor | None:
        """Valid rows whose predicted label is out of range, if the input holds labels."""
        if not self.labelled:
            return None
        label = self.rows.scores
        out = label < 0
        return self.valid(view) & (out if self.spec.width is None else out | (label >= self.spec.width))

    def outside(self, view: View) -> Tensor:
        """Valid positions with a score outside [0, 1]."""
        if self.labelled:
            return torch.zeros_like(self.valid(view))
        if self.spec.task == "multiclass":
            return self.valid(view) & ((self.top[0] > 1) | (self.lowest < 0))
        return self.valid(view) & ((self.x > 1) | (self.x < 0))

    # multiclass

    @property
    def top(self) -> tuple[Tensor, Tensor]:
        """Highest score and its class, the first one of several; NaN wins."""
        return self.once(("top",), self._top)

    def _top(self) -> tuple[Tensor, Tensor]:
        values, classes = self.x.max(0)
        return values, classes

    @property
    def lowest(self) -> Tensor:
        return self.once(("lowest",), lambda: self.x.amin(0))

    @property
    def labels(self) -> Tensor:
        """Predicted class per row, `(n,)`."""
        if not self.labelled:
            return self.top[1]
        return self.once(("labels",), self._given_labels)

    def _given_labels(self) -> Tensor:
        labels = self.rows.scores.to(torch.int64)
        return labels.clamp(0, None if self.spec.width is None else self.spec.width - 1)

    def index(self, view: View) -> Tensor:
        """Target class per row, 0 where the row is not counted."""
        return self.once(("index", view), lambda: torch.where(self.good(view), self.t, 0))

    def refined(self, view: View, k: int) -> Tensor:
        """The target where it is among the `k` highest scores, else the highest (ties: the first class wins)."""
        if k == 1 or self.labelled:
            return self.labels
        return self.once(("refined", view, k), lambda: self._refined(view, k))

    def _refined(self, view: View, k: int) -> Tensor:
        index = self.index(view)
        chosen = self.x.gather(0, index[None])
        before = torch.arange(self.x.shape[0], device=self.device)[:, None] < index
        ahead = ((self.x > chosen) | ((self.x == chosen) & before)).sum(0)
        return torch.where(ahead < k, index, self.labels)

    @property
    def finite(self) -> Tensor:
        """Scores with infinities as the largest finite numbers; NaN stays."""
        return self.once(("finite",), lambda: clip_infinite(self.x))

    @property
    def log_softmax(self) -> Tensor:
        """Log-probabilities of logits, `(C, n)`."""
        return self.once(("log_softmax",), self._log_softmax)

    def _log_softmax(self) -> Tensor:
        shifted, _, total = self._softmax_parts
        return shifted - total.log()

    @property
    def _softmax_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.once(("softmax",), self._make_softmax_parts)

    def _make_softmax_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        limit = torch.finfo(self.x.dtype).max
        shifted = clip_infinite(self.x).sub_(self.top[0].clamp(-limit, limit))
        exp = shifted.exp()
        return shifted, exp, tree_sum(exp)

    # probabilities

    def log_odds(self, logits: bool) -> Tensor:
        """The logit of every score, `(width, n)`, in memory that the caller may overwrite."""
        if not logits:
            p = self.x.clamp(0, 1)  # outside, a logarithm would take its slow path to NaN
            return torch.log1p(-p).neg_().add_(p.log_())
        if self.spec.elementwise:
            return self.x.clone()
        shifted, exp, total = self._softmax_parts
        return torch.sub(total, exp).log_().neg_().add_(shifted)

    def positive(self, threshold: float, logits: bool) -> Tensor:
        """Whether the probability exceeds the threshold, per position."""
        if logits:
            threshold = logit_threshold(threshold, self.x.dtype)
        return self.x > threshold

    def probability(self, logits: bool) -> Tensor:
        """Probabilities, `(width, n)`."""
        return self.once(("probability", logits), lambda: self._probability(logits))

    def _probability(self, logits: bool) -> Tensor:
        if not logits:
            return self.x
        return sigmoid(self.x) if self.spec.elementwise else self.log_softmax.exp()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 and float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def clip_infinite(x: Tensor) -> Tensor:
    """Replace infinities by the largest finite numbers."""
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function by operations whose result does not depend on the position in the tensor."""
    return 1 / (1 + (-x).exp())


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the leading dim in an order that depends on its size alone."""
    keep = (x.shape[0] + 1) // 2
    out = x[:keep].clone()
    out[: x.shape[0] - keep].add_(x[keep:])
    while (rows := out.shape[0]) > 1:
        keep = (rows + 1) // 2
        out[: rows - keep].add_(out[keep:])
        out = out[:keep]
    return out[0]


@lru_cache(maxsize=256)
def logit_threshold(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest logit whose probability does not exceed `threshold`, found by bisection over the numbers of
    this dtype: `x > logit_threshold(t)` is `sigmoid(x) > t` without a sigmoid per score."""
    code, whole, bits = ("f", "i", 31) if dtype == torch.float32 else ("d", "q", 63)
    limit = torch.tensor(threshold, dtype=dtype).item()

    def number(order: int) -> float:
        # Signed integers ordered as the floats they stand for.
        return struct.unpack(code, struct.pack(whole, order if order >= 0 else -order - 2**bits))[0]

    def exceeds(order: int) -> bool:
        return sigmoid(torch.tensor([number(order)], dtype=dtype)).item() > limit

    top = struct.unpack(whole, struct.pack(code, float("inf")))[0]
    low, high = -top, top
    if not exceeds(high):
        return float("inf")
    if exceeds(low):
        return float("-inf")  # a threshold below 0: everything but -inf is positive
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return number(low)
