"""Guarantees 2 and 3: killed at any instant the newest checkpoint loads, and the run that goes on is the run never killed."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from danling.runners import CheckpointError, read_metrics
from danling.runners.atomic import read_json
from danling.runners.crash import POINTS
from danling.runners.locate import newest_checkpoint, resolve
from danling.runners.manifest import require_whole
from danling.runners.pointers import read_pointer
from support.forge import Forge
from support.tiny import tiny_config

# Everything that could go wrong on a resume: random augmentation, dropout, windows, a schedule, an average, patience.
OPTIONS = {
    "tiny__augment": True,
    "accum_steps": 2,
    "scheduler__type": "cosine",
    "ema__enabled": True,
    "ema__decay": 0.9,
    "checkpoint__interval": "2 steps",
    "checkpoint__keep_latest_k": 1,
    "log_interval": 1,
}
# Which passage of a point is somewhere in the middle of three epochs of four updates.
PASSAGES = {
    "save.begin": 3,
    "save.staged": 3,
    "save.file": 15,
    "save.file_fsync": 15,
    "save.barrier": 3,
    "save.manifest_tmp": 3,
    "save.manifest": 3,
    "save.rename": 3,
    "save.parent_fsync": 3,
    "alias.latest": 3,
    "alias.best": 2,
    "retain.trash": 2,
    "retain.remove": 2,
    "results.write": 2,
    "metrics.append": 9,
    "step.end": 7,
    "epoch.end": 2,
    "evaluate.batch": 4,
    "evaluate.end": 2,
    "loader.start": 1,
    "close": 1,
}


def config(root: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_config(root, **{**OPTIONS, "auto_resume": True, **overrides})


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


class Straight(dict):
    """Results of uninterrupted runs, by what they are configured with."""

    def __init__(self, forge: Forge, root: Path) -> None:
        self.forge, self.root = forge, root

    def __missing__(self, key: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        self[key] = self.forge.run(config(self.root / f"{len(self)}", **dict(key))).result
        return self[key]


@pytest.fixture(scope="module")
def straight(forge, tmp_path_factory):
    return Straight(forge, tmp_path_factory.mktemp("straight"))


class Reader(threading.Thread):
    """Loads `latest` all the time: once there is one, there is always one that is whole."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.done = threading.Event()
        self.reads = 0
        self.fault: str | None = None

    def run(self) -> None:
        while not self.done.is_set() and self.fault is None:
            time.sleep(0.002)
            directory = next(self.root.glob("*/*/*/checkpoints"), None)
            name = read_pointer(directory, "latest") if directory is not None else None
            if directory is None or name is None:
                if self.reads:
                    self.fault = "latest is gone"
                continue
            try:
                require_whole(resolve("latest", directory))
                self.reads += 1
            except (CheckpointError, OSError) as error:
                if read_pointer(directory, "latest") == name:
                    self.fault = f"{type(error).__name__}: {error}"

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.join()
        assert self.fault is None, self.fault


def series(directory: str | Path) -> list[dict[str, Any]]:
    """What the metrics of a run amount to, without clocks and speeds."""
    kept = ("event", "global_step", "epoch", "split", "loss", "lr")
    lines = [
        {key: line[key] for key in kept if key in line} for line in read_metrics(Path(directory) / "metrics.jsonl")
    ]
    return [line for line in lines if line.get("event") not in ("start", "resume")]


def assert_same_run(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["state"] == expected["state"]
    rows = [read_json(Path(run["dir"]) / "results.json") for run in (result, expected)]
    assert rows[0]["results"] == rows[1]["results"] and rows[0]["best_index"] == rows[1]["best_index"]
    assert series(result["dir"]) == series(expected["dir"])


def kill_at(forge, straight, root: Path, point: str, **overrides: Any) -> None:
    settings = config(root, **overrides)
    with Reader(root):
        killed = forge.run(settings, crash=f"{point}:{PASSAGES[point]}")
        assert killed.code == 137, (killed.code, killed.log)
        checkpoints = next(root.glob("*/*/*/checkpoints"), None)
        if checkpoints is not None and read_pointer(checkpoints, "latest") is not None:
            assert newest_checkpoint(checkpoints) is not None
        resumed = forge.run(settings)
        assert_same_run(resumed.result, straight[tuple(overrides.items())])


def test_every_point_has_a_passage():
    assert set(PASSAGES) == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(forge, straight, tmp_path, point):
    kill_at(forge, straight, tmp_path, point)


VARIANTS = {
    "sync": {"checkpoint__async_enabled": False},
    "steps": {"steps": 12, "eval_interval": 3, "checkpoint__interval": 2},
    "one by one": {"accum_steps": 1, "checkpoint__interval": "3 steps"},
}


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_in_other_runs(forge, straight, tmp_path, point, variant):
    kill_at(forge, straight, tmp_path, point, **VARIANTS[variant])


def kill_at_random(forge, straight, root: Path, kills: int, **overrides: Any) -> None:
    rng = random.Random(f"{kills} {overrides}")
    settings = config(root, **overrides)
    expected = straight[tuple(overrides.items())]
    lives = []
    with Reader(root) as reader:
        for _ in range(kills):
            child = forge.start(settings)
            time.sleep(rng.uniform(0.02, 0.5))
            child.kill(signal.SIGKILL)
            lives.append(child.wait())
            checkpoints = next(root.glob("*/*/*/checkpoints"), None)
            if checkpoints is not None and read_pointer(checkpoints, "latest") is not None:
                assert newest_checkpoint(checkpoints) is not None
        assert_same_run(forge.run(settings).result, expected)
    assert lives.count(-signal.SIGKILL) >= kills / 2, lives
    assert reader.reads


def test_killed_at_random_instants(forge, straight, tmp_path):
    kill_at_random(forge, straight, tmp_path, 6, epochs=10)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_fifty_random_instants(forge, straight, tmp_path, workers):
    kill_at_random(forge, straight, tmp_path, 50, epochs=60, dataloader__num_workers=workers)
