"""Every stack passes the conformance suite, started as its users start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SUITE = "danling.backends.torch.conformance"


def conform(folder, stack, nproc, *options, module=""):
    """Run the suite in a process of its own, in a folder without settings; return how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "--pyargs", SUITE + module]
    done = subprocess.run(
        [*command, "--stack", stack, "--nproc", str(nproc), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1])}
    return counts.get("passed", 0), counts.get("skipped", 0)


def test_torch_on_two_ranks(tmp_path):
    passed, skipped = conform(tmp_path, "torch", 2)
    assert passed >= 33 and not skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "nproc", "options"),
    [
        ("torch", 1, ()),
        ("torch", 3, ()),
        ("accelerate", 2, ()),
        pytest.param("accelerate", 2, ("--set", "accelerate={fsdp_plugin: {}}"), marks=pytest.mark.faults),
        ("parallel", 2, ("--set", "parallel.axes.shard=2")),
        pytest.param("parallel", 2, ("--set", "parallel.axes.replicate=2"), marks=pytest.mark.faults),
        ("deepspeed", 2, ("--set", "deepspeed={zero_optimization: {stage: 1}}")),
        pytest.param(
            "deepspeed",
            2,
            ("--set", "deepspeed={zero_optimization: {stage: 3}}", "--set", "ema.enabled=false"),
            marks=pytest.mark.faults,
        ),
    ],
    ids=lambda value: "-".join(value).replace("--set-", "") if isinstance(value, tuple) else str(value),
)
def test_other_stacks(tmp_path, stack, nproc, options):
    passed, skipped = conform(tmp_path, stack, nproc, *options)
    bitwise = stack != "deepspeed" and nproc <= 2  # others add numbers in an order of their own
    assert passed + skipped >= 33 and skipped == (not bitwise)


UNCLAIMED = """
from danling.backends.torch import TorchRunner
class Modest(TorchRunner):
    stack = "modest"
    guarantees = frozenset({8, 11})
"""


@pytest.mark.slow
def test_what_is_not_claimed_is_skipped_by_number(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "modest-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[danling.runners]\nmodest = modest_engine:Modest\n")
    (site / "modest_engine.py").write_text(UNCLAIMED)
    monkeypatch.setenv("PYTHONPATH", str(site))
    passed, skipped = conform(tmp_path, "modest", 2, "-rs")
    assert passed == 3 and skipped >= 30


def test_the_plugin_is_asleep_in_other_runs(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import sys\ndef test(): assert not {'torch', 'danling.backends'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--stack", "torch"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode != 0 and b"unrecognized arguments: --stack" in done.stderr
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout
