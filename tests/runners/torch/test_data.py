"""Loaders with real workers: ids, resume, augmentation, iterable data, signals."""

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from danling.backends.torch.data import SplitLoader, build_dataloader, is_map_style
from danling.backends.torch.sampler import build_sampler
from danling.backends.torch.workers import SeededDataset, stop_workers
from danling.runners.errors import ConfigError, ResumeError
from support.tiny import Tiny, tiny_config


class Noisy(Dataset):
    """Samples (id, noise of Python, NumPy and torch)."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


class WholeBatches(Noisy):
    """Each item is a batch already."""

    def __getitem__(self, index):
        return torch.full((index + 1,), index)


class Fetcher(Noisy):
    """Fetches a list of indices at once."""

    def __getitems__(self, indices):
        assert isinstance(indices, list)
        return [self[index] for index in indices]


class Stream(IterableDataset):
    """Counts up with some noise, divides itself over workers, and knows its position."""

    def __init__(self, length):
        self.length, self.next, self.epoch = length, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        start, self.next = self.next, 0
        for position in range(start, self.length):
            self.next = position + 1
            if position % workers == own:
                yield self.epoch * 1000 + position, random.random()
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Stateless(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        yield from range(self.length)


class Shardable(Stateless):
    def __init__(self, items):
        self.items = list(items)

    def __iter__(self):
        yield from self.items

    def shard(self, num_shards, index):
        return Shardable(self.items[index::num_shards])


class Stuck(Noisy):
    """The worker never comes back from the item after the second."""

    def __getitem__(self, index):
        while index >= 2:
            time.sleep(0.05)
        return index


def make(
    dataset,
    *,
    split="train",
    seed=7,
    rank=0,
    ranks=1,
    train=True,
    shuffle=True,
    collate_fn=None,
    device="cpu",
    **options,
):
    options = {"batch_size": 4, "drop_last": False, **options}
    sampler = None
    if is_map_style(dataset):
        sampler = build_sampler(
            dataset,
            split,
            seed=seed,
            shuffle=shuffle,
            drop_last=options["drop_last"],
            batch_size=options["batch_size"],
            data_rank=rank,
            data_ranks=ranks,
            train=train,
        )
    return build_dataloader(
        dataset, split, options, sampler, default_collate, seed=seed, rank=rank, ranks=ranks, train=train, device=device
    )


def rows(batches):
    """Samples as tuples of numbers."""
    return [row for batch in batches for row in zip(*(column.tolist() for column in batch), strict=True)]


def ids(batches):
    return [row[0] for row in rows(batches)]


@pytest.fixture
def quiet():
    """Stop the workers of every loader a test made."""
    loaders = []

    def keep(*args, **kwargs):
        loaders.append(make(*args, **kwargs))
        return loaders[-1]

    yield keep
    for loader in loaders:
        stop_workers(loader)


# -- map-style


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy, Fetcher])
def test_every_sample_once_per_epoch_in_the_order_of_the_sampler(quiet, workers, dataset):
    loader = quiet(dataset(19), num_workers=workers)
    order = loader.batch_sampler.order().tolist()
    assert ids(loader) == order and sorted(order) == list(range(19)) and len(loader) == 5
    loader.set_epoch(1)
    assert ids(loader) == loader.batch_sampler.order().tolist() != order


def test_no_worker_starts_before_the_first_iteration_and_global_generators_stay(quiet):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loader = quiet(Noisy(9), num_workers=2)
    assert loader._iterator is None and len(loader) == 3
    list(loader)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    fixed = quiet(TensorDataset(torch.arange(9)), num_workers=0)
    list(fixed)
    assert torch.equal(torch.get_rng_state(), states[2])


def test_augmentation_depends_neither_on_the_number_of_workers_nor_on_where_an_epoch_was_cut(quiet):
    whole = rows(quiet(Noisy(30), num_workers=1))
    assert len({row[1:] for row in whole}) == 30
    assert rows(quiet(Noisy(30), num_workers=2, prefetch_factor=1)) == whole
    assert rows(quiet(Noisy(30), num_workers=2, persistent_workers=True)) == whole
    resumed = quiet(Noisy(30), num_workers=2)
    resumed.load_state_dict({"epoch": 0, "consumed": 12})
    assert rows(resumed) == whole[12:]
    again = quiet(Noisy(30), num_workers=2)
    again.set_epoch(1)
    other = rows(again)
    assert {row[1:] for row in other}.isdisjoint(row[1:] for row in whole)
    assert rows(quiet(Noisy(30), num_workers=1, seed=8)) != whole
    ours, theirs = (rows(quiet(Noisy(30), num_workers=1, rank=rank, ranks=2)) for rank in range(2))
    assert {row[1] for row in ours}.isdisjoint(row[1] for row in theirs)


@pytest.mark.slow
def test_spawned_workers_do_the_same(quiet):
    whole = rows(quiet(Noisy(30), num_workers=1))
    assert rows(quiet(Noisy(30), num_workers=2, multiprocessing_context="spawn")) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_taken_from_the_loader(quiet, workers):
    options = {"num_workers": workers}
    whole = ids(quiet(Noisy(30)))
    for taken in (0, 1, 3, 7):
        loader = quiet(Noisy(30), **options)
        first = list(itertools.islice(loader, taken))
        state = loader.state_dict()
        assert state == {"epoch": 0, "consumed": 4 * taken}  # not what workers had fetched ahead
        resumed = quiet(Noisy(30), num_workers=2 - workers, batch_size=5)
        resumed.load_state_dict(state)
        assert ids(first) + ids(resumed) == whole


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_position_at_the_end_of_an_epoch_is_the_start_of_the_next(quiet, drop_last):
    loader = quiet(Noisy(10), drop_last=drop_last)
    list(loader)
    resumed = quiet(Noisy(10), drop_last=drop_last)
    resumed.load_state_dict(loader.state_dict())
    expected = quiet(Noisy(10), drop_last=drop_last)
    expected.set_epoch(1)
    assert ids(resumed) == ids(expected) != []


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_that_yield_whole_batches(quiet, workers):
    loader = quiet(WholeBatches(5), batch_size=None, num_workers=workers, shuffle=False)
    assert [batch.tolist() for batch in loader] == [[index] * (index + 1) for index in range(5)]
    loader.load_state_dict({"epoch": 0, "consumed": 3})
    assert [len(batch) for batch in loader] == [4, 5]


def test_ranks_share_an_epoch_and_evaluation_has_no_duplicates(quiet):
    for train in (True, False):
        shares = [ids(quiet(Noisy(18), rank=rank, ranks=4, train=train, batch_size=2)) for rank in range(4)]
        if not train:
            assert sorted(itertools.chain(*shares)) == list(range(18))
            assert {len(share) for share in shares} == {4, 5}
        else:
            assert set(itertools.chain(*shares)) == set(range(18)) and len({len(share) for share in shares}) == 1


def test_a_dataset_in_workers_keeps_its_attributes():
    dataset = SeededDataset(Noisy(3), 1, "train", 0)
    assert dataset.length == 3 and len(dataset) == 3 and dataset[1][0] == 1
    with pytest.raises(AttributeError, match="colour"):
        dataset.colour  # noqa: B018


def test_options_reach_the_loader():
    loader = make(
        Noisy(4), num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=5.0, in_order=True,
        multiprocessing_context="forkserver", snapshot_every_n_steps=2, pin_memory=None,
    )  # fmt: skip
    assert isinstance(loader, SplitLoader) and (loader.num_workers, loader.prefetch_factor) == (2, 3)
    assert loader.persistent_workers and loader.timeout == 5.0 and loader.snapshot_every_n_steps == 2
    assert loader.multiprocessing_context.get_start_method() == "forkserver" and not loader.pin_memory
    assert (
        make(Noisy(4), device="cuda:0").pin_memory and not make(Noisy(4), device="cuda:0", pin_memory=False).pin_memory
    )
    single = make(Noisy(4), num_workers=0, timeout=5.0, multiprocessing_context="spawn", prefetch_factor=None)
    assert ids(single) == single.batch_sampler.order().tolist()


# -- iterable


@pytest.mark.parametrize(
    "make_stream", [Stateless, lambda length: (i for i in range(length)), lambda length: iter(range(length))]
)
def test_iterable_data_in_one_process_is_taken_as_it_is(quiet, make_stream):
    loader = quiet(make_stream(10))
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_train_splits_of_iterable_data_leave_the_incomplete_batch_out(quiet):
    assert [len(batch) for batch in quiet(Stateless(10), drop_last=None, train=True)] == [4, 4]
    assert [len(batch) for batch in quiet(Stateless(10), drop_last=None, train=False)] == [4, 4, 2]
    assert list(quiet(Stateless(3), batch_size=None, drop_last=None, train=True)) == [0, 1, 2]


def test_iterable_data_on_several_ranks():
    def shares(dataset, **options):
        return [
            [i for batch in make(dataset, rank=rank, ranks=3, **options) for i in batch.tolist()] for rank in range(3)
        ]

    assert shares(Stateless(8), shard="stride") == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert shares(Stateless(4), shard="none") == [[0, 1, 2, 3]] * 3
    assert shares(Shardable(range(8))) == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(ConfigError, match="'train' has no shard.*3 ranks.*'stride'.*'none'"):
        shares(Stateless(8))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize("stride", [1, 2])
def test_stateful_streams_resume_with_items_and_noise(quiet, workers, persistent, stride):
    options = {"num_workers": workers, "persistent_workers": persistent, "batch_size": 3}
    options |= {"ranks": stride, "rank": stride - 1, "shard": "stride"}
    random.seed(0)
    expected = rows(quiet(Stream(40), **options))
    for taken in (1, 2, 5):
        random.seed(0)
        loader = quiet(Stream(40), **options)
        iterator = iter(loader)
        first = [next(iterator) for _ in range(taken)]
        state, generator = loader.state_dict(), random.getstate()
        resumed = quiet(Stream(40), **options)
        resumed.load_state_dict(state)
        random.setstate(generator)  # as a checkpoint does
        assert rows(first) + rows(resumed) == expected


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_whose_last_batch_was_taken_is_at_its_end(quiet, workers):
    """torchdata asks restored workers for one batch more; a dataset that is at its start again would begin anew."""
    loader = quiet(Stream(10), num_workers=workers)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(4 if workers == 2 else 3)]
    assert len(ids(first)) == 10
    resumed = quiet(Stream(10), num_workers=workers)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_streams_hear_of_epochs(quiet, workers, persistent):
    loader = quiet(Stream(6), num_workers=workers, persistent_workers=persistent)
    for epoch in (0, 1, 4):
        loader.set_epoch(epoch)
        assert sorted(ids(loader)) == [epoch * 1000 + index for index in range(6)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_without_state_cannot_be_resumed_in_the_middle(quiet, workers):
    loader = quiet(Stateless(20), num_workers=workers)
    next(iter(loader))
    state = loader.state_dict()
    resumed = quiet(Stateless(20), num_workers=workers)
    with pytest.raises(ResumeError, match="'train' has no state_dict and load_state_dict"):
        resumed.load_state_dict(state)
        next(iter(resumed))


def test_streams_do_not_resume_with_other_workers_or_ranks(quiet):
    loader = quiet(Stream(20), num_workers=2, ranks=2, shard="none")
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(ResumeError, match="taken with 2 workers and fits no other number; there are 1 now"):
        quiet(Stream(20), num_workers=1, ranks=2, shard="none").load_state_dict(state)
    with pytest.raises(ResumeError, match="taken with 2 ranks"):
        quiet(Stream(20), num_workers=2, ranks=1).load_state_dict(state)


def test_what_is_neither_indexed_nor_iterated_is_refused():
    with pytest.raises(ConfigError, match="'train' \\(object\\) can be neither indexed nor iterated"):
        make(object())


# -- workers and signals


def test_workers_ignore_signals_while_their_parent_lives(quiet):
    loader = quiet(Noisy(40), num_workers=2, prefetch_factor=1)
    iterator = iter(loader)
    first = next(iterator)
    for worker, number in itertools.product(iterator._workers, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        os.kill(worker.pid, number)
    assert ids([first, *iterator]) == loader.batch_sampler.order().tolist()


DEADLY = """
import os, subprocess, sys
from danling.backends.torch.data import build_dataloader
from danling.backends.torch.sampler import build_sampler
from danling.backends.torch.workers import stop_workers
from torch.utils.data import default_collate

