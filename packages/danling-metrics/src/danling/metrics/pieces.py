"""State pieces: what metrics declare that they read, each held once however many metrics read it.

A piece is a value, equal to another one that asks for the same state. It says how much state it needs, what a chunk of
rows adds to it, and how two states merge. Counts are int64, sums and moments float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk import Chunk, View
from .inputs import Spec, rows_per_sample


@dataclass(frozen=True)
class Piece:
    """One kind of state over the rows that `view` leaves."""

    view: View = View()

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64

    def by_reading(self, spec: Spec) -> bool:
        """Whether the state depends on reading scores as logits or as probabilities."""
        return False

    @property
    def direct(self) -> bool:
        """Whether each update must be folded in by itself, because samples must not be cut."""
        return False

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Return the shape of the state."""
        raise NotImplementedError

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        """Return the state of these rows."""
        raise NotImplementedError

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the state of both."""
        return a + b

    def add_to(self, state: Tensor, chunk: Chunk, logits: bool) -> None:
        """Add these rows to a state in place."""
        part = self.fold(chunk, logits).to(state.device)
        state.copy_(self.merge(state, part)) if self.dtype == torch.float64 else state.add_(part)

    @property
    def key(self) -> str:
        """A name that is the same on every rank."""
        return repr(self)


ROWS, ENTRIES, NAN, BAD, OUTSIDE, BAD_LABEL = range(6)


@dataclass(frozen=True)
class Checks(Piece):
    """Numbers of valid rows and entries, and of NaN scores, bad targets, scores outside [0, 1] and bad labels."""

    spans_samples: bool = False

    @property
    def direct(self) -> bool:
        return self.spans_samples

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (6,)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        view = self.view
        valid = chunk.valid(view)
        entries = valid.sum()
        rows = entries if valid.dim() == 1 or valid.shape[0] == 1 else valid.any(0).sum()
        if chunk.spec.task in ("regression", "ranking", None):
            zero = torch.zeros_like(entries)
            return torch.stack([rows, entries, chunk.nan(view).sum(), zero, zero, zero])
        labels = chunk.wrong_labels(view)
        if labels is not None:
            zero = torch.zeros_like(entries)
            return torch.stack([rows, entries, zero, chunk.bad(view).sum(), zero, labels.sum()])
        marks = torch.stack([chunk.nan(view), chunk.bad(view), chunk.outside(view)])
        return torch.cat([torch.stack([rows, entries]), marks.flatten(1).sum(1), torch.zeros_like(entries)[None]])


@dataclass(frozen=True)
class Confusion(Piece):
    """Confusion matrix, rows are targets: `(C, C)`, `(2, 2)` or `(L, 2, 2)`."""

    threshold: float = 0.5
    k: int = 1

    def by_reading(self, spec: Spec) -> bool:
        return spec.elementwise

    def shape(self, spec: Spec) -> tuple[int, ...]:
        if spec.task == "binary":
            return (2, 2)
        assert spec.width is not None
        return (spec.width, 2, 2) if spec.task == "multilabel" else (spec.width, spec.width)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        view, shape = self.view, self.shape(chunk.spec)
        good, spare = chunk.good(view), int(torch.Size(shape).numel())
        if chunk.spec.elementwise:
            cell = (chunk.t == 1).to(torch.int64).mul_(2).add_(chunk.positive(self.threshold, logits))
            cell += torch.arange(0, spare, 4, device=chunk.device)[:, None]
        else:
            cell = chunk.t * shape[1] + chunk.refined(view, self.k)
        return tally(torch.where(good, cell, spare), spare).view(shape)


@dataclass(frozen=True)
class Histogram(Piece):
    """Positives and all scores per bin and class over equal bins in u = z / (|z| + 4): `(2, width * bins + 1)`.

    Cells lie class by class; the last one takes what does not count.
    """

    bins: int = 4096

    def by_reading(self, spec: Spec) -> bool:
        return True

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (2, (spec.width or 1) * self.bins + 1)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        state = torch.zeros(self.shape(chunk.spec), dtype=torch.int64, device=chunk.device)
        self.add_to(state, chunk, logits)
        return state

    def add_to(self, state: Tensor, chunk: Chunk, logits: bool) -> None:
        if state.device != chunk.device:
            return super().add_to(state, chunk, logits)
        bins, good = self.bins, chunk.good(self.view)
        z = chunk.log_odds(logits).clamp_(-1e30, 1e30)
        cell = z.div_(z.abs().add_(4)).add_(1).mul_(bins / 2).to(torch.int32).clamp_(max=bins - 1)
        width = cell.shape[0]
        spare = width * bins
        if width > 1:
            cell += torch.arange(0, spare, bins, dtype=torch.int32, device=chunk.device)[:, None]
        if chunk.spec.elementwise:
            hits = torch.where(good & (chunk.t == 1), cell, spare)
        else:
            hits = torch.where(good, cell.gather(0, chunk.index(self.view)[None])[0], spare)
        # Added in place: a count of its own would cost more for its memory than for counting.
        ones = torch.ones(cell.numel(), dtype=torch.int64, device=chunk.device)
        for row, cells in zip(state.unbind(0), (hits, cell.masked_fill_(~good, spare)), strict=True):
            cells = cells.reshape(-1).to(torch.int64)
            row.scatter_add_(0, cells, ones[: cells.shape[0]])
        return None

    def split(self, state: Tensor) -> Tensor:
        """Return positives and negatives, `(2, width, bins)`."""
        positives, everything = state[:, :-1].unflatten(1, (-1, self.bins))
        return torch.stack([positives, everything - positives])


@dataclass(frozen=True)
class LogLoss(Piece):
    """Sum of negative log-likelihoods in nats."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def by_reading(self, spec: Spec) -> bool:
        return True

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (1,)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        good, eps = chunk.good(self.view), torch.finfo(chunk.x.dtype).eps
        if chunk.spec.elementwise:
            if logits:
                x = torch.where(chunk.t == 1, -chunk.finite, chunk.finite)
                loss = x.clamp(min=0) + torch.log1p((-x.abs()).exp())
            else:
                p = chunk.x.clamp(eps, 1 - eps)
                loss = -torch.where(chunk.t == 1, p, 1 - p).log()
        else:
            index = chunk.index(self.view)[None]
            if logits:
                loss = -chunk.log_softmax.gather(0, index)[0]
            else:
                loss = -chunk.x.gather(0, index)[0].clamp(eps, 1 - eps).log()
        return torch.where(good, loss, 0).to(torch.float64).sum().view(1)


