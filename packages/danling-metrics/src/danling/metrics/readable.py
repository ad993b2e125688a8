"""Reading, caching and formatting, common to every meter and container."""

from __future__ import annotations

from typing import Any

import torch

from . import sync
from .round_dict import RoundDict, format_leaf


class Readable:
    """What every class of this package offers to be read.

    A subclass bumps `_version` whenever its state changes, and implements `_compute(kind)`, where `kind` is `"value"`,
    `"local_average"`, `"batch"` or `"average"`; the last two may use what an exchange has left behind.
    """

    distributed: bool = True
    group: Any = None
    device: torch.device | None = None
    _version: int
    _generation: int
    _synced: dict[str, int]
    _cache: dict[str, tuple[int, Any]]

    def _init_readable(self, device: Any, distributed: bool, group: Any) -> None:
        self.device = None if device is None else torch.device(device)
        self.distributed = distributed
        self.group = group
        self._version = 0
        self._generation = 0
        self._synced = {}
        self._cache = {}

    # reading

    def value(self) -> Any:
        """Return the value of the last update on this rank. Never communicates."""
        return self._local("value")

    def batch(self) -> Any:
        """Return the value of the last update of every rank, combined as one batch. Collective when distributed."""
        return self._collective("batch", "value")

    def average(self, sync: bool = True) -> Any:
        """Return the value over everything since `reset()`.

        Args:
            sync: include all ranks, which makes the call collective; False reads this rank alone.
        """
        return self._collective("average", "local_average") if sync else self._local("local_average")

    @property
    def val(self) -> Any:
        """`value()`"""
        return self.value()

    @property
    def bat(self) -> Any:
        """`batch()`"""
        return self.batch()

    @property
    def avg(self) -> Any:
        """`average()`"""
        return self.average()

    def _current(self) -> int:
        """Return a number that grows with every change; containers of meters add up those of their members."""
        return self._version

    def _is_distributed(self) -> bool:
        return sync.world_size(self.distributed, self.group) > 1

    def _local(self, kind: str) -> Any:
        cached = self._cache.get(kind)
        version = self._current()
        if cached is None or cached[0] != version:
            cached = self._cache[kind] = (version, self._compute(kind))
        return _hand_out(cached[1])

    def _collective(self, kind: str, local: str) -> Any:
        if not self._is_distributed():
            return self._local(local)
        self._exchange(kind)
        cached = self._cache.get(kind)
        if cached is None:
            cached = self._cache[kind] = (self._current(), self._compute(kind))
        return _hand_out(cached[1])

    def _exchange(self, kind: str) -> None:
        """Exchange state with the other ranks; what was computed from an older exchange is dropped."""
        if sync.exchange(self, kind, self.group, self.device):  # type: ignore[arg-type]
            self._synced[kind] = self._current()
            self._cache.pop(kind, None)

    def _compute(self, kind: str) -> Any:
        raise NotImplementedError

    # what the exchange asks

    def _changed(self, kind: str) -> bool:
        return self._synced.get(kind) != self._current()

    def _check(self, kind: str) -> None:
        """Raise if the state cannot be read."""

    def _adopt(self, description: Any) -> None:
        raise NotImplementedError

    def _restart(self, generation: int) -> None:
        self._generation = generation

    def _forget_reads(self) -> None:
        """Drop cached values and earlier exchanges, after a member was replaced."""
        self._version += 1
        self._synced = {}
        self._cache = {}

    def _touch(self) -> None:
        """Record a reset, merge or load: cached values and earlier exchanges no longer hold."""
        self._version += 1
        self._generation += 1
        self._synced = {}
        self._cache = {}

    # formatting

    def __format__(self, spec: str) -> str:
        return describe_values(self.value(), self.average(sync=False), spec)

    def __str__(self) -> str:
        return format(self, ".4f")

    # copies drop the process group: it belongs to the process, not to the state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None, "_synced": {}, "_cache": {}}


def describe_values(val: Any, avg: Any, spec: str) -> str:
    """Return `val (avg)` of a meter, or `name: val (avg)` of every leaf of a container."""
    if not isinstance(val, RoundDict):
        return f"{format_leaf(val, spec)} ({format_leaf(avg, spec)})"
    averages = dict(avg.leaves())
    return "  ".join(
        f"{path}: {format_leaf(leaf, spec)} ({format_leaf(averages.get(path, float('nan')), spec)})"
        for path, leaf in val.leaves()
    )


def _hand_out(result: Any) -> Any:
    return result.copy() if isinstance(result, RoundDict) else result
