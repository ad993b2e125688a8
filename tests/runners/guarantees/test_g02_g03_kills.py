"""Killed anywhere and started again: there is always a checkpoint to load, and the end is that of a run never killed."""

import json
import os
import random
import time

import pytest

from danling.runners import CheckpointStore
from danling.runners.crash import POINTS, VARIABLE, arm
from support.forked import run_forked
from support.tiny import Tiny, final_state, tiny_config

FAST = {
    "epochs": 3,
    "tiny__count": 24,
    "tiny__val": 9,
    "checkpoint__interval": "2 steps",
    "checkpoint__keep_latest_k": 1,
}
CRASHES = [point for point in POINTS if point != "loader.start"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork beside threads


def train(config, result=None, crash=None):
    if crash:
        arm(crash)
    with Tiny(config) as runner:
        runner.train()
        if result is not None:
            result.write_text(json.dumps(final_state(runner), sort_keys=True))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Final states of runs that nobody disturbed, by whether saves are asynchronous."""
    states = {}
    for asynchronous in (True, False):
        folder = tmp_path_factory.mktemp("straight")
        config = tiny_config(folder, auto_resume=True, checkpoint__async_enabled=asynchronous, **FAST)
        train(config, folder / "result.json")  # in this process, so that its children find everything imported
        states[asynchronous] = (folder / "result.json").read_text()
    return states


def newest(config, root):
    (directory,) = (path for path in (root / "lin" / "exp").iterdir() if path.is_dir())
    return CheckpointStore(directory / "checkpoints", load_only=True).newest()


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["async", "sync"])
@pytest.mark.parametrize("point", CRASHES)
def test_crash_points(tmp_path, straight, point, asynchronous):
    config = tiny_config(tmp_path, auto_resume=True, checkpoint__async_enabled=asynchronous, **FAST)
    count = 2 if point not in ("close",) else 1
    assert run_forked(lambda: train(config, crash=f"{point}:{count}")) == 137
    if point.startswith(("alias", "retain")):
        assert newest(config, tmp_path) is not None
    result = tmp_path / "result.json"
    assert run_forked(lambda: train(config, result)) == 0
    assert result.read_text() == straight[asynchronous]


@pytest.mark.faults
@pytest.mark.parametrize("repetitions", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_at_random_instants(tmp_path, straight, repetitions):
    config = tiny_config(tmp_path, auto_resume=True, **FAST)
    instants = random.Random(repetitions)
    result = tmp_path / "result.json"
    started = time.monotonic()
    assert run_forked(lambda: train({**config, "workspace_root": str(tmp_path / "clock")}, None)) == 0
    whole = time.monotonic() - started
    kills = 0
    committed = False
    while kills < repetitions:
        code = run_forked(lambda: train(config, result), kill_after=instants.uniform(0, whole))
        kills += code == -9
        if committed:
            assert newest(config, tmp_path) is not None
        committed = committed or ((tmp_path / "lin").exists() and newest(config, tmp_path) is not None)
        if code == 0:  # it came to its end: begin again elsewhere
            assert result.read_text() == straight[True]
            config["workspace_root"] = str(tmp_path := tmp_path / "again")
            committed = False
    result.unlink(missing_ok=True)
    assert run_forked(lambda: train(config, result)) == 0
    assert result.read_text() == straight[True]


def test_a_mistyped_crash_point_fails_at_once():
    with pytest.raises(ValueError, match="did you mean 'save.rename'"):
        arm("save.renam")
    assert VARIABLE not in os.environ
