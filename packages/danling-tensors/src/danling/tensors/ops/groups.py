"""Which rows a reduction brings together, and the structure of what is left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from danling.tensors.layout import Layout, LengthsError, Segments, called, require


class Groups(NamedTuple):
    """Rows of a layout put in groups.

    Attributes:
        order: Row permutation `(R,)` that makes groups contiguous; `None` when they are.
        offsets: CPU int64 `(G+1,)` rows before each group.
        count: Number of groups.
        segments: Structure of the groups when they are the rows of ragged elements, else `None`.
        sizes: Dense sizes of the groups when they are not, e.g. `(B,)` or `(Lmax,)`.
        position: `(R,)` coordinate of each row (in its original order) along what was reduced.
        key: Name of the grouping, for caches.
    """

    order: Tensor | None
    offsets: Tensor
    count: int  # type: ignore[assignment]
    segments: Segments | None
    sizes: tuple[int, ...]
    position: Tensor
    owner: Segments
    key: Any

    def on(self, name: str, device: torch.device) -> Tensor:
        """`"offsets"`, `"order"`, `"group"` (group of each sorted row), `"lengths"` or `"position"` on a device."""
        return self.owner.memo(("groups", self.key, name, device), lambda: self._build(name, device))

    def _build(self, name: str, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if name == "group":
                lengths = self.on("lengths", device)
                index = torch.arange(self.count, device=device)
                return torch.repeat_interleave(index, lengths, output_size=self.owner.rows)
            if name == "lengths":
                offsets = self.on("offsets", device)
                return offsets[1:] - offsets[:-1]
            if name == "inverse":
                order = self.on("order", device)
                return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
            return getattr(self, name).to(device)

    @property
    def first_empty(self) -> int | None:
        """The first group without rows, `None` when every group has some."""

        if self.owner.symbolic:
            require((self.offsets.diff() > 0).all(), f"{called()}: an element is empty, and there is no identity")
            return None

        def build() -> int | None:
            found = (self.offsets.diff() == 0).nonzero()
            return int(found[0]) if len(found) else None

        return self.owner.memo(("first empty", self.key), build)

    def sort(self, values: Tensor) -> Tensor:
        """Rows in group order."""
        return values if self.order is None else values.index_select(0, self.on("order", values.device))

    def unsort(self, values: Tensor) -> Tensor:
        """Rows back in their own order."""
        return values if self.order is None else values.index_select(0, self.on("inverse", values.device))


def group_rows(layout: Layout, batch: bool, ragged: tuple[int, ...]) -> Groups:
    """Group the rows of `layout` that a reduction over the batch and some ragged dims (by number) brings together."""
    segments = layout.segments
    build = _traced_group if segments.symbolic else _group
    return segments.memo(("group", batch, ragged), lambda: build(segments, batch, ragged))


def _traced_group(segments: Segments, batch: bool, ragged: tuple[int, ...]) -> Groups:
    """`_group` in a graph: one ragged dim, whose rows come together by element or by position."""
    offsets = segments.on("offsets", segments.offsets.device)
    element, row = (segments.on(name, offsets.device) for name in ("element", "row"))
    key = (batch, ragged)
    if not batch and ragged == tuple(range(segments.k)):
        return Groups(None, offsets, segments.batch_size, None, (segments.batch_size,), row, segments, key)
    if ragged or segments.k != 1:
        raise LengthsError
    longest = segments.max_sizes[0]
    order = torch.argsort(row, stable=True)
    bounds = torch.searchsorted(row.index_select(0, order), torch.arange(longest + 1, device=offsets.device))
    return Groups(order, bounds, longest, None, (longest,), element, segments, key)


def _group(segments: Segments, batch: bool, ragged: tuple[int, ...]) -> Groups:
    k, rows, cpu = segments.k, segments.rows, torch.device("cpu")
    key = (batch, ragged)
    kept = [j for j in range(k) if j not in ragged]

    def coord(j: int) -> Tensor:
        return segments.on(("coord", j), cpu)  # type: ignore[arg-type]

    with torch.inference_mode(False), torch.no_grad():
        element = segments.on("element", cpu)
        position = torch.zeros(rows, dtype=torch.int64, device="cpu")
        if batch:
            position = element
        sizes = segments.sizes
        for j in ragged:
            extent = torch.full((segments.batch_size,), segments.max_sizes[j], device="cpu") if batch else sizes[:, j]
            position = position * extent.index_select(0, element) + coord(j)
        if not batch and not kept:
            return Groups(
                None, segments.offsets, segments.batch_size, None, (segments.batch_size,), position, segments, key
            )
        if batch:
            extents = tuple(segments.max_sizes[j] for j in kept)
            group = torch.zeros(rows, dtype=torch.int64, device="cpu")
            for j in kept:
                group = group * segments.max_sizes[j] + coord(j)
            count = int(torch.Size(extents).numel())
            new = None
        else:
            new = Segments(sizes[:, kept].contiguous())
            group = new.offsets.index_select(0, element)
            inner = torch.zeros(rows, dtype=torch.int64, device="cpu")
            for j in kept:
                inner = inner * sizes[:, j].index_select(0, element) + coord(j)
            group = group + inner
            count, extents = new.rows, ()
        order = None
        if rows and bool((group[1:] < group[:-1]).any()):
            order = torch.argsort(group, stable=True)
        offsets = torch.zeros(count + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(torch.bincount(group, minlength=count), 0, out=offsets[1:])
        return Groups(order, offsets, count, new, extents, position, segments, key)
