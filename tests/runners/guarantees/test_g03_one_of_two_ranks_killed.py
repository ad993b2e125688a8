"""Guarantees 2 and 3 on two ranks: whichever is killed, whenever, the run that goes on is the run never killed."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from danling.runners.locate import newest_checkpoint
from danling.runners.pointers import read_pointer
from support.ranks import run_ranks
from support.tiny import tiny_config

SCRIPT = """
import json, os, signal, sys, threading
sys.path.insert(0, {tests!r})
from support.tiny import Tiny, final_state

rank = int(os.environ["RANK"])
victim, after = os.environ.get("VICTIM"), float(os.environ.get("AFTER", "0"))
with Tiny(json.loads(sys.argv[1])) as runner:
    if victim == str(rank):
        die = lambda *args: threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        runner.on("start", die)
        runner.on("resume", die)
    runner.train()
    print("STATE", json.dumps(final_state(runner)))
"""


def run(tests: Path, config: dict[str, Any], **env: str) -> list[Any]:
    script = SCRIPT.format(tests=str(tests))
    return run_ranks(script, 2, [json.dumps(config)], timeout=150, env=env, check=not env)


def states(results: list[Any]) -> list[Any]:
    return [json.loads(result.output.rsplit("STATE ", 1)[1].splitlines()[0]) for result in results]


def kill_at_random(request: pytest.FixtureRequest, root: Path, kills: int, **overrides: Any) -> None:
    tests = request.config.rootpath / "tests"
    options = {"accum_steps": 2, "ema__enabled": True, "tiny__augment": True, "tiny__norm": True}
    options |= {"checkpoint__interval": "2 steps", "checkpoint__keep_latest_k": 1}
    options |= {"comm__train_timeout_seconds": 60, "log_interval": 1, **overrides}
    expected = states(run(tests, tiny_config(root / "straight", **options)))
    config = tiny_config(root / "killed", auto_resume=True, **options)
    rng = random.Random(f"{kills} {overrides}")
    died = 0
    for number in range(kills):
        victim = rng.randrange(2)
        results = run(tests, config, VICTIM=str(victim), AFTER=f"{rng.uniform(0.0, 0.8):.3f}")
        died += results[victim].returncode == -signal.SIGKILL
        checkpoints = next((root / "killed").glob("*/*/*/checkpoints"), None)
        if checkpoints is not None and read_pointer(checkpoints, "latest") is not None:
            assert newest_checkpoint(checkpoints) is not None, f"nothing loads after kill {number}"
    assert died >= kills / 2
    assert states(run(tests, config)) == expected


@pytest.mark.slow
def test_killed_twice(request, tmp_path):
    kill_at_random(request, tmp_path, 2, epochs=12)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("enabled", [True, False], ids=["async", "sync"])
def test_killed_at_twenty_random_instants(request, tmp_path, enabled):
    kill_at_random(request, tmp_path, 20, epochs=120, checkpoint__async_enabled=enabled)
