"""`MetricState`, what a descriptor reads, and the source it is filled from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunk import Chunk, View, compute_dtype
from .inputs import Rows, Spec
from .pieces import BAD, BAD_LABEL, MOMENT_NAMES, NAN, OUTSIDE, ROWS, Checks, Histogram, Moments, Piece
from .ranking import Ranking, rank_bins, rank_scores

if TYPE_CHECKING:
    from .functional.descriptor import MetricFunc

Sums = dict[tuple[Piece, bool | None], Tensor]
_STRETCH = 65536  # rows that are folded at a time when a value is read


class MetricState:
    """What a descriptor reads.

    Args:
        preds: valid predictions: probabilities `(n,)`, `(n, C)`, `(n, L)`, or values.
        targets: their targets.
        confmat: int64 confusion matrix, rows are targets: `(2, 2)`, `(C, C)` or `(L, 2, 2)`.
        **shared: further attributes, such as `stats`, `ranking`, `histogram`, `moments`, `n`.

    Examples:
        >>> state = MetricState(preds=torch.tensor([0.9, 0.2]), targets=torch.tensor([1, 0]))
        >>> state.n
        2
    """

    preds: Any
    targets: Any
    confmat: Any

    def __init__(self, preds: Any = None, targets: Any = None, confmat: Any = None, **shared: Any) -> None:
        self.__dict__.update(preds=preds, targets=targets, confmat=confmat, **shared)
        self.notes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "n" and self.targets is not None:
            return len(self.targets)
        if name == "stats" and self.confmat is not None:
            return count_stats(self.confmat)
        raise AttributeError(f"this state has no {name!r}: the metric did not declare that it reads it")

    def note(self, message: str) -> None:
        """Remember why a value is undefined; whoever reads the value warns once."""
        self.notes.append(message)


class BoundState(MetricState):
    """The state of one metric, computed from a source when it is read."""

    def __init__(self, source: Source, metric: MetricFunc) -> None:
        self.notes: list[str] = []
        self.source = source
        self.metric = metric
        self.view = metric.view

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:
            raise AttributeError(name)
        if name not in _READS:
            raise AttributeError(f"MetricState has no attribute {name!r}; it has {sorted(_READS)}")
        return _READS[name](self)

    def piece(self, piece: Piece) -> Tensor:
        """Return the state of a piece, on the host."""
        return self.source.get(piece)


def _confmat(state: BoundState) -> Tensor:
    return state.piece(state.metric.confusion)


_READS = {
    "preds": lambda s: s.source.valid_rows(s.view, probabilities=True)[0],
    "targets": lambda s: s.source.valid_rows(s.view, probabilities=True)[1],
    "n": lambda s: s.source.checks(s.view)[ROWS],
    "confmat": _confmat,
    "stats": lambda s: count_stats(_confmat(s), s.metric.task == "multiclass"),
    "ranking": lambda s: s.source.ranking(s.metric),
    "pooled_ranking": lambda s: s.source.ranking(s.metric, pooled=True),
    "histogram": lambda s: s.source.histogram(s.metric),
    "moments": lambda s: Stats(zip(MOMENT_NAMES, s.piece(Moments(s.view)), strict=True)),
}


def count_stats(confmat: Tensor, multiclass: bool = False) -> Stats:
    """Return `tp, fp, fn, tn, support, total` per class or label; of the positive class for a binary `(2, 2)`."""
    if confmat.dim() == 3 or (confmat.shape == (2, 2) and not multiclass):
        tn, fp, fn, tp = confmat.flatten(-2).unbind(-1)
    else:
        tp = confmat.diagonal()
        fp, fn = confmat.sum(0) - tp, confmat.sum(1) - tp
        tn = confmat.sum() - tp - fp - fn
    return Stats(tp=tp, fp=fp, fn=fn, tn=tn, support=tp + fn, total=tp + fp + fn + tn)


class Stats(dict):
    """Counts or moments by name, with attribute access."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Source:
    """Where the states of one read come from: rows, or sums that were folded before, or both.

    Args:
        spec: what a row is.
        from_logits: how scores are read; "auto" looks at the data.
        rows: rows to compute from.
        sums: states that are known already.
        outside: known number of scores outside [0, 1] for a view, when more data than this source has decides.
        bins: number of score bins, if rankings are read from histograms.
    """

    def __init__(
        self,
        spec: Spec,
        from_logits: bool | str,
        rows: Rows | None = None,
        sums: Sums | None = None,
        outside: Mapping[View, int] | None = None,
        bins: int | None = None,
    ) -> None:
        self.spec = spec
        self.from_logits = from_logits
        self.rows = rows
        self.sums = sums or {}
        self.outside = outside or {}
        self.bins = bins
        self._ready: Sums = {}
        self._checks: dict[View, list[int]] = {}
        self._rankings: dict[Any, Ranking] = {}
        self._valid: dict[Any, tuple[Tensor, Tensor]] = {}
        self._only: Chunk | None = None

    def release(self) -> None:
        """Drop what takes memory of the size of the rows and can be computed again."""
        self._only = None
        self._rankings.clear()
        self._valid.clear()

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        """Fold and copy to the host everything these pieces need, in one copy."""
        pieces = list(dict.fromkeys(pieces))
        readings = [self.from_logits] if isinstance(self.from_logits, bool) else [False, True]
        wanted: list[tuple[Piece, bool | None]] = []
        for piece in pieces:
            wanted += [(piece, r) for r in readings] if piece.by_reading(self.spec) else [(piece, None)]
        self._fetch([key for key in wanted if key in self.sums])

    def _fetch(self, keys: list[tuple[Piece, bool | None]]) -> None:
        keys = [key for key in keys if key not in self._ready]
        states = [self.sums[key] for key in keys]
        if any(s.device.type != "cpu" for s in states):
            flat = torch.cat([s.contiguous().view(-1).view(torch.int64) for s in states]).cpu()
            sizes = [s.numel() for s in states]
            states = [part.view(s.dtype).view(s.shape) for part, s in zip(flat.split(sizes), states, strict=True)]
        self._ready.update(zip(keys, states, strict=True))

    def state(self, key: tuple[Piece, bool | None]) -> Tensor:
        """Return the state of a piece under a given reading, where it was computed."""
        if key not in self.sums:
            self.sums[key] = self._fold(key[0], bool(key[1]))
        return self.sums[key]

    def get(self, piece: Piece) -> Tensor:
        """Return the state of a piece on the host, under the reading that the data asks for."""
        logits = self.is_logits(piece.view) if piece.by_reading(self.spec) else None
        return self._host((piece, logits))

    def _host(self, key: tuple[Piece, bool | None]) -> Tensor:
        if key not in self._ready:
            self.state(key)
            self._fetch([key])
        return self._ready[key]

    def _fold(self, piece: Piece, logits: bool) -> Tensor:
        if self.rows is None:
            raise RuntimeError(f"state {piece.key} was not kept")  # a defect of the container, not of its user
        if piece.direct:
            return piece.fold(Chunk(self.spec, self.rows), logits)
        total = None
        for start in range(0, max(1, self.rows.scores.shape[0]), _STRETCH):
            stretch = self.rows.part(start, start + _STRETCH)
            part = piece.fold(self._chunk(start, stretch), logits)
            total = part if total is None else piece.merge(total, part)
        assert total is not None
        return total

    def _chunk(self, start: int, rows: Rows) -> Chunk:
        if self.rows is not None and self.rows.scores.shape[0] <= _STRETCH:
            self._only = self._only or Chunk(self.spec, rows)
            return self._only
        return Chunk(self.spec, rows)

    def checks(self, view: View) -> list[int]:
        """Return the checks' counts for a view."""
        if view not in self._checks:
            piece = next((p for p, _ in self.sums if isinstance(p, Checks) and p.view == view), Checks(view))
            self._checks[view] = self._host((piece, None)).tolist()
        return self._checks[view]

    def is_logits(self, view: View) -> bool:
        """Whether scores are logits: as stated, or if any valid score lies outside [0, 1]."""
        if isinstance(self.from_logits, bool):
            return self.from_logits
        return (self.outside[view] if view in self.outside else self.checks(view)[OUTSIDE]) > 0

    def validate(self, views: Iterable[View]) -> None:
        """Raise `ValueError` if targets, labels or scores are out of range."""
        for view in views:
            checks = self.checks(view)
            width = self.spec.width
            allowed = f"0 to {width - 1}" if self.spec.task == "multiclass" and width else "0 or 1"
            ignored = "" if view.ignore_index is None else f" (ignore_index is {view.ignore_index})"
            if checks[BAD]:
                raise ValueError(f"{checks[BAD]} target values are out of range: they must be {allowed}{ignored}")
            if checks[BAD_LABEL]:
                raise ValueError(f"{checks[BAD_LABEL]} predicted labels are out of range: they must be {allowed}")
            if (
                checks[OUTSIDE]
                and self.from_logits is False
                and self.spec.task in ("binary", "multiclass", "multilabel")
            ):
                raise ValueError(
                    f"{checks[OUTSIDE]} rows or entries have scores outside [0, 1], but from_logits=False says that "
                    "they are probabilities"
                )

    def nan_count(self, view: View) -> int:
        """Number of valid rows or entries with NaN scores."""
        return self.checks(view)[NAN]

    def valid_rows(self, view: View, probabilities: bool) -> tuple[Tensor, Tensor]:
        """Return predictions and targets of the rows that count: as given, or scores as probabilities."""
        key = (view, probabilities)
        if key not in self._valid:
            self._valid[key] = self._filter(view, probabilities)
        return self._valid[key]

    def _filter(self, view: View, probabilities: bool) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            raise RuntimeError("rows were not kept")
        preds, targets = drop_invalid(self.spec, self.rows, view)
        if not probabilities or self.spec.task not in ("binary", "multiclass", "multilabel"):
            return preds, targets
        if not preds.dtype.is_floating_point:
            return preds if self.spec.task == "multiclass" else preds.float(), targets
        preds = preds.to(compute_dtype(preds))
        if self.is_logits(view):
            preds = preds.softmax(-1) if self.spec.task == "multiclass" else preds.sigmoid()
        return preds, targets

    def histogram(self, metric: MetricFunc) -> Tensor:
        """Return positives and negatives per score bin, which stand for kept rows."""
        if self.bins is None:
            raise AttributeError("a histogram is held by OnlineMetrics only")
        piece = Histogram(metric.view, self.bins)
        return piece.split(self.get(piece))

    def ranking(self, metric: MetricFunc, pooled: bool = False) -> Ranking:
        """Return the ranking of every class, or one of all classes pooled, sorted once for all metrics that read it."""
        key = (metric.view, pooled)
        if key not in self._rankings:
            self._rankings[key] = self._rank(metric, pooled)
        return self._rankings[key]

    def _rank(self, metric: MetricFunc, pooled: bool) -> Ranking:
        if self.bins is not None:
            counts = self.histogram(metric)
            return rank_bins(counts.sum(1, keepdim=True) if pooled else counts)
        column, classes = self._columns(metric.view)
        if not pooled:
            return rank_scores(column, classes)
        parts = [column(index) for index in range(classes)]
        scores, positive = (torch.cat(side) for side in zip(*parts, strict=True))
        return rank_scores(lambda index: (scores, positive), 1)

    def _columns(self, view: View) -> tuple[Callable[[int], tuple[Tensor, Tensor]], int]:
        """Return a function that gives scores and positives of one class, and the number of classes."""
        assert self.rows is not None
        scores, targets = self.rows.scores, self.rows.targets
        if self.spec.task == "multiclass":
            if not scores.dtype.is_floating_point:
                raise ValueError("AUROC and AUPRC need scores, but the input holds class labels")
            scores, targets = drop_invalid(self.spec, self.rows, view)
            scores = scores.to(compute_dtype(scores))
            if self.is_logits(view) and scores.shape[0]:
                limit = torch.finfo(scores.dtype).max
                top = scores.amax(1).clamp(-limit, limit)
                # Row by row and blockwise, so that no second copy of all scores is made.
                total = torch.cat(
                    [
                        (part.clamp(-limit, limit) - high[:, None]).exp().sum(1)
                        for part, high in zip(scores.split(_STRETCH), top.split(_STRETCH), strict=True)
                    ]
                )

                def column(index: int) -> tuple[Tensor, Tensor]:
                    own = scores[:, index].clamp(-limit, limit)
                    return own.sub_(top).exp_().div_(total), targets == index

            else:

                def column(index: int) -> tuple[Tensor, Tensor]:
                    return scores[:, index].clone(), targets == index

            return column, self.spec.width or scores.shape[1]
        # A sigmoid keeps the order, so raw scores rank the same and without ties from saturation.
        keep = Chunk(self.spec, self.rows).good(view).t()
        scores = scores.to(compute_dtype(scores)).view(keep.shape)
        targets = targets.view(keep.shape)

        def label(index: int) -> tuple[Tensor, Tensor]:
            kept = keep[:, index]
            return scores[kept, index], targets[kept, index] == 1

        return label, keep.shape[1]


