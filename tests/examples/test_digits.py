"""The digits example, run as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.workspace import ROOT

GOLDEN = [1.9240, 1.5884]
"""Loss of the first epoch on train and val."""

EXAMPLE = ROOT / "docs" / "examples" / "digits.py"


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--workspace_root", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=280)


def results(folder: Path) -> dict:
    (path,) = folder.glob("lin/digits/*/results.json")
    return json.loads(path.read_text())["results"]


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_first_epochs_give_the_losses_they_always_gave(tmp_path) -> None:
    """Golden losses: who changes them has changed what is computed, and should know."""
    first = run(tmp_path, "--epochs", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "epoch 1/1" in first.stdout and "finished" in first.stdout and str(tmp_path) in first.stdout
    more = run(tmp_path, "--epochs", "2", "--auto_resume", "true")
    assert more.returncode == 0, more.stdout + more.stderr
    table = results(tmp_path)
    assert list(table) == ["1", "2"]
    losses = [table["1"]["train"]["loss"], table["1"]["val"]["loss"]]
    assert losses == pytest.approx(GOLDEN, rel=2e-2), losses
    assert table["2"]["val"]["loss"] < table["1"]["val"]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_reads_97_percent_of_the_digits(tmp_path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path)["10"]["test"]["acc"] >= 0.97


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--epohcs", "3"], ("epohcs", "epochs")),
        (["--dataloader.batch_size", "many"], ("dataloader.batch_size", "many")),
        (["--steps", "3"], ("steps", "epochs")),
        (["--stack", "tourch"], ("tourch", "torch")),
        (["--optim.type", "adamm"], ("adamm", "adam")),
        (["--resume", "nowhere"], ("nowhere",)),
        (["--pretrained", "nowhere.pt"], ("nowhere.pt",)),
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
