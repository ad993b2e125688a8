"""The example of ragged texts: it trains, and packed batches train as padded and masked ones do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.workspace import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "docstrings.py"


def train(folder, *args: str) -> dict:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--workspace_root", str(folder), "--epochs", "1", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens_per_second" in done.stdout
    (file,) = folder.rglob("results.json")
    return json.loads(file.read_text())["results"]["1"]


def test_it_trains(tmp_path) -> None:
    row = train(tmp_path, "--width", "32", "--dataloader.batch_size", "8")
    assert row["val"]["acc"] > 0.25  # 0.17 for the commonest package
    assert row["val"]["loss"] < 2.0  # 2.08 without looking


@pytest.mark.slow
def test_padding_and_masks_give_the_same_training(tmp_path) -> None:
    rows = []
    for padded in ("false", "true"):
        (tmp_path / padded).mkdir()
        rows.append(train(tmp_path / padded, "--width", "32", "--padded", padded))
    for split in ("train", "val"):
        assert rows[0][split]["loss"] == pytest.approx(rows[1][split]["loss"], rel=1e-4)