def drop_invalid(spec: Spec, rows: Rows, view: View) -> tuple[Tensor, Tensor]:
    """Return predictions and targets without masked and ignored rows. Reads the device.

    A row of several labels or outputs is left out only if none of them counts for labels, and if any does not for
    outputs. Rows of callables without a task are dropped where the target has one value per row.
    """
    scores, targets, mask = rows[:3]
    keep = mask
    # A float of that value is data, unless it stands for a class.
    if view.ignore_index is not None and (spec.elementwise or not targets.dtype.is_floating_point):
        kept = targets != view.ignore_index
        keep = kept if keep is None else keep & kept
    if view.ignore_nan and targets.dtype.is_floating_point:
        kept = ~torch.isnan(targets)
        keep = kept if keep is None else keep & kept
    if keep is None:
        return scores, targets
    if keep.dim() > 1:
        if spec.task is None:
            return scores, targets
        keep = keep.flatten(1).any(1) if spec.task == "multilabel" else keep.flatten(1).all(1)
    if keep.dim() == 0 or bool(keep.all()):
        return scores, targets
    return scores[keep], targets[keep]


def state_from(metric: MetricFunc, state: MetricState) -> MetricState:
    """Return a state that has what a built-in metric reads, computed from `preds` and `targets` where necessary."""
    if isinstance(state, BoundState) or state.preds is None or state.targets is None:
        return state
    rows = Rows(state.preds.detach(), state.targets.detach(), None, len(state.targets))
    bound = BoundState(Source(metric.spec, False, rows), metric)
    for name, value in state.__dict__.items():
        if value is not None and name != "notes":
            bound.__dict__[name] = value
    return bound
