"""Buffers of rows that updates are copied into."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Rows

_MOST_WAITING = 64


class RowBuffer:
    """Rows in preallocated tensors: of a fixed capacity, or growing by doubling.

    The dtype is the promotion of everything that was given. A mask is kept from the first masked rows on. Small batches
    may wait until they are read, first as copies of their own, then many joined at once, which is several times faster
    than each alone.
    """

    def __init__(self, capacity: int | None = None, device: torch.device | None = None) -> None:
        self.capacity = capacity
        self.device = device
        self.size = 0
        self.scores: Tensor | None = None
        self.targets: Tensor | None = None
        self.mask: Tensor | None = None
        self._room = 0
        self._in_flight = False
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._joined: list[Rows] = []

    def add_copies(self, scores: Tensor, targets: Tensor, stop: int) -> None:
        """Take rows without a mask, of the kind of those before, that nobody else holds; with them there are `stop`."""
        waiting = self._waiting
        waiting.append((scores, targets))
        self.size = stop
        if len(waiting) >= _MOST_WAITING:
            self._join()

    def _join(self) -> None:
        scores, targets = zip(*self._waiting, strict=True)
        self._waiting = []
        self._joined.append(Rows(torch.cat(scores), torch.cat(targets)))

    def _take_in(self) -> None:
        """Append what waits."""
        if self._waiting:
            self._join()
        blocks, self._joined = self._joined, []
        total = self.size
        self.size = total - sum(rows.scores.shape[0] for rows in blocks)
        if total > self._room:
            self._prepare(blocks[0], total)
        for rows in blocks:
            self.append(rows)

    def append(self, rows: Rows) -> None:
        """Copy rows behind those that are there.

        Raises:
            ValueError: the rows are of another kind (labels or scores) or width than those before.
        """
        if self._waiting or self._joined:
            self._take_in()
        scores, targets, mask = rows[:3]
        count, start = scores.shape[0], self.size
        stop = start + count
        if stop > self._room or scores.dtype is not self.scores.dtype or targets.dtype is not self.targets.dtype:  # type: ignore[union-attr]
            self._prepare(rows, stop)
        elif scores.shape[1:] != self.scores.shape[1:] or targets.shape[1:] != self.targets.shape[1:]:  # type: ignore[union-attr]
            self._prepare(rows, stop)
        assert self.scores is not None and self.targets is not None
        wait = True
        if self.scores.device is not scores.device and self.scores.device != scores.device:
            wait = not self.scores.is_pinned()
            self._in_flight = not wait
        self.scores.narrow(0, start, count).copy_(scores, non_blocking=not wait)
        self.targets.narrow(0, start, count).copy_(targets, non_blocking=not wait)
        if mask is not None:
            if self.mask is None:
                self.mask = self._empty(torch.bool, self.targets.shape[1:])
                self.mask.fill_(True)
            self.mask.narrow(0, start, count).copy_(mask, non_blocking=not wait)
        elif self.mask is not None:
            self.mask.narrow(0, start, count).fill_(True)
        self.size = stop

    def view(self, start: int, stop: int) -> Rows:
        """Return rows without a copy."""
        assert self.scores is not None and self.targets is not None
        self.settle()
        mask = None if self.mask is None else self.mask[start:stop]
        return Rows(self.scores[start:stop], self.targets[start:stop], mask)

    def settle(self) -> None:
        """Append what waits, and wait for copies from an accelerator that are still on their way."""
        if self._waiting or self._joined:
            self._take_in()
        if self._in_flight:
            torch.cuda.synchronize()
            self._in_flight = False

    def check(self, rows: Rows) -> None:
        """Raise `ValueError` if rows of this kind cannot be appended."""
        if self.scores is None or self.targets is None:
            return
        if rows.scores.shape[1:] != self.scores.shape[1:] or rows.targets.shape[1:] != self.targets.shape[1:]:
            raise ValueError(
                f"rows of input and target have shapes {tuple(rows.scores.shape[1:])} and "
                f"{tuple(rows.targets.shape[1:])}, but earlier ones have {tuple(self.scores.shape[1:])} and "
                f"{tuple(self.targets.shape[1:])}"
            )

    def _prepare(self, rows: Rows, needed: int) -> None:
        """Make the tensors fit: shape, dtype, room."""
        scores, targets, _ = rows[:3]
        if self.scores is None or self.targets is None or not self.size:
            self._room = self.capacity or max(1024, needed)
            self._pick(scores)
            self.scores = self._empty(scores.dtype, scores.shape[1:])
            self.targets = self._empty(targets.dtype, targets.shape[1:])
            self.mask = None
            return
        self.check(rows)
        if needed > self._room:
            self.settle()
            self._room = max(needed, 2 * self._room)
        types = [
            torch.promote_types(old.dtype, new.dtype) for old, new in ((self.scores, scores), (self.targets, targets))
        ]
        for name, dtype in zip(("scores", "targets"), types, strict=True):
            old = getattr(self, name)
            if old.shape[0] < self._room or old.dtype != dtype:
                self.settle()
                setattr(self, name, self._grown(old, dtype))
        if self.mask is not None and self.mask.shape[0] < self._room:
            self.mask = self._grown(self.mask, torch.bool)

    def _grown(self, old: Tensor, dtype: torch.dtype) -> Tensor:
        new = self._empty(dtype, old.shape[1:])
        new[: self.size] = old[: self.size]
        return new

    def _pick(self, like: Tensor) -> None:
        self._device = self.device or like.device
        self._pin = self._device.type == "cpu" and like.device.type == "cuda"

    def _empty(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        # Inference tensors could not be changed in place outside of inference mode.
        with torch.inference_mode(False):
            return torch.empty((self._room, *shape), dtype=dtype, device=self._device, pin_memory=self._pin)
