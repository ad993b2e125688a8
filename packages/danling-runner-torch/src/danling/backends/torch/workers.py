"""Loader workers: seeds that make augmentation repeatable, and signals that are their parent's business."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, get_worker_info

from .rng import capture_rng, restore_rng

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def derive_seed(*parts: Any) -> int:
    """Return a seed of 63 bits that depends on the parts alone: not on the process, not on Python's hash.

    Examples:
        >>> derive_seed(1016, "train", 0) == derive_seed(1016, "train", 0) != derive_seed(1016, "train", 1)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, torch and, if it is loaded, NumPy in this process."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


class IndexBatch(list):
    """The indices of a micro-batch, with the epoch and the samples consumed before it, also on the way to a worker."""

    epoch: int
    position: int


class Index(int):
    """One index of a dataset that yields whole batches, with epoch and position as in `IndexBatch`."""

    epoch: int
    position: int


class SeededDataset(Dataset):
    """A map-style dataset that seeds its worker before each batch.

    The seed depends on (seed, split, epoch, rank, position of the batch in the epoch): random augmentation is the same
    after a resume in the middle of an epoch and with any number of workers. In the main process, whose generators a
    checkpoint holds, nothing is seeded, unless several processes read the same batches (`in_process`): then its
    generators are put back afterwards. With `collate` batches are made here, from the same random numbers. All other
    attributes are those of the dataset inside.
    """

    def __init__(
        self, dataset: Any, seed: int, split: str, rank: int, *, in_process: bool = False, collate: Any = None
    ) -> None:
        self.dataset = dataset
        self._in_process = in_process
        self._collate = collate
        self._key = (seed, split)
        self._rank = rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        with self._seeded(index):
            return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        with self._seeded(indices):
            fetch = getattr(self.dataset, "__getitems__", None)
            samples = fetch(list(indices)) if fetch else [self.dataset[index] for index in indices]
            return samples if self._collate is None else self._collate(samples)

    @contextmanager
    def in_this_process(self) -> Iterator[None]:
        """A context in which this process loads what a worker would have, from the same random numbers."""
        before, self._in_process = self._in_process, True
        try:
            yield
        finally:
            self._in_process = before

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _seeded(self, place: Any) -> AbstractContextManager:
        in_worker = get_worker_info() is not None
        if not (in_worker or self._in_process) or not hasattr(place, "position"):
            return _AS_IT_IS
        seed = derive_seed(*self._key, place.epoch, self._rank, place.position)
        return seeded(seed, put_back=not in_worker)


@contextmanager
def seeded(seed: int, *, put_back: bool) -> Iterator[None]:
    """Draw random numbers from a seed; `put_back` leaves the generators of the process as they were."""
    host = torch.device("cpu")
    state = capture_rng(host) if put_back else None
    seed_everything(seed)
    try:
        yield
    finally:
        if state is not None:
            restore_rng(state, host)


_AS_IT_IS = nullcontext()


def start_worker(worker: int, *, parent: int) -> None:
    """Leave interrupts to the parent: a signal to the whole process group must not take data from a run that is saving.

    A worker whose parent is gone obeys them.
    """

    def handle(number: int, frame: Any) -> None:
        if os.getppid() != parent:
            os._exit(128 + number)

    for name in SIGNALS:
        with suppress(ValueError, AttributeError):
            signal.signal(getattr(signal, name), handle)


@contextmanager
def garbage_stays_here() -> Iterator[None]:
    """Encloses the fork of workers: what the parent no longer needs is never collected in them.

    A process group of an earlier run, collected in a fork, waits for threads that are not there, or crashes.
    """
    if gc.get_freeze_count():  # the user has frozen what there was, and would not want it thawed
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_loaders: WeakSet[Any] = WeakSet()


def stop_at_exit(loader: Any) -> None:
    """Stop the workers of a loader when this process ends, if nobody has by then: they ignore the signal it would send."""
    _loaders.add(loader)


@atexit.register  # after multiprocessing's own, so it runs before that waits for the workers
def _stop_all() -> None:
    for loader in list(_loaders):
        stop_workers(loader)


def worker_starter() -> Any:
    """Return the `worker_init_fn` for workers that this process starts."""
    return partial(start_worker, parent=os.getpid())


def stop_workers(loader: Any, grace: float = 2.0) -> None:
    """Stop the worker processes of a loader, if it has any, and forget its iterator.

    Args:
        loader: any `torch.utils.data.DataLoader`; other objects are left alone.
        grace: seconds after which workers that are still busy with a batch are killed.
    """
    iterator = getattr(loader, "_iterator", None)
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        return
    workers = list(getattr(iterator, "_workers", ()))

    def kill() -> None:
        for worker in workers:
            with suppress(Exception):
                worker.kill()

    timer = threading.Timer(grace, kill)
    timer.daemon = True
    timer.start()
    with suppress(Exception):  # torch reports a killed worker, which is what we want here
        shutdown()
    timer.cancel()
    kill()
    for worker in workers:
        with suppress(Exception):
            worker.join(5)
    loader._iterator = None
