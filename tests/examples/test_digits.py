"""The digits example at the command line: what a newcomer types, mistakes included. Its training is tested with the runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.workspace import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "digits.py"


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--workspace_root", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=280)


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_it_runs_and_goes_on(tmp_path) -> None:
    first = run(tmp_path, "--epochs", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "epoch 1/1" in first.stdout and "finished" in first.stdout and str(tmp_path) in first.stdout
    more = run(tmp_path, "--epochs", "2", "--auto_resume", "true")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "epoch 2/2" in more.stdout and "epoch 1/2" not in more.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--epohcs", "3", "--dataloader.batch_size", "many"], ("epohcs", "epochs", "dataloader.batch_size", "many")),
        (["--stack", "tourch"], ("tourch", "torch")),
        (["--optim.type", "adamm"], ("adamm", "adam")),
        (["--resume", "nowhere"], ("nowhere",)),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(tmp_path, args, words) -> None:
    failed = run(tmp_path, *args)
    assert failed.returncode != 0
    for word in words:
        assert word in failed.stderr, failed.stderr
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_help_lists_the_options(tmp_path) -> None:
    shown = run(tmp_path, "--help")
    assert shown.returncode == 0
    for option in ("--width", "--optim.lr", "--checkpoint.interval", "--auto_resume"):
        assert option in shown.stdout
