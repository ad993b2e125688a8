"""Guarantee 4: every sample is consumed exactly once per epoch across save and resume; evaluation counts each once."""

import json
import random
from collections import Counter

import pytest
from torch.utils.data import IterableDataset

from danling.runners import ResumeError
from support.ranks import run_ranks
from support.tiny import Tiny, tiny_config


class Recorder(Tiny):
    """Writes down (epoch, ids) of every micro-batch that counts, and the ids of each evaluation."""

    def __init__(self, config):
        super().__init__(config)
        self.batches, self.evaluated = [], []
        self.on("evaluate_start", lambda runner, event: runner.evaluated.append([]))

    def train_step(self, data):
        if not self.window.is_filler:
            self.batches.append((self.epoch, data[2].tolist()))
        return super().train_step(data)

    def evaluate_step(self, data):
        if self.evaluated:
            self.evaluated[-1] += data[2].tolist()
        return super().evaluate_step(data)


def by_epoch(batches):
    """The ids of each epoch, in the order of training."""
    epochs = {}
    for epoch, ids in batches:
        epochs.setdefault(epoch, []).extend(ids)
    return [epochs[epoch] for epoch in sorted(epochs)]


def interrupted(root, updates, changes=(), cls=Recorder, **overrides):
    """Train in attempts that are stopped at `updates`, with other options in each; return what was recorded."""
    batches, evaluated = [], []
    for number, update in enumerate((*updates, None)):
        options = {**overrides, **(changes[number] if number < len(changes) else {})}
        with cls(tiny_config(root, auto_resume=True, **options)) as runner:
            if update is not None:
                runner.on("step", _stop_at(update))
            runner.train()
            batches += runner.batches
            evaluated += runner.evaluated
    return batches, evaluated


def _stop_at(update):
    def stop(runner, event):
        if event.global_step == update:
            runner.request_stop("test")

    return stop


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("drop_last", "accum_steps"),
    [(False, 3), (True, 1), pytest.param(False, 1, marks=SLOW), pytest.param(True, 3, marks=SLOW)],
)
def test_other_numbers_of_workers_change_nothing(tmp_path, drop_last, accum_steps):
    overrides = {"dataloader__train__drop_last": drop_last, "accum_steps": accum_steps, "epochs": 2}
    workers = [{"dataloader__num_workers": count} for count in (0, 2, 1)]
    per_epoch = -(-(6 if drop_last else 7) // accum_steps)
    updates = (1, per_epoch + 1)
    expected, evaluations = interrupted(tmp_path / "straight", (), **overrides)
    batches, evaluated = interrupted(tmp_path / "stopped", updates, workers, **overrides)
    assert batches == expected and evaluated == evaluations
    for epoch in by_epoch(batches):
        assert len(epoch) == len(set(epoch)) == (48 if drop_last else 50)
    assert len({tuple(epoch) for epoch in by_epoch(batches)}) == 2
    assert [sorted(ids) for ids in evaluated] == [list(range(21))] * 2


def test_augmentation_in_workers_survives_a_resume(tmp_path):
    overrides = {"tiny__augment": True, "epochs": 1}
    losses = []
    for root, updates, changes in (
        ("a", (), [{"dataloader__num_workers": 2}]),
        ("b", (2, 4), [{"dataloader__num_workers": n} for n in (2, 1, 2)]),
    ):
        found = []
        for number, update in enumerate((*updates, None)):
            with Recorder(tiny_config(tmp_path / root, auto_resume=True, **overrides, **changes[number])) as runner:
                if update is not None:
                    runner.on("step", _stop_at(update))
                runner.train()
                found += runner.losses
        losses.append(found)
    assert losses[0] == losses[1] and len(losses[0]) == 6


@SLOW
def test_persistent_workers_and_deep_prefetch_lose_nothing(tmp_path):
    overrides = {"tiny__augment": True, "epochs": 3, "dataloader__num_workers": 2}
    deep = {"dataloader__persistent_workers": True, "dataloader__prefetch_factor": 4}
    expected, _ = interrupted(tmp_path / "straight", (), **overrides)
    assert interrupted(tmp_path / "deep", (1, 6, 8, 13), [deep] * 5, **overrides)[0] == expected


class Stream(IterableDataset):
    """The points of a dataset one after another, with noise; its position is its state."""

    def __init__(self, points):
        self.points, self.position = points, 0

    def __iter__(self):
        start, self.position = self.position, 0
        for index in range(start, len(self.points)):
            self.position = index + 1
            x, y, number = self.points[index]
            yield x + random.random(), y, number
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Streamed(Recorder):
    def __init__(self, config):
        super().__init__(config)
        self.datasets.train = Stream(self.datasets.train)


class Forgetful(Recorder):
    def __init__(self, config):
        super().__init__(config)
        points = self.datasets.train

        class Items(IterableDataset):
            def __iter__(self):
                return (points[index] for index in range(len(points)))

        self.datasets.train = Items()


@pytest.mark.parametrize(
    ("workers", "accum_steps"), [(0, 3), (1, 1), pytest.param(0, 1, marks=SLOW), pytest.param(1, 3, marks=SLOW)]
)
def test_iterable_data_with_state(tmp_path, workers, accum_steps):
    overrides = {
        "dataloader__num_workers": workers,
        "accum_steps": accum_steps,
        "epochs": 2,
        "dataloader__drop_last": False,
    }
    expected, _ = interrupted(tmp_path / "straight", (), cls=Streamed, **overrides)
    assert by_epoch(expected) == [list(range(50))] * 2
    per_epoch = -(-7 // accum_steps)
    for updates in ((1,), (per_epoch,), (1, per_epoch + 1)):
        batches, _ = interrupted(tmp_path / str(updates), updates, cls=Streamed, **overrides)
        assert batches == expected


def test_iterable_data_without_state_says_so(tmp_path):
    with pytest.raises(ResumeError, match="'train' has no state_dict and load_state_dict"):
        interrupted(tmp_path, (2,), cls=Forgetful, epochs=1)


def test_iterable_data_read_by_other_workers_says_so(tmp_path):
    changes = [{"dataloader__num_workers": 0}, {"dataloader__num_workers": 1}]
    with pytest.raises(ResumeError, match="taken with 0 workers"):
        interrupted(tmp_path, (2,), changes, cls=Streamed, epochs=1)


RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
from runners.guarantees import test_g04_every_sample_once as module
from support.tiny import tiny_config

root, stop, overrides, cls = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
with getattr(module, cls)(tiny_config(root, auto_resume=True, **overrides)) as runner:
    if stop:
        runner.on("step", module._stop_at(stop))
    runner.train()
    out = dict(batches=runner.batches, evaluated=runner.evaluated, seen=runner.train_state.samples)
    open(f"{{root}}/{{stop}}-{{runner.rank}}.json", "w").write(json.dumps(out))
"""


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((3, 1, 2), marks=SLOW)], ids=str)
@pytest.mark.parametrize("drop_last", [False, pytest.param(True, marks=SLOW)])
def test_another_world_size_takes_over_in_the_middle_of_an_epoch(tmp_path, request, sizes, drop_last):
    """51 samples in batches of 4 per rank, stopped and continued by other numbers of processes."""
    overrides = {"tiny__count": 51, "epochs": 2, "dataloader__train__drop_last": drop_last, "dataloader__batch_size": 4}
    script = RANKS.format(tests=str(request.config.rootpath / "tests"))
    stops = [*range(2, 2 * len(sizes), 2), 0]
    batches, evaluations = [], []
    for ranks, stop in zip(sizes, stops, strict=True):
        run_ranks(script, ranks, [str(tmp_path), str(stop), json.dumps(overrides), "Recorder"])
        outputs = [json.loads((tmp_path / f"{stop}-{rank}.json").read_text()) for rank in range(ranks)]
        batches += [tuple(batch) for output in outputs for batch in output["batches"]]
        evaluations += [
            sorted(index for output in outputs for index in output["evaluated"][number])
            for number in range(len(outputs[0]["evaluated"]))
        ]
    epochs = by_epoch(batches)
    assert len(epochs) == 2
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
        assert len(epoch) == 51 if not drop_last else 51 - len(epoch) < 4 * max(sizes)
    assert evaluations == [list(range(21))] * len(evaluations) and len(evaluations) == 2


@SLOW
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW)])
def test_a_stream_divided_over_ranks_by_stride(tmp_path, request, workers):
    """51 items over two ranks, 26 and 25, stopped in the middle of each epoch."""
    overrides = {
        "tiny__count": 51, "epochs": 2, "dataloader__drop_last": False, "dataloader__batch_size": 4,
        "dataloader__shard": "stride", "dataloader__num_workers": workers,
    }  # fmt: skip
    script = RANKS.format(tests=str(request.config.rootpath / "tests"))
    batches = []
    for stop in (3, 9, 0):
        run_ranks(script, 2, [str(tmp_path), str(stop), json.dumps(overrides), "Streamed"])
        for rank in range(2):
            batches += json.loads((tmp_path / f"{stop}-{rank}.json").read_text())["batches"]
    assert [sorted(epoch) for epoch in by_epoch(batches)] == [list(range(51))] * 2
