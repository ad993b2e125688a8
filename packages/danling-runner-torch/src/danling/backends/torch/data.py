"""Loaders: from a dataset and the `dataloader` section to a stateful loader that leaves global generators alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from danling.runners.errors import ConfigError, ResumeError

from .sampler import StatefulSampler
from .workers import SeededDataset, derive_seed, garbage_stays_here, seeded, stop_at_exit, worker_starter


def is_map_style(dataset: Any) -> bool:
    """Return whether a dataset is indexed; torch gives its iterable datasets a `__getitem__` too, so that is no test.

    Examples:
        >>> is_map_style([1, 2, 3]), is_map_style(iter([1, 2, 3]))
        (True, False)
    """
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


class SplitLoader(StatefulDataLoader):
    """A `StatefulDataLoader` that knows its split.

    With a danling sampler its state is the epoch and the samples consumed, whatever the workers, ranks and batch size.
    With an iterable dataset it is the dataset's own state, per worker, and fits the same numbers of workers and ranks
    only. A state at the end of an epoch stands for the start of the next: no epoch is ever empty.
    """

    split: str
    ranks: int

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        stop_at_exit(self)
        with garbage_stays_here():
            return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        for part in (self.batch_sampler, self.sampler, self.dataset):
            if isinstance(part, (StatefulSampler, IterableShard)):
                part.set_epoch(epoch)

    @property
    def stateful_sampler(self) -> StatefulSampler | None:
        """The sampler that holds the position, if the dataset is map-style."""
        for sampler in (self.batch_sampler, self.sampler):
            if isinstance(sampler, StatefulSampler):
                return sampler
        return None

    def load(self, batch: int) -> Any:
        """Load one batch of map-style data in this process, with the random numbers that a worker would have drawn.

        Args:
            batch: its number, from 0, in the iteration from the current position of the sampler.
        """
        sampler, dataset = self.stateful_sampler, self.dataset
        place = next(islice(iter(sampler), batch, None))  # type: ignore[arg-type]
        with dataset.in_this_process() if isinstance(dataset, SeededDataset) else nullcontext():
            data = dataset[place] if sampler is self.sampler else dataset.__getitems__(place)
        return self.collate_fn(data)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches handed out so far."""
        sampler = self.stateful_sampler
        if sampler is not None:
            handed_out = self._iterator._num_yielded if self._iterator is not None else 0
            return {"epoch": sampler.epoch, "consumed": sampler.consumed_after(sampler.consumed, handed_out)}
        state = super().state_dict()
        dataset: IterableShard = self.dataset  # type: ignore[assignment]
        layout = {"workers": self.num_workers, "ranks": self.ranks, "epoch": dataset.epoch}
        return {**layout, "loader": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ResumeError: for iterable data that keeps no state, or that was read with other workers or ranks.
        """
        sampler = self.stateful_sampler
        if sampler is not None:
            self._iterator = None
            sampler.load_state_dict(state_dict)
            if sampler.is_complete(sampler.consumed):
                sampler.set_epoch(sampler.epoch + 1)
            return
        for name, now in {"workers": self.num_workers, "ranks": self.ranks}.items():
            if state_dict[name] != now:
                raise ResumeError(
                    f"the position of the iterable split {self.split!r} was taken with {state_dict[name]} {name} and "
                    f"fits no other number; there are {now} now"
                )
        self.dataset.set_epoch(state_dict["epoch"])  # type: ignore[attr-defined]
        super().load_state_dict(state_dict["loader"])


class IterableShard(IterableDataset):
    """This rank's part of an iterable dataset.

    Args:
        dataset: any iterable; its `state_dict` and `load_state_dict`, or those of its iterator, hold the position, and
            its `set_epoch` is called at the start of each epoch.
        seed: seed of the run.
        split: name of the split.
        rank: which part is ours.
        stride: keep every `stride`-th item, beginning with the `rank`-th; 1 keeps all.
        shared: other processes read the same items: those of the main process are drawn from seeds too.
    """

    def __init__(
        self, dataset: Any, *, seed: int, split: str, rank: int, stride: int = 1, shared: bool = False
    ) -> None:
        self.dataset, self.shared = dataset, shared
        self.seed, self.split, self.rank, self.stride = seed, split, rank, stride
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration belongs to."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration belongs to."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        length = len(self.dataset)
        return length if self.stride == 1 else len(range(self.rank, length, self.stride))

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        return ShardIterator(self)


class ShardIterator:
    """One pass over an `IterableShard`; in a worker, or where others read the same, each item is drawn from a seed."""

    def __init__(self, shard: IterableShard) -> None:
        self.shard = shard
        worker = get_worker_info()
        self._in_worker = worker is not None
        number = -1 if worker is None else worker.id
        seeds = self._in_worker or shard.shared
        self._key = (shard.seed, shard.split, shard.epoch, shard.rank, number) if seeds else None
        self.items = 0
        self.ended = False
        self._iterator: Any = None

    def __iter__(self) -> ShardIterator:
        return self

    def __next__(self) -> Any:
        if self.ended:
            raise StopIteration
        stride, rank = self.shard.stride, self.shard.rank
        while True:
            try:
                if self._key is None:
                    item = self._fetch()
                else:
                    with seeded(derive_seed(*self._key, self.items), put_back=not self._in_worker):
                        item = self._fetch()
            except StopIteration:
                self.ended = True
                raise
            self.items += 1
            if stride == 1 or (self.items - 1) % stride == rank:
                return item

    def _fetch(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.shard.dataset)
        return next(self._iterator)

    def state_dict(self) -> dict[str, Any]:
        """Return the items passed, and what the dataset and its iterator say about their position."""
        if self._iterator is None:
            self._iterator = iter(self.shard.dataset)
        state: dict[str, Any] = {"items": self.items, "ended": self.ended}
        for name, part in (("dataset", self.shard.dataset), ("iterator", self._iterator)):
            if _has_state(part) and not (name == "iterator" and part is self.shard.dataset):
                state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken.

        Raises:
            ResumeError: when neither the dataset nor its iterator had a state to give.
        """
        if not {"dataset", "iterator"} & state.keys():
            raise ResumeError(
                f"the iterable dataset of split {self.shard.split!r} has no state_dict and load_state_dict: its "
                "position in the epoch cannot be restored; give it both, or resume from a checkpoint of a whole epoch"
            )
        self.items, self.ended = state["items"], state["ended"]
        if self.ended:  # many datasets are at their start again by now, and a pass must not be run twice
            return
        if "dataset" in state:
            self.shard.dataset.load_state_dict(state["dataset"])
        self._iterator = iter(self.shard.dataset)
        if "iterator" in state:
            self._iterator.load_state_dict(state["iterator"])


def _has_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def as_it_is(batch: Any) -> Any:
    """Return a batch that is made already.

    >>> as_it_is([1, 2])
    [1, 2]
    """
    return batch


def shard_iterable(
    dataset: Any, split: str, mode: str, *, seed: int, rank: int, ranks: int, shared: bool = False
) -> IterableShard:
    """Return this rank's part of an iterable dataset.

    Args:
        dataset: any iterable.
        split: name of the split.
        mode: `auto`, `stride` or `none`, as in `dataloader.shard`.
        seed: seed of the run.
        rank: this data rank.
        ranks: number of data ranks.
        shared: other processes read the same items.

    Raises:
        ConfigError: several ranks, `auto`, and a dataset without `shard(num_shards, index)`.
    """
    stride = 1
    if ranks > 1 and mode == "stride":
        stride = ranks
    elif ranks > 1 and mode == "auto":
        if not hasattr(dataset, "shard"):
            raise ConfigError(
                f"the iterable dataset of split {split!r} has no shard(num_shards, index), and {ranks} ranks would all "
                f"read the same items; set dataloader.shard to 'stride' (each rank keeps one item in {ranks}) or to "
                "'none' (the dataset divides itself)"
            )
        dataset = dataset.shard(ranks, rank)
    return IterableShard(dataset, seed=seed, split=split, rank=rank, stride=stride, shared=shared)


def build_dataloader(
    dataset: Any,
    split: str,
    options: Mapping[str, Any],
    sampler: StatefulSampler | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    *,
    seed: int,
    rank: int = 0,
    device: torch.device | str = "cpu",
    ranks: int = 1,
    train: bool = False,
    shared: bool = False,
) -> SplitLoader:
    """Return the loader of a split; no worker starts before the first iteration.

    Args:
        dataset: map-style or iterable.
        split: its name.
        options: the keys of the `dataloader` section as they apply to this split.
        sampler: for a map-style dataset, from `build_sampler`.
        collate_fn: makes a batch of samples; unused when the dataset yields batches.
        seed: seed of the run.
        rank: this data rank.
        device: where batches go; an accelerator makes page-locked memory the default.
        ranks: number of data ranks.
        train: whether this is a train split, for the default of `drop_last` of iterable data.
        shared: other processes read the same batches: random augmentation is the same in all, in items of
            iterable data, and of map-style data in `collate_fn` too.

    Raises:
        ConfigError: for data that is neither map-style nor iterable, or that cannot be divided over the ranks.
    """
    option = {**options}.get
    workers, batch_size = option("num_workers", 0), option("batch_size", 1)
    arguments: dict[str, Any] = {"num_workers": workers, "snapshot_every_n_steps": option("snapshot_every_n_steps", 1)}
    arguments["generator"] = torch.Generator().manual_seed(derive_seed(seed, split, "loader", rank))
    pin = option("pin_memory")
    arguments["pin_memory"] = torch.device(device).type != "cpu" if pin is None else pin
    if option("pin_memory_device"):
        arguments["pin_memory_device"] = option("pin_memory_device")
    if workers:
        for name in ("prefetch_factor", "persistent_workers", "timeout", "in_order", "multiprocessing_context"):
            if option(name) is not None:
                arguments[name] = option(name)
        arguments["worker_init_fn"] = worker_starter()
    if batch_size is not None:
        arguments["collate_fn"] = collate_fn
    if sampler is not None:
        data = dataset
        if workers or shared:
            collate = None
            if batch_size is not None:
                collate, arguments["collate_fn"] = collate_fn or default_collate, as_it_is
            data = SeededDataset(dataset, seed, split, rank, in_process=shared, collate=collate)
        arguments |= {"batch_sampler": sampler} if batch_size is not None else {"batch_size": None, "sampler": sampler}
    elif hasattr(dataset, "__iter__") and not is_map_style(dataset):
        data = shard_iterable(dataset, split, option("shard", "auto"), seed=seed, rank=rank, ranks=ranks, shared=shared)
        drop_last = option("drop_last")
        drop_last = train if drop_last is None else drop_last
        arguments |= {"batch_size": batch_size, "drop_last": drop_last and batch_size is not None}
    else:
        raise ConfigError(
            f"the dataset of split {split!r} ({type(dataset).__name__}) can be neither indexed nor iterated: it needs "
            "__getitem__ and __len__, or __iter__"
        )
    with warnings.catch_warnings():  # torchdata still calls a function that torch has deprecated
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        loader = SplitLoader(data, **arguments)
    loader.split, loader.ranks = split, ranks
    return loader
