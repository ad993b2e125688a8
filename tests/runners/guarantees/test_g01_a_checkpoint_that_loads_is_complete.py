"""Guarantee 1: whatever damage a checkpoint has taken, it is named, and an automatic resume goes on from the one before."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from danling.runners import CheckpointError
from support.tiny import Tiny, final_state, tiny_config

FILES = ["model.pt", "ema.pt", "optimizer.pt", "ranks/rank-00000.pt", "runner.json", "runner.yaml", "manifest.json"]
OPTIONS = {"ema__enabled": True, "scheduler__type": "cosine", "score_name": "loss"}


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 3] ^= 0x04
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("trained")
    with Tiny(tiny_config(root, **OPTIONS)) as runner:
        runner.train()
        return root, runner.dir.relative_to(root), final_state(runner)


@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_passed_over(trained, tmp_path, caplog, name, how):
    root, directory, expected = trained
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    checkpoints = tmp_path / "copy" / directory / "checkpoints"
    newest = checkpoints / "epoch-3"
    assert (newest / name).exists()
    damage(newest / name, how)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        Tiny(tiny_config(tmp_path / "other", resume=str(newest), **OPTIONS))
    assert "epoch-3" in str(caught.value)
    assert not list((tmp_path / "other").rglob("checkpoints"))  # nothing half done was left
    config = tiny_config(tmp_path / "copy", auto_resume=True, **OPTIONS)
    logger = logging.getLogger(f"danling.run.{directory.name.split('-')[-1]}")
    logger.addHandler(caplog.handler)
    try:
        with Tiny(config) as runner:
            assert runner.epoch == 2
            assert "passed over checkpoint" in caplog.text and "epoch-3" in caplog.text and name in caplog.text
            runner.train()
            assert final_state(runner) == expected
    finally:
        logger.removeHandler(caplog.handler)