@dataclass(frozen=True)
class Calibration(Piece):
    """Per confidence bin: number of rows, sum of confidences, number of hits. A confidence of 1 has its own bin."""

    n_bins: int = 15

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def by_reading(self, spec: Spec) -> bool:
        return True

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (3, self.n_bins + 1)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        good = chunk.good(self.view)
        if chunk.spec.elementwise:
            confidence, hit, good = chunk.probability(logits)[0], chunk.t[0] == 1, good[0]
        else:
            confidence, hit = chunk.probability(logits).amax(0), chunk.labels == chunk.t
        confidence = torch.where(good, confidence, 0).clamp(0, 1)
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=confidence.dtype, device=chunk.device)
        cell = torch.bucketize(confidence, edges, right=True).sub_(1).clamp_(0, self.n_bins)
        cell = torch.where(good, cell, self.n_bins + 1)
        columns = torch.stack([good, confidence, hit & good]).to(torch.float64)
        return add_by_cell(cell.expand(3, -1), columns, self.n_bins + 2)[:, :-1].contiguous()


@dataclass(frozen=True)
class ExactMatch(Piece):
    """Samples whose valid positions all agree, and samples with a valid position."""

    threshold: float = 0.5

    @property
    def direct(self) -> bool:
        return True

    def by_reading(self, spec: Spec) -> bool:
        return spec.elementwise

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (2,)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        valid = chunk.valid(self.view)
        if chunk.spec.elementwise:
            wrong = (chunk.positive(self.threshold, logits) != (chunk.t == 1)) & valid
            wrong, valid = wrong.any(0), valid.any(0)
        else:
            wrong = (chunk.labels != chunk.t) & valid
        per_sample = (-1, rows_per_sample(chunk.rows))
        counted = valid.view(per_sample).any(1)
        return torch.stack([(counted & ~wrong.view(per_sample).any(1)).sum(), counted.sum()])


