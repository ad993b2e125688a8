"""The state behind one kind of rows: kept rows, or sums with a block of rows that wait to be folded in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk, View
from .inputs import Rows, Spec, to_rows
from .pieces import BAD, BAD_LABEL, OUTSIDE, Checks, Piece
from .rows import RowBuffer
from .state import Source, Sums
from .sync import row_type

BLOCK = 4096
_BLOCK_ELEMENTS = 2**22
_SMALL_ELEMENTS = 2**14


class Store:
    """State of all metrics that read the same kind of rows.

    Args:
        spec: what a row is.
        pieces: the state that is needed besides rows.
        keep: keep all rows and compute everything from them when read; else fold rows into sums.
        from_logits: how scores are read; "auto" keeps both readings.
        bins: number of score bins where rows are not kept.
        device: where state is kept; the device of the first rows if None.
    """

    def __init__(
        self,
        spec: Spec,
        pieces: Iterable[Piece],
        *,
        keep: bool,
        from_logits: bool | str = "auto",
        bins: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.spec = spec
        self.keep = keep
        self.from_logits = from_logits
        self.bins = bins
        self.device = device
        pieces = list(dict.fromkeys(pieces))
        self.direct = [p for p in pieces if p.direct]
        self.folded = [p for p in pieces if not p.direct]
        self.checks = [p for p in pieces if isinstance(p, Checks)]
        self.views = [p.view for p in self.checks]
        self._states = {p: self._keys(p) for p in pieces}
        self.clear()

    def _keys(self, piece: Piece) -> list[tuple[Piece, bool | None]]:
        if not piece.by_reading(self.spec):
            return [(piece, None)]
        readings = [self.from_logits] if isinstance(self.from_logits, bool) else [False, True]
        return [(piece, reading) for reading in readings]

    def clear(self) -> None:
        """Forget everything."""
        self.buffer = RowBuffer(None, self.device)
        self.like: tuple[Any, ...] | None = None  # what a batch is like that `repeat` can take
        self.block = BLOCK  # rows that may wait to be folded in
        self.sums: Sums = {}  # of rows that were folded in
        self.last_direct: Sums = {}  # what the last update added to pieces that are not made of rows
        self.last = (0, 0)  # the last update, as a range of the buffer
        self.large: Rows | None = None  # the last update, where it was larger than the block
        self.start = 0  # first row of the buffer that is not folded in
        self.own: list[tuple[int, int]] = []  # ranges of this rank's rows below `exchanged`
        self.exchanged = 0  # rows of the buffer that all ranks have
        self.checked = 0  # own rows that `seen` has counted
        self.seen: dict[View, Tensor] = {}
        self.misfit: Tensor | None = None

    # updating

    def prepare(self, input: Any, target: Any, mask: Any) -> tuple[Rows, Rows | None]:
        """Align inputs and make sure that they can be added."""
        rows = to_rows(self.spec, input, target, mask)
        if self.folded:
            self.buffer.check(rows)
        return rows, to_rows(self.spec, input, target, mask, per_sample=True) if self.direct else None

    def repeat(self, input: Any, target: Any) -> bool:
        """Add a batch that is exactly like the last one, without looking at it closer; return whether it is.

        Most batches of a loop are, and for small ones the looking costs more than the adding.
        """
        like = self.like
        if like is None or type(input) is not Tensor or type(target) is not Tensor:
            return False
        shape, kind, device = like
        if input.shape != shape[0] or target.shape != shape[1] or target.requires_grad:
            return False
        if input.dtype is not kind[0] or target.dtype is not kind[1]:
            return False
        if input.device != device or target.device != device:
            return False
        buffer = self.buffer
        start = buffer.size
        stop = start + shape[0][0]
        if stop > self.block and not self.keep:
            return False
        buffer.add_copies(input.data.clone(), target.clone(), stop)
        self.last = start, stop
        return True

    def remember(self, input: Any, target: Any, rows: Rows) -> None:
        """Note what the batch is like that was just added, if `repeat` can take such ones: small, and rows as given."""
        self.like = None
        if rows.mask is not None or rows.misfit is not None or self.direct or self.spec.channel_dim is not None:
            return
        if type(input) is Tensor and type(target) is Tensor and input.dim() <= 2 and not target.requires_grad:
            if (rows.scores.shape, rows.targets.shape) == (input.shape, target.shape) and self.large is None:
                kept = self.buffer.scores
                if 0 < input.numel() <= _SMALL_ELEMENTS and kept is not None and kept.device == input.device:
                    if target.device == input.device:
                        self.like = (input.shape, target.shape), (input.dtype, target.dtype), input.device

    def add(self, rows: Rows, samples: Rows | None) -> None:
        """Add the rows of one update."""
        if rows.misfit is not None:
            self.misfit = rows.misfit if self.misfit is None else self.misfit + rows.misfit
        if samples is not None:
            chunk = Chunk(self.spec, samples)
            for piece in self.direct:
                for key in self._states[piece]:
                    self.last_direct[key] = piece.fold(chunk, bool(key[1]))
                    self._accumulate(key, self.last_direct[key])
        count = rows.scores.shape[0]
        buffer = self.buffer
        if not count:  # leaves even the dtype alone
            self.large, self.last = None, (buffer.size, buffer.size)
        elif self.keep:
            buffer.append(rows)
            self.last = (buffer.size - count, buffer.size)
        elif self.folded:
            if buffer.scores is None:
                self.block = max(1, min(BLOCK, _BLOCK_ELEMENTS // max(1, rows.scores[0].numel())))
                buffer.capacity = self.block
            if buffer.size + count > self.block:
                self.fold()
                buffer.size = self.start = 0
            if count > self.block:
                rows = rows.map(lambda t: t.to(self.device or t.device, copy=True))
                for at in range(0, count, self.block):
                    self._fold(rows.part(at, at + self.block))
                self.large, self.last = rows, (0, 0)
            else:
                buffer.append(rows)
                self.large, self.last = None, (buffer.size - count, buffer.size)

    def fold(self) -> None:
        """Fold waiting rows into the sums."""
        if self.start < self.buffer.size:
            self._fold(self.buffer.view(self.start, self.buffer.size))
            self.start = self.buffer.size

    def _fold(self, rows: Rows) -> None:
        chunk = Chunk(self.spec, rows)
        for check in self.checks:
            if not check.direct:
                self._fold_piece((check, None), chunk)
        for piece in self.folded:
            if isinstance(piece, Checks):
                continue
            for key in self._states[piece]:
                if not (key[1] is False and len(self._states[piece]) > 1 and self._known_logits(piece.view)):
                    self._fold_piece(key, chunk)

    def _known_logits(self, view: View) -> bool:
        """Whether scores are known to be logits already, so that the other reading need not be kept up.

        Only on the CPU, where looking at a count waits for nothing.
        """
        for piece in self.checks:
            if piece.view == view:
                counts = self.sums.get((piece, None))
                return counts is not None and counts.device.type == "cpu" and bool(counts[OUTSIDE])
        return False

    def _fold_piece(self, key: tuple[Piece, bool | None], chunk: Chunk) -> None:
        piece, logits = key
        state = self.sums.get(key)
        if state is None:
            state = self.sums[key] = _new_state(piece.shape(self.spec), piece.dtype, chunk.device)
        piece.add_to(state, chunk, bool(logits))

    def _accumulate(self, key: tuple[Piece, bool | None], part: Tensor) -> None:
        state = self.sums.get(key)
        if state is None:
            state = self.sums[key] = _new_state(part.shape, part.dtype, part.device)
        state.copy_(key[0].merge(state, part.to(state.device)))

    # reading

    def rows(self) -> Rows:
        """Return this rank's rows."""
        return self._joined([*self.own, (self.exchanged, self.buffer.size)])

    def all_rows(self) -> Rows:
        """Return the rows of all ranks, as of the last exchange."""
        return self._joined([(0, self.buffer.size)])

    def last_rows(self) -> Rows:
        """Return the rows of the last update."""
        return self.large or self._joined([self.last])

    def _joined(self, ranges: list[tuple[int, int]]) -> Rows:
        parts = [self.buffer.view(start, stop) for start, stop in ranges if start < stop]
        if len(parts) > 1:
            masks = [p.mask for p in parts if p.mask is not None]  # a buffer has masks for all rows or for none
            mask = torch.cat(masks) if masks else None
            return Rows(torch.cat([p.scores for p in parts]), torch.cat([p.targets for p in parts]), mask)
        if parts:
            return parts[0]
        if self.buffer.scores is not None:
            return self.buffer.view(0, 0)
        return self.empty()

    def empty(self) -> Rows:
        """Return no rows, of the right shape."""
        if self.spec.task == "multiclass" or (self.spec.task == "multilabel") or self.spec.task == "ranking":
            scores = torch.empty(0, self.spec.width or 1)
        else:
            scores = torch.empty((0,) if self.spec.width in (None, 1) else (0, self.spec.width))
        if self.spec.task == "multiclass":
            return Rows(scores, torch.empty(0, dtype=torch.int64))
        return Rows(
            scores, torch.empty(scores.shape, dtype=scores.dtype if self.spec.task == "regression" else torch.int64)
        )

    def source(self) -> Source:
        """Return this rank's data."""
        if not self.keep:
            self.fold()
        rows = self.rows() if self.keep else None
        return self._source(rows, self._complete(dict(self.sums)))

    def _source(self, rows: Rows | None, sums: Sums, outside: Mapping[View, int] | None = None) -> Source:
        return Source(self.spec, self.from_logits, rows, sums, outside, self.bins)

    def _complete(self, sums: Sums) -> Sums:
        """Add zeros for states that nothing was added to."""
        for piece in self.direct if self.keep else (*self.folded, *self.direct):
            for key in self._states[piece]:
                if key not in sums:
                    sums[key] = torch.zeros(piece.shape(self.spec), dtype=piece.dtype)
        return sums

    def last_source(self) -> Source:
        """Return the last update; what is a logit is decided by all of this rank's data."""
        return self._source(self.last_rows(), dict(self.last_direct), self.outside())

    def outside(self) -> dict[View, int]:
        """Return the number of scores outside [0, 1] in this rank's data."""
        return {view: counts[OUTSIDE] for view, counts in self.counts().items()}

    def counts(self) -> dict[View, list[int]]:
        """Return the checks of this rank's data; kept rows are looked at once."""
        if not self.keep:
            return {p.view: self.source().checks(p.view) for p in self.checks}
        ranges, total = [], 0
        for start, stop in [*self.own, (self.exchanged, self.buffer.size)]:
            ranges.append((start + min(stop - start, max(0, self.checked - total)), stop))
            total += stop - start
        if self.checked < total or not self.seen:
            source = self._source(self._joined(ranges), {})
            for piece in self.checks:
                part = torch.tensor(source.checks(piece.view))
                self.seen[piece.view] = part + self.seen.get(piece.view, 0)
            self.checked = total
        return {view: counts.tolist() for view, counts in self.seen.items()}

    def validate(self) -> None:
        """Raise `ValueError` if this rank's data cannot be read."""
        if self.misfit is not None and int(self.misfit):
            raise ValueError(
                f"input and target have different lengths: their masks differ at {int(self.misfit)} positions"
            )
        counts = self.counts()
        relevant = any(c[BAD] or c[BAD_LABEL] or (c[OUTSIDE] and self.from_logits is False) for c in counts.values())
        if relevant:
            self.source().validate(self.views)

    # exchanging

    def pack(self, kind: str) -> tuple[list[Tensor], list[Tensor], int, int]:
        """Return counts to be summed, tensors to be gathered, and number and type of the rows among them."""
        if kind == "average":
            if self.keep:
                rows = self._joined([(self.exchanged, self.buffer.size)])
            else:
                self.fold()
            sums = self.sums
        else:
            rows, sums = self.last_rows(), dict(self.last_direct)
            if not self.keep:
                source = self._source(rows, {})
                sums |= {key: source.state(key) for p in self.folded for key in self._states[p]}
        sums = self._complete(dict(sums))
        ints = [sums[key] for key in self._ordered(torch.int64)]
        parts = [sums[key] for key in self._ordered(torch.float64)]
        if not self.keep:
            kinds = self.buffer if self.buffer.scores is not None else None
            known = kinds.view(0, 0) if kinds else self.large
            return ints, parts, 0, _type_of(known) if known else 0
        parts += [rows.scores, rows.targets, torch.empty(0, dtype=torch.bool) if rows.mask is None else rows.mask]
        known = None if self.buffer.scores is None else rows
        return ints, parts, rows.scores.shape[0], _type_of(known) if known else 0

    def _ordered(self, dtype: torch.dtype) -> list[tuple[Piece, bool | None]]:
        pieces = self.direct if self.keep else (*self.folded, *self.direct)
        return [key for p in pieces if p.dtype == dtype for key in self._states[p]]

    def unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]], rank: int) -> tuple[int, Source]:
        """Take what all ranks sent and return how many tensors were taken from each, and the source of all data."""
        sums: Sums = dict(zip(self._ordered(torch.int64), ints, strict=True))
        floats = self._ordered(torch.float64)
        for at, key in enumerate(floats):
            state = parts[0][at]
            for other in parts[1:]:
                state = key[0].merge(state, other[at])
            sums[key] = state
        taken = len(floats) + 3 * self.keep
        if not self.keep:
            return taken, self._source(None, sums)
        received = [_received(p[len(floats) : len(floats) + 3]) for p in parts]
        if kind == "batch":
            merged = RowBuffer(None, None)
            for rows in received:
                if rows is not None:
                    merged.append(rows)
            rows = merged.view(0, merged.size) if merged.scores is not None else self.empty()
            return taken, self._source(rows, sums)
        behind = self.buffer.size - self.last[0]
        length = self.last[1] - self.last[0]
        fresh = self.buffer.size - self.exchanged
        self.buffer.size = self.exchanged
        for index, rows in enumerate(received):
            if index == rank and fresh:
                self.own.append((self.buffer.size, self.buffer.size + fresh))
                if behind <= fresh and length:
                    start = self.buffer.size + fresh - behind
                    self.last = (start, start + length)
            if rows is not None:
                self.buffer.append(rows)
        self.exchanged = self.buffer.size
        return taken, self._source(self.all_rows(), sums)

    def restart(self) -> None:
        """Drop the rows of other ranks; everything of this rank counts as not yet exchanged."""
        if not self.keep or not self.exchanged:
            return
        rows, position = self.rows(), self._own_position()
        buffer = RowBuffer(None, self.device)
        buffer.append(rows.map(lambda t: t.clone()))
        self.buffer, self.last, self.own, self.exchanged = buffer, position, [], 0

    def _own_position(self) -> tuple[int, int]:
        """Return where the last update lies among this rank's rows."""
        at = 0
        for start, stop in [*self.own, (self.exchanged, self.buffer.size)]:
            if start <= self.last[0] and self.last[1] <= stop:
                return at + self.last[0] - start, at + self.last[1] - start
            at += stop - start
        return 0, 0

    # saving and merging

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        rows = self.rows() if self.keep else self._joined([(0, self.buffer.size)])
        position = self._own_position() if self.keep else self.last
        return {
            "rows": None if self.buffer.scores is None else _saved(rows),
            "last": list(position),
            "large": None if self.large is None else _saved(self.large),
            "start": self.start,
            "block": self.block,
            "sums": {_name(key): value.clone() for key, value in self.sums.items()},
            "last_direct": {_name(key): value.clone() for key, value in self.last_direct.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.clear()
        self.block = state["block"]
        if not self.keep:
            self.buffer.capacity = self.block
        if state["rows"] is not None:
            rows = _loaded(state["rows"])
            self.buffer.append(rows if self.device is None else _moved(rows, self.device))
        self.last = tuple(state["last"])  # type: ignore[assignment]
        self.large = None if state["large"] is None else _loaded(state["large"])
        self.start = state["start"]
        keys = {_name(key): key for keys in self._states.values() for key in keys}
        self.sums = {keys[name]: value.clone() for name, value in state["sums"].items()}
        self.last_direct = {keys[name]: value.clone() for name, value in state["last_direct"].items()}

    def merge(self, other: Store) -> None:
        """Add this rank's data of another store."""
        self.restart()
        mine = self.last != (0, 0) or self.large is not None or bool(self.last_direct)
        if self.keep:
            rows = other.rows()
            start = self.buffer.size
            if rows.scores.shape[0]:
                self.buffer.append(rows)
            if not mine:
                stop = start + rows.scores.shape[0]
                self.last = (stop - (other.last[1] - other.last[0]), stop)
        else:
            self.fold()
            pending = other._joined([(other.start, other.buffer.size)])
            if pending.scores.shape[0]:
                self._fold(pending)
            if not mine:
                self.large = other.last_rows().map(lambda t: t.clone())
        for key, value in other.sums.items():
            self._accumulate(key, value)
        if not mine:
            self.last_direct = {key: value.clone() for key, value in other.last_direct.items()}

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        state = self.state_dict()
        self.device = device
        for name in ("sums", "last_direct"):
            state[name] = {key: value.to(device) for key, value in state[name].items()}
        self.load_state_dict(state)


def _new_state(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Inference tensors could not be changed in place outside of inference mode.
    with torch.inference_mode(False):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _received(parts: list[Tensor]) -> Rows | None:
    scores, targets, mask = parts
    return Rows(scores, targets, mask if mask.numel() else None) if scores.shape[0] else None


def _type_of(rows: Rows) -> int:
    return row_type(not rows.scores.dtype.is_floating_point and not rows.scores.shape[1:], tuple(rows.scores.shape[1:]))


def _name(key: tuple[Piece, bool | None]) -> str:
    return f"{key[0].key}/{ {None: 'any', False: 'probabilities', True: 'logits'}[key[1]] }"


def _saved(rows: Rows) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in rows[:3]]


def _loaded(saved: list[Tensor | None]) -> Rows:
    scores, targets, mask = saved
    assert scores is not None and targets is not None
    return Rows(scores, targets, mask)


def _moved(rows: Rows, device: torch.device) -> Rows:
    return rows.map(lambda t: t.to(device))
