"""Crash points: what their text may say, and that they really end the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from danling.runners import crash


@pytest.fixture(autouse=True)
def disarm():
    yield
    crash.arm(None)


def run(text: str, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DANLING_CRASH_AT": text, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


COUNT = """
from danling.runners.crash import crash_point
for n in range(1, 6):
    print(n, flush=True)
    crash_point("epoch.end")
    crash_point("step.end")
"""


@pytest.mark.parametrize(("text", "last"), [("step.end", "1"), ("step.end:3", "3"), ("epoch.end@0:2", "2")])
def test_the_process_ends_at_the_nth_passage(text, last):
    done = run(text, COUNT)
    assert done.returncode == 137 and done.stdout.split()[-1] == last


@pytest.mark.parametrize(("text", "rank"), [("step.end@1", "0"), ("step.end:9", "0"), ("save.rename", "0")])
def test_other_ranks_points_and_counts_pass(text, rank):
    done = run(text, COUNT, RANK=rank)
    assert done.returncode == 0 and done.stdout.split()[-1] == "5"


def test_only_the_named_rank_ends():
    assert run("step.end@1", COUNT, RANK="1").returncode == 137


def test_an_unknown_point_is_an_error_at_start():
    done = run("step.ned", "from danling.runners import CheckpointStore; print('started')")
    assert done.returncode == 1 and "started" not in done.stdout
    assert "no crash point 'step.ned'; did you mean 'step.end'?" in done.stderr


@pytest.mark.parametrize("text", ["@1", "step.end@", "step.end:0", "step.end:x", "step.end:1@1"])
def test_a_text_of_another_form(text):
    with pytest.raises(ValueError, match=r"expected <point>\[@rank\]\[:n\]"):
        crash.arm(text)


def test_unset_it_is_one_comparison():
    crash.arm("")
    assert crash._plan is None
    crash.crash_point("step.end")