@dataclass(frozen=True)
class Ndcg(Piece):
    """Sum of normalised discounted cumulative gains over queries, and the number of queries; float64."""

    top_k: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def direct(self) -> bool:
        return True

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (2,)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        valid = chunk.good(self.view).t()
        scores = torch.where(valid, chunk.x.t(), float("-inf")).to(torch.float64)
        gains = torch.where(valid, chunk.t.t(), 0).to(torch.float64)
        width = scores.shape[1]
        discount = 1 / torch.log2(torch.arange(2, width + 2, dtype=torch.float64, device=chunk.device))
        if self.top_k is not None:
            discount[self.top_k :] = 0
        ideal = (gains.sort(dim=1, descending=True).values * discount).sum(1)
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        # Documents with equal scores share the mean of their gains, as in any order among them.
        tie = torch.zeros_like(order)
        tie[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]).cumsum(1)
        size = add_by_cell(tie, torch.ones_like(scores), width)
        gain = add_by_cell(tie, gains.gather(1, order), width) / size.clamp(min=1)
        found = (gain * add_by_cell(tie, discount.expand_as(scores), width)).sum(1)
        value = torch.where(ideal > 0, found / torch.where(ideal > 0, ideal, 1), 0)
        counted = valid.any(1)
        return torch.stack([torch.where(counted, value, 0).sum(), counted.sum().to(torch.float64)])


# Rows of the moments' state.
COUNT, MEAN_X, MEAN_Y, MEAN_E, XX, YY, EE, XY, ABS, SQUARED, RELATIVE, MAX_X, MAX_Y = range(13)


@dataclass(frozen=True)
class Moments(Piece):
    """Moments of predictions x, targets y and errors e = y - x per output, `(13, k)` float64.

    Count, means, central second moments of x, y and e, the central cross moment of x and y, sums of |e|, e² and
    |e / y|, and the largest |x| and |y|, which tell a variance from rounding.
    """

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return (13, spec.width or 1)

    def fold(self, chunk: Chunk, logits: bool) -> Tensor:
        valid = chunk.valid(self.view)
        x, y = torch.where(valid, chunk.x, 0), torch.where(valid, chunk.t, 0)
        error = y - x
        count = valid.sum(1).to(x.dtype)
        values = torch.stack([x, y, error])
        means = values.sum(2) / count.clamp(min=1)
        dx, dy, de = torch.where(valid, values - means[:, :, None], 0)
        relative = error.abs() / y.abs().clamp(min=MAPE_FLOOR)
        sums = torch.stack([dx * dx, dy * dy, de * de, dx * dy, error.abs(), error * error, relative]).sum(2)
        if chunk.n:
            peaks = torch.stack([x.abs().amax(1), y.abs().amax(1)])
        else:
            peaks = torch.zeros((2, x.shape[0]), dtype=x.dtype, device=x.device)
        return torch.cat([count[None], means, sums, peaks]).to(torch.float64)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Merge central moments (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm, 1979)."""
        total = a[COUNT] + b[COUNT]
        share = b[COUNT] / total.clamp(min=1)
        delta = b[MEAN_X : MEAN_E + 1] - a[MEAN_X : MEAN_E + 1]
        out = a + b
        out[MEAN_X : MEAN_E + 1] = torch.where(
            share == 1, b[MEAN_X : MEAN_E + 1], a[MEAN_X : MEAN_E + 1] + delta * share
        )
        scale = a[COUNT] * share
        out[XX : EE + 1] += torch.where(scale > 0, delta * delta * scale, 0)
        out[XY] += torch.where(scale > 0, delta[0] * delta[1] * scale, 0)
        out[MAX_X:] = torch.maximum(a[MAX_X:], b[MAX_X:])
        return out


MOMENT_NAMES = (
    "count",
    "mean_preds",
    "mean_targets",
    "mean_error",
    "m2_preds",
    "m2_targets",
    "m2_error",
    "cross",
    "absolute",
    "squared",
    "relative",
    "max_preds",
    "max_targets",
)

# The least |y| that a relative error is divided by.
MAPE_FLOOR = 1.17e-06


def tally(cells: Tensor, size: int) -> Tensor:
    """Count occurrences of `0 … size - 1`; `size` itself is a spare cell that is dropped."""
    cells = cells.reshape(-1)
    if cells.device.type == "cpu":
        return torch.bincount(cells, minlength=size + 1)[:size]
    # bincount would wait for the device.
    counts = torch.zeros(size + 1, dtype=torch.int64, device=cells.device)
    return counts.scatter_add_(0, cells.to(torch.int64), torch.ones_like(cells, dtype=torch.int64))[:size]


def add_by_cell(cells: Tensor, values: Tensor, size: int) -> Tensor:
    """Add up `values` per row and cell, `(rows, n)` to `(rows, size)`.

    Laid out as one dim, for which the addition is deterministic on every device.
    """
    rows = cells.shape[0]
    flat = cells + torch.arange(0, rows * size, size, device=cells.device)[:, None]
    out = torch.zeros(rows * size, dtype=values.dtype, device=values.device)
    return out.scatter_add_(0, flat.reshape(-1), values.reshape(-1)).view(rows, size)
