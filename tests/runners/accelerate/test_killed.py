"""Killed and started again, a run on Accelerate is the run that was never killed."""

from __future__ import annotations

import random
import signal
import time

import pytest

from support.forge import Forge
from support.tiny import tiny_config

OPTIONS = {
    "stack": "accelerate",
    "auto_resume": True,
    "tiny__augment": True,
    "accum_steps": 2,
    "scheduler__type": "cosine",
    "ema__enabled": True,
    "checkpoint__interval": "2 steps",
    "seed": 3,
}


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    with Forge(tmp_path_factory.mktemp("forge")) as forge:
        yield forge


@pytest.fixture(scope="module")
def straight(forge, tmp_path_factory):
    return forge.run(tiny_config(tmp_path_factory.mktemp("straight"), **OPTIONS)).result


@pytest.mark.parametrize("crash", ["step.end:7", "save.file:9", "save.rename:3", "evaluate.batch:4"])
def test_killed_at_a_crash_point(forge, straight, tmp_path, crash):
    config = tiny_config(tmp_path, **OPTIONS)
    killed = forge.run(config, crash)
    assert killed.code == 137, killed.log
    assert forge.run(config).result["state"] == straight["state"]


def test_killed_at_random_instants(forge, straight, tmp_path):
    chance = random.Random(0)
    config = tiny_config(tmp_path, **OPTIONS)
    began = time.monotonic()
    assert forge.run(tiny_config(tmp_path / "timed", **OPTIONS)).code == 0
    duration = time.monotonic() - began
    killed = 0
    for _ in range(5):
        child = forge.start(config)
        time.sleep(chance.uniform(0.05, 0.5) * duration)
        child.kill(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    assert killed
    assert forge.run(config).result["state"] == straight["state"]