class Deadly(list):
    def __getitem__(self, index):
        os._exit(3)  # before anything of this worker is on its way

data = Deadly(range(8))
options = {"batch_size": 1, "num_workers": 1}
sampler = build_sampler(data, "train", seed=0, shuffle=False, drop_last=False, batch_size=1)
loader = build_dataloader(data, "train", options, sampler, default_collate, seed=0)
try:
    for batch in loader:
        print(batch.tolist(), flush=True)
except RuntimeError as error:
    assert "exited unexpectedly" in str(error), error
    stop_workers(loader)
    subprocess.run([sys.executable, "-c", ""])  # torch looks at its workers whenever a child ends
    print("caught")
"""


def test_a_worker_that_dies_is_one_error_and_nothing_after_it():
    """In a process of its own: torch raises at whatever line the main thread is when a worker dies."""
    done = subprocess.run([sys.executable, "-c", DEADLY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("caught\n"), done.stderr


@pytest.mark.parametrize("persistent", [False, True])
def test_stopping_workers_ends_also_those_that_are_stuck(persistent):
    loader = make(Stuck(8), num_workers=2, batch_size=1, shuffle=False, persistent_workers=persistent)
    iterator = iter(loader)
    assert next(iterator).tolist() == [0]
    workers = list(iterator._workers)
    start = time.monotonic()
    stop_workers(loader)
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - start < 30
    stop_workers(loader)
    stop_workers([1, 2])


class _Witness:
    """Notes which process collects it."""

    def __init__(self, path):
        self.path, self.itself = path, self  # a cycle: only the collector frees it

    def __del__(self):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")


class _Collecting(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        gc.collect()
        return torch.tensor(float(index))


def test_garbage_of_the_parent_is_not_collected_in_workers(tmp_path):
    gc.collect()
    gc.disable()
    try:
        _Witness(tmp_path / "collected")
        sampler = build_sampler(
            _Collecting(),
            "train",
            seed=0,
            shuffle=False,
            drop_last=False,
            batch_size=1,
            data_rank=0,
            data_ranks=1,
            train=True,
        )
        options = {"num_workers": 1, "batch_size": 1}
        loader = build_dataloader(_Collecting(), "train", options, sampler, default_collate, seed=0)
        assert len(list(loader)) == 2
        assert not (tmp_path / "collected").exists() and not gc.get_freeze_count()
        gc.collect()
        assert (tmp_path / "collected").read_text() == f"{os.getpid()}\n"
    finally:
        gc.enable()


LEFT_OVER = """
import torch
from danling.backends.torch.data import build_dataloader
from danling.backends.torch.sampler import build_sampler
from torch.utils.data import default_collate

