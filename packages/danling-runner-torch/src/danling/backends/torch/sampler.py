"""The order of a map-style split: seeded by epoch, dealt over data ranks, resumed by counting samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from danling.runners.errors import ConfigError

from .workers import Index, IndexBatch, derive_seed


class StatefulSampler(Sampler):
    """A batch sampler whose position is the number of samples that all ranks have consumed in the epoch.

    The order of epoch *e* is a permutation seeded by (seed, split, e), or the order of the dataset. Micro-batch *j*
    takes the next `batch_size * data_ranks` indices, rank *r* the *r*-th block of them; what is left at the end is
    dealt as evenly as possible, or left out with `drop_last`. Any position can be the start of an iteration, whatever
    batch size and number of ranks led there: what follows is exactly the rest of the epoch.

    In training every rank gets the same number of micro-batches: a rank for which nothing is left repeats one sample,
    which `is_filler` tells. In evaluation such a rank just has one batch less.

    Args:
        length: samples in the dataset.
        split: its name.
        seed: seed of the run.
        shuffle: permute, or keep the order.
        drop_last: leave out the incomplete last global batch.
        batch_size: samples per micro-batch and rank; None when an item of the dataset is a whole batch.
        data_rank: which share of each global batch is ours.
        data_ranks: how many shares there are.
        train: whether ranks have to stay in step.

    Examples:
        >>> sampler = StatefulSampler(7, "train", seed=1, shuffle=False, drop_last=False, batch_size=2, data_ranks=2)
        >>> list(sampler), len(sampler)
        ([[0, 1], [4, 5]], 2)
        >>> sampler.consumed_after(0, 1)
        4
        >>> sampler.load_state_dict({"epoch": 0, "consumed": 4})
        >>> list(sampler)
        [[4, 5]]
    """

    def __init__(
        self,
        length: int,
        split: str,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        batch_size: int | None,
        data_rank: int = 0,
        data_ranks: int = 1,
        train: bool = True,
    ) -> None:
        if not 0 <= data_rank < data_ranks:
            raise ValueError(f"data_rank is one of 0 to {data_ranks - 1}, got {data_rank}")
        self.length, self.split, self.seed, self.shuffle, self.train = length, split, seed, shuffle, train
        self.drop_last, self.batch_size = drop_last, batch_size
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.epoch = self.consumed = 0

    @property
    def global_batch(self) -> int:
        """Samples that all ranks consume with one micro-batch each."""
        return (self.batch_size or 1) * self.data_ranks

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position at which an iteration starts."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position, from which the next iteration starts.

        Raises:
            ValueError: when it is outside of the dataset, which then is not the one of the position.
        """
        epoch, consumed = int(state["epoch"]), int(state["consumed"])
        if not 0 <= consumed <= self.length:
            raise ValueError(
                f"the position {consumed} of split {self.split!r} is outside of its {self.length} samples: "
                "this is not the dataset the position was taken in"
            )
        self.epoch, self.consumed = epoch, consumed

    def consumed_after(self, start: int, batches: int) -> int:
        """Return the position after `batches` micro-batches per rank from position `start`."""
        return min(start + batches * self.global_batch, self.length)

    def is_filler(self, batch: int) -> bool:
        """Return whether the `batch`-th micro-batch from the current position, from 1, only keeps ranks in step."""
        full, _, share = self._plan(self.consumed)
        return self.train and batch > full and not share

    def is_complete(self, consumed: int) -> bool:
        """Return whether no micro-batch follows a position."""
        remaining = self.length - consumed
        return remaining < self.global_batch if self.drop_last else remaining <= 0

    def pass_length(self) -> int:
        """Return the micro-batches of this rank in a whole epoch, whatever the current position."""
        return self._count(0)

    def __len__(self) -> int:
        return self._count(self.consumed)

    def __iter__(self) -> Iterator[Any]:
        order = self.order()
        start, size, rank = self.consumed, self.batch_size or 1, self.data_rank
        full, last, share = self._plan(start)
        for batch in range(full):
            position = start + batch * self.global_batch
            yield self._batch(order, position + rank * size, position + (rank + 1) * size, position)
        if not last:
            return
        position = start + full * self.global_batch
        if share:
            first = position + rank * (last // self.data_ranks) + min(rank, last % self.data_ranks)
            yield self._batch(order, first, first + share, position)
        elif self.train:
            yield self._batch(order, position, position + 1, position)

    def order(self) -> torch.Tensor | None:
        """Return the permutation of the current epoch, None for the order of the dataset."""
        if not self.shuffle:
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.split, self.epoch))
        return torch.randperm(self.length, generator=generator)

    def _plan(self, start: int) -> tuple[int, int, int]:
        """Return the complete global batches from a position, the samples after them, and our share of those."""
        full, last = divmod(self.length - start, self.global_batch)
        if self.drop_last:
            last = 0
        share = last // self.data_ranks + (self.data_rank < last % self.data_ranks)
        return full, last, share

    def _count(self, start: int) -> int:
        full, last, share = self._plan(start)
        return full + bool(share or last and self.train)

    def _batch(self, order: torch.Tensor | None, first: int, stop: int, position: int) -> Any:
        indices = list(range(first, stop)) if order is None else order[first:stop].tolist()
        batch: Any = IndexBatch(indices) if self.batch_size is not None else Index(indices[0])
        batch.epoch, batch.position = self.epoch, position
        return batch


def build_sampler(
    dataset: Any,
    split: str,
    *,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    batch_size: int | None,
    data_rank: int = 0,
    data_ranks: int = 1,
    train: bool = True,
) -> StatefulSampler:
    """Return the sampler of a map-style split; see `StatefulSampler` for the arguments.

    Raises:
        ConfigError: when a train split has no complete batch, so that an epoch would train nothing.
    """
    sampler = StatefulSampler(
        len(dataset),
        split,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        batch_size=batch_size,
        data_rank=data_rank,
        data_ranks=data_ranks,
        train=train,
    )
    if train and not sampler.pass_length():
        if not sampler.length:
            raise ConfigError(f"the dataset of split {split!r} is empty")
        raise ConfigError(
            f"split {split!r} has {sampler.length} samples, less than one batch of {batch_size} on each of "
            f"{data_ranks} ranks, and dataloader.drop_last leaves incomplete batches out: an epoch would train "
            "nothing; lower dataloader.batch_size or set dataloader.drop_last to false"
        )
    return sampler
