"""CPU time of commands and imports beside a bare interpreter started in turn with them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
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
    "danling show": ([DANLING, "show", "run"], 0.3),
}
ROUNDS = 15


def seconds(command, cwd):
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def make_run(directory):
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "runner.yaml").write_text("config_id: 0123456789ab\nname: run\nepochs: 40\noptim:\n  lr: 0.001\n")
    results = {str(epoch): {"val": {"loss": 1 / epoch, "acc": 0.9}} for epoch in range(1, 41)}
    score = {"split": "val", "name": "loss", "mode": "min"}
    content = {"name": "run", "unit": "epoch", "score": score, "best_index": 40, "results": results}
    (directory / "results.json").write_text(json.dumps(content))


def test_startup(tmp_path):
    make_run(tmp_path / "run")
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