data = list(torch.arange(8.0))
sampler = build_sampler(data, "train", seed=0, shuffle=False, drop_last=False, batch_size=1)
loader = build_dataloader(data, "train", {"batch_size": 1, "num_workers": 1}, sampler, default_collate, seed=0)
iterator = iter(loader)
print(next(iterator).item())
"""


def test_a_script_that_leaves_workers_behind_ends():
    done = subprocess.run([sys.executable, "-c", LEFT_OVER], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr


def test_a_loader_of_ones_own_without_a_state_is_warned_about_once(tmp_path, capsys):
    class Positioned(list):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise NotImplementedError

    class Own(Tiny):
        def __init__(self, config):
            super().__init__(config)
            batches = torch.utils.data.DataLoader(self.datasets.pop("train"), batch_size=5)
            self.dataloaders.train = Positioned(batches) if self.config.tiny.state else batches

    for state, load_only, lines in ((False, False, 1), (True, False, 0), (False, True, 0)):
        config = tiny_config(tmp_path, epochs=2, tiny__state=state, checkpoint__load_only=load_only)
        with Own(config) as runner:
            runner.train()
        told = [line for line in capsys.readouterr().err.splitlines() if "has no state_dict" in line]
        assert len(told) == lines and all("'train'" in line for line in told)
