"""Guarantee 10, saves: on a full disk training goes on, what failed is counted, and a final save that fails fails the run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from danling.runners import CheckpointError
from danling.runners.atomic import read_json
from support.tiny import Tiny, tiny_config

ROOM = 24 * 1024  # enough for the small files of a run, too little for a checkpoint


@pytest.fixture
def disk(tmp_path):
    """A file system of two megabytes."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=True)


def fill(disk: Path) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * (free - ROOM))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_periodic_save_that_fails_is_counted_and_the_next_one_tries_again(disk, asynchronous):
    told = []
    with Tiny(tiny_config(disk, epochs=4, checkpoint__async_enabled=asynchronous)) as runner:
        runner.on("save_error", lambda runner, event: told.append(str(event.payload["error"])))

        @runner.on("epoch_start")
        def disk_fills_and_empties(runner, event):
            if event.epoch in (1, 2):  # the first save is done
                runner.checkpoint_manager.drain()
            if event.epoch == 1:
                fill(disk)
            elif event.epoch == 2:
                (disk / "filler").unlink()

        runner.train()
        directory = runner.dir
    summary = read_json(directory / "summary.json")
    health = summary["checkpoint_health"]
    assert summary["status"] == "finished" and runner.global_step == 24
    assert health["failures"] == 1 and health["saves"] == 3, health
    assert "No space left on device" in health["first_error"] == health["last_error"]
    assert len(told) == 1 and "epoch-2 could not be saved" in told[0]
    names = {path.name for path in (directory / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()}
    assert names == {"epoch-1", "epoch-3", "epoch-4"}
    assert runner.checkpoint_manager.verify(directory / "checkpoints" / "epoch-4") == []


def test_a_final_save_that_fails_fails_the_run(disk):
    with pytest.raises(CheckpointError, match="epoch-2 could not be saved.*No space left on device"):
        with Tiny(tiny_config(disk, epochs=2)) as runner:

            @runner.on("epoch_start")
            def disk_fills(runner, event):
                if event.epoch == 1:
                    runner.checkpoint_manager.drain()
                    fill(disk)

            runner.train()
    summary = read_json(runner.dir / "summary.json")
    assert summary["status"] == "failed" and summary["exit_code"] == 1
    assert summary["error"]["type"] == "CheckpointError" and "No space left" in summary["error"]["message"]
    assert summary["checkpoint_health"]["failures"] == 1
    assert runner.checkpoint_manager.newest().name == "epoch-1"
    (disk / "filler").unlink()
    with Tiny(tiny_config(disk, epochs=2, auto_resume=True)) as again:
        again.train()
    assert again.epoch == 2 and read_json(again.dir / "summary.json")["status"] == "finished"


def test_a_save_by_hand_that_fails_raises(disk):
    with Tiny(tiny_config(disk, epochs=2)) as runner:
        runner.train()
        fill(disk)
        with pytest.raises(CheckpointError, match="No space left"):
            runner.save_checkpoint("mine", force=True)
        (disk / "filler").unlink()
        runner.save_checkpoint("mine", force=True)
        assert runner.checkpoint_manager.resolve("mine").name == "epoch-2.1"
