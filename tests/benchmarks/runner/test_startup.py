"""How long a command or an import keeps one waiting, beside a bare interpreter started in turn with it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench

DANLING = str(Path(sys.executable).with_name("danling"))
CASES = {
    "import danling": ([sys.executable, "-c", "import danling"], 0.030),
    "import danling.runners": ([sys.executable, "-c", "import danling.runners"], 0.3),
    "danling --help": ([DANLING, "--help"], 0.3),
    "danling stacks": ([DANLING, "stacks"], 0.3),
    "danling runs": ([DANLING, "runs", "."], 0.3),
}
ROUNDS = 15


def seconds(command, cwd):
    begin = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def test_startup(tmp_path):
    bare = [sys.executable, "-c", "pass"]
    over = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, (command, _) in CASES.items():
            over[name].append(seconds(command, tmp_path) - seconds(bare, tmp_path))
    print(f"\n{'over a bare interpreter':<28}{'median':>9}{'limit':>9}")
    for name, (_, limit) in CASES.items():
        print(f"{name:<28}{statistics.median(over[name]) * 1e3:>6.0f} ms{limit * 1e3:>6.0f} ms")
    slow = {
        name: statistics.median(times) for name, times in over.items() if statistics.median(times) > 2 * CASES[name][1]
    }
    assert not slow, f"more than twice the limit: {slow}"
