"""The checkpoint store in one process: what it writes, what it refuses, what it reports."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from danling.runners import CheckpointError, CheckpointNotFoundError, CheckpointStore
from danling.runners.locate import newest_checkpoint, resolve
from danling.runners.manifest import MANIFEST, read_manifest, require_whole, verify


class Files:
    """A snapshot of a few files; `gate` holds the writer up, `error` makes it fail."""

    def __init__(self, content: dict[str, bytes] | None = None, *, gate=None, error=None, claim: bool = True) -> None:
        self.content = content or {"model.bin": b"weights", "ranks/rank-00000.bin": b"state"}
        self.gate, self.error, self.claim = gate, error, claim

    def write(self, directory: Path):
        if self.gate is not None:
            assert self.gate.wait(30)
        for name, data in self.content.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        if self.error is not None:
            raise self.error
        return list(self.content) if self.claim else None


def at(step: int, *, epoch: int = 0, kind: str = "full", phase: str = "train", **facts):
    return {"kind": kind, "global_step": step, "micro_step": step, "epoch": epoch, "phase": phase, **facts}


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def store(request, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=request.param)
    yield store
    store.close()


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def save(store: CheckpointStore, step: int, aliases=("latest",), **options) -> None:
    store.save(f"step-{step}", Files({"model.bin": str(step).encode()}), at(step), aliases, **options)
    assert store.drain()


def test_a_save_is_a_directory_with_a_manifest_and_aliases(store):
    store.save("epoch-1", Files(), at(10, epoch=1, score=0.5, config_id="c", stack="torch"), ("latest", "best"))
    assert store.drain()
    assert names(store) == ["best", "best.pointer", "epoch-1", "latest", "latest.pointer"]
    assert (store.directory / "latest.pointer").read_text() == "epoch-1\n"
    assert os.readlink(store.directory / "best") == "epoch-1"
    manifest = json.loads((store.directory / "epoch-1" / MANIFEST).read_text())
    assert manifest["format_version"] == 1 and manifest["kind"] == "full" and manifest["name"] == "epoch-1"
    assert manifest["global_step"] == 10 and manifest["epoch"] == 1 and manifest["score"] == 0.5
    assert manifest["config_id"] == "c" and manifest["stack"] == "torch" and manifest["danling_version"]
    assert abs(manifest["wall_time"] - time.time()) < 60
    assert manifest["files"]["model.bin"] == {
        "size": 7,
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert set(manifest["files"]) == {"model.bin", "ranks/rank-00000.bin"}
    assert store.health["saves"] == 1 and store.health["failures"] == 0
    assert store.last_committed == store.directory / "epoch-1" and store.exists("epoch-1")


def test_files_that_a_snapshot_does_not_name_are_found(store):
    store.save("step-1", Files(claim=False), at(1))
    assert store.drain()
    assert set(read_manifest(store.directory / "step-1")["files"]) == {"model.bin", "ranks/rank-00000.bin"}


def test_the_same_boundary_only_moves_aliases(store):
    save(store, 1)
    inode = (store.directory / "step-1").stat().st_ino
    save(store, 2)
    store.save("step-1", Files({"model.bin": b"other"}), at(1), ("latest", "best"))
    assert store.drain()
    assert (store.directory / "step-1").stat().st_ino == inode
    assert (store.directory / "step-1" / "model.bin").read_bytes() == b"1"
    assert (store.directory / "best.pointer").read_text() == "step-1\n"
    # The end of training is no other state than the boundary it ends at; an evaluation in progress is.
    store.save("step-2", Files(), at(2, phase="done"), final=True)
    assert [info.name for info in store.list()] == ["step-1", "step-2"]
    store.save("step-2", Files(), at(2, phase="evaluate"), final=True)
    assert [info.name for info in store.list()] == ["step-1", "step-2.1", "step-2"]


def test_a_committed_name_is_never_written_again(store):
    for _ in range(3):
        store.save("step-1", Files(), at(1), force=True)
        assert store.drain()
    store.save("step-1", Files(), at(7))
    assert store.drain()
    assert [info.name for info in store.list()] == ["step-1", "step-1.1", "step-1.2", "step-1.3"]
    assert store.resolve("latest").name == "step-1.3"


def test_a_damaged_checkpoint_is_not_taken_for_a_save(store):
    save(store, 1)
    (store.directory / "step-1" / "model.bin").write_bytes(b"")
    save(store, 1)
    assert store.newest().name == "step-1.1"
    (store.directory / "step-1" / MANIFEST).unlink()
    assert [info.name for info in store.list()] == ["step-1.1"]


def test_kinds_other_than_full_leave_latest_and_automatic_resume_alone(store):
    save(store, 3)
    store.save("final", Files(), at(9, kind="model"))
    store.save("seed", Files(), at(0, kind="seed"), ())
    assert store.drain()
    assert store.resolve("latest").name == "step-3" and store.newest().name == "step-3"
    assert store.newest(("model",)).name == "final" and store.newest(("seed",)).name == "seed"


@pytest.mark.parametrize("alias", ["", "a/b", "..", ".hidden", "epoch-3", "step-3.1", "seed", "final", "x.pointer"])
def test_an_alias_that_cannot_be_one(store, alias):
    with pytest.raises(ValueError, match="alias"):
        store.save("step-1", Files(), at(1), (alias,))
    assert not store.directory.exists()


def test_an_unknown_kind(store):
    with pytest.raises(ValueError, match="full, model, seed"):
        store.save("step-1", Files(), at(1, kind="partial"))


def test_load_only_writes_nothing(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", load_only=True)
    store.repair()
    store.save("step-1", Files(), at(1), final=True)
    assert store.drain() and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ asynchronous


def test_an_asynchronous_save_returns_at_once_and_commits_later(tmp_path):
    gate = threading.Event()
    told: list[Path] = []
    store = CheckpointStore(tmp_path, on_commit=told.append)
    save(store, 1)
    store.save("step-2", Files(gate=gate), at(2))
    assert store.busy and store.resolve("latest").name == "step-1" and not store.drain(0.05)
    store.boundary()
    assert [path.name for path in told] == ["step-1"]
    gate.set()
    assert store.drain() and not store.busy
    assert store.resolve("latest").name == "step-2" and [path.name for path in told] == ["step-1", "step-2"]


def test_one_save_is_in_flight_and_the_wait_is_counted(tmp_path):
    gate = threading.Event()
    store = CheckpointStore(tmp_path)
    store.save("step-1", Files(gate=gate), at(1))
    before = store.health["stall_seconds"]
    threading.Timer(0.3, gate.set).start()
    store.save("step-2", Files(), at(2))
    assert store.health["stall_seconds"] - before > 0.25
    assert read_manifest(tmp_path / "step-1")["global_step"] == 1
    assert store.close() and store.resolve("latest").name == "step-2"


def test_a_snapshot_is_captured_before_save_returns_and_after_the_save_before_it(tmp_path):
    gate = threading.Event()
    live = {"step": 1}
    calls: list[str] = []

    class Live(Files):
        def capture(self):
            calls.append(f"capture {live['step']}")
            self.content = {"model.bin": str(live["step"]).encode()}

        def write(self, directory):
            names = super().write(directory)
            calls.append(f"wrote {self.content['model.bin'].decode()}")
            return names

    store = CheckpointStore(tmp_path)
    store.save("step-1", Live(gate=gate), at(1))
    live["step"] = 2
    gate.set()
    store.save("step-2", Live(gate=gate), at(2))
    live["step"] = 5
    store.close()
    assert calls == ["capture 1", "wrote 1", "capture 2", "wrote 2"]
    assert (tmp_path / "step-1" / "model.bin").read_bytes() == b"1"
    assert (tmp_path / "step-2" / "model.bin").read_bytes() == b"2"


def test_nothing_is_captured_where_only_aliases_move(tmp_path):
    class Loud(Files):
        def capture(self):
            raise AssertionError("captured")

    store = CheckpointStore(tmp_path, asynchronous=False)
    save(store, 1)
    store.save("step-1", Loud(), at(1), ("best",), final=True)
    assert store.resolve("best").name == "step-1"


def test_closing_in_time_and_too_late(tmp_path):
    gate = threading.Event()
    errors: list[BaseException] = []
    store = CheckpointStore(tmp_path, on_error=errors.append)
    store.save("step-1", Files(gate=gate), at(1))
    assert not store.close(0.05)
    assert store.health["failures"] == 1 and "still being written after 0.05 s" in str(errors[0])
    gate.set()
    assert store.close()


ENDING = """
import sys, time
from danling.runners import CheckpointStore

class Slow:
    def write(self, directory):
        time.sleep(float(sys.argv[2]))
        (directory / "model.bin").write_bytes(b"weights")
        return ["model.bin"]

store = CheckpointStore(sys.argv[1])
store.save("step-1", Slow(), {"kind": "full", "global_step": 1})
if sys.argv[3] == "close":
    print(store.close(0.05))
"""


def test_a_process_that_ends_without_closing_still_finishes_the_save(tmp_path):
    subprocess.run([sys.executable, "-c", ENDING, str(tmp_path), "0.3", "leave"], check=True, timeout=60)
    assert CheckpointStore(tmp_path).newest() == tmp_path / "step-1"


def test_a_save_that_was_given_up_does_not_hold_the_process(tmp_path):
    command = [sys.executable, "-c", ENDING, str(tmp_path), "50", "close"]
    done = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert done.stdout == "False\n" and CheckpointStore(tmp_path).newest() is None


# ---------------------------------------------------------------------- failures


def test_a_periodic_save_that_fails_is_counted_and_told_but_not_raised(store, caplog):
    errors: list[BaseException] = []
    problem = OSError(errno.ENOSPC, "No space left on device")
    store.on_error = errors.append
    save(store, 1)
    with caplog.at_level(logging.ERROR):
        store.save("step-2", Files(error=problem), at(2))
        assert store.drain()
    assert store.health["failures"] == 1 and store.health["saves"] == 1
    assert "No space left" in store.health["first_error"] and "No space left" in caplog.text
    assert isinstance(errors[0], CheckpointError) and errors[0].__cause__ is problem
    assert names(store) == ["latest", "latest.pointer", "step-1"]  # no staging directory stays
    assert store.resolve("latest").name == "step-1"
    save(store, 3)
    assert store.resolve("latest").name == "step-3"


def test_a_final_save_that_fails_raises(store):
    save(store, 1)
    with pytest.raises(CheckpointError, match=r"step-2 could not be saved: PermissionError.*earlier checkpoints"):
        store.save("step-2", Files(error=PermissionError("no")), at(2), final=True)
    assert store.health["failures"] == 1 and store.resolve("latest").name == "step-1"


def test_a_capture_that_fails_leaves_everything_as_it_was(store):
    class Failing(Files):
        def capture(self):
            raise MemoryError("no host memory")

    save(store, 1)
    with pytest.raises(CheckpointError, match="no host memory"):
        store.save("step-2", Failing(), at(2), final=True)
    assert names(store) == ["latest", "latest.pointer", "step-1"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    store.save("step-1", Files(), at(1))
    assert store.drain() and store.health["failures"] == 1
    with pytest.raises(CheckpointError, match="Not a directory|NotADirectoryError|FileExists"):
        store.save("step-1", Files(), at(1), final=True)


def test_an_alias_that_cannot_move_is_reported_and_the_checkpoint_stands(store, monkeypatch):
    save(store, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("danling.runners.pointers.write_text", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save("step-2", Files(), at(2), final=True)
    assert store.resolve("latest").name == "step-1" and store.newest().name == "step-2"
    store.repair()
    assert store.resolve("latest").name == "step-2"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk(small_disk, asynchronous):
    store = CheckpointStore(small_disk / "checkpoints", asynchronous=asynchronous, keep_latest_k=1)
    big = b"x" * 400_000
    store.save("step-1", Files({"model.bin": big}), at(1))
    store.save("step-2", Files({"model.bin": big}), at(2))
    assert store.drain() and store.health == {**store.health, "saves": 2, "failures": 0}
    (small_disk / "other").write_bytes(b"x" * 300_000)
    store.save("step-3", Files({"model.bin": big}), at(3))
    assert store.drain()
    assert store.health["failures"] == 1 and "No space left" in store.health["last_error"]
    assert names(store) == ["latest", "latest.pointer", "step-2"] and verify(store.newest()) == []
    with pytest.raises(CheckpointError, match="No space left"):
        store.save("step-3", Files({"model.bin": big}), at(3), final=True)
    (small_disk / "other").unlink()
    store.save("step-3", Files({"model.bin": big}), at(3), final=True)
    assert store.resolve("latest").name == "step-3" and names(store) == ["latest", "latest.pointer", "step-3"]


# --------------------------------------------------------------------- retention


def test_retention_keeps_the_newest_and_what_aliases_name(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest_k=2, asynchronous=False)
    store.save("seed", Files(), at(0, kind="seed"), ())
    for step in range(1, 6):
        save(store, step, ("latest", "best") if step == 2 else ("latest", "mine") if step == 1 else ("latest",))
    store.save("final", Files(), at(5, kind="model"), ())
    assert {info.name for info in store.list()} == {"seed", "step-1", "step-2", "step-4", "step-5", "final"}
    save(CheckpointStore(tmp_path, keep_latest_k=1, asynchronous=False), 6)  # a restart forgets nothing
    assert {info.name for info in store.list()} == {"seed", "step-1", "step-2", "step-6", "final"}


def test_retention_orders_by_progress_not_by_name(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest_k=2, asynchronous=False)
    store.save("epoch-1", Files(), at(5, epoch=1))
    for step in (9, 10):
        save(store, step)
    assert [info.name for info in store.list()] == ["step-9", "step-10"]


def test_a_damaged_checkpoint_neither_counts_nor_goes(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest_k=1, asynchronous=False)
    save(store, 1)
    store.keep_latest_k = 0
    save(store, 2)
    (tmp_path / "step-2" / "model.bin").unlink()
    store.keep_latest_k = 1
    save(store, 3)
    assert [info.name for info in store.list()] == ["step-2", "step-3"]


def test_a_checkpoint_that_cannot_be_deleted_is_a_problem_not_an_error(tmp_path, monkeypatch):
    problems: list[tuple[str, BaseException]] = []
    store = CheckpointStore(
        tmp_path, keep_latest_k=1, asynchronous=False, problem=lambda name, error: problems.append((name, error))
    )
    save(store, 1)

    def refuse(path, **options):
        raise PermissionError(f"cannot delete {path}")

    with monkeypatch.context() as patch:
        patch.setattr("danling.runners.retention.shutil.rmtree", refuse)
        save(store, 2)
    assert store.health["failures"] == 0 and problems[0][0] == "retention"
    assert [info.name for info in store.list()] == ["step-2"]
    store.repair()
    assert names(store) == ["latest", "latest.pointer", "step-2"]


# ------------------------------------------------------------------------ repair


def test_repair_removes_leftovers_and_moves_aliases_that_lag(tmp_path):
    store = CheckpointStore(tmp_path, asynchronous=False)
    save(store, 1, ("latest", "best"))
    save(store, 2, ("latest", "best", "mine"))
    for alias in ("latest", "best"):
        (tmp_path / f"{alias}.pointer").write_text("step-1\n")
    (tmp_path / "best").unlink()
    (tmp_path / "mine.pointer").unlink()
    for leftover in (".tmp-step-3-ab12", ".trash-step-0-ab12"):
        (tmp_path / leftover / "ranks").mkdir(parents=True)
        (tmp_path / leftover / "ranks" / "x").write_text("")
    (tmp_path / ".latest.pointer.12ab.tmp").write_text("")
    store.repair()
    assert names(store) == sorted(
        ["step-1", "step-2", *(f"{alias}{end}" for alias in ("latest", "best", "mine") for end in ("", ".pointer"))]
    )
    assert all(store.resolve(alias).name == "step-2" for alias in ("latest", "best", "mine"))
    assert os.readlink(tmp_path / "best") == "step-2"


def test_repair_does_not_move_an_alias_back_to_an_older_save(tmp_path):
    store = CheckpointStore(tmp_path, asynchronous=False)
    save(store, 1, ("latest", "best"))
    save(store, 2)
    store.repair()
    assert store.resolve("best").name == "step-1" and store.resolve("latest").name == "step-2"


def test_repair_finds_a_target_for_a_pointer_that_lost_its_own(tmp_path, caplog):
    store = CheckpointStore(tmp_path, asynchronous=False)
    save(store, 1)
    save(store, 2, ("latest", "best"))
    shutil.rmtree(tmp_path / "step-2")
    with caplog.at_level(logging.WARNING):
        store.repair()
    assert store.resolve("latest").name == "step-1"
    assert "best names step-2" in caplog.text


# ----------------------------------------------------------------------- loading


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif how == "deleted":
        path.unlink()
    elif how == "longer":
        path.write_bytes(data + b"\0")


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted", "longer"])
@pytest.mark.parametrize("name", ["model.bin", "ranks/rank-00000.bin", "runner.json"])
def test_each_damaged_file_is_named_and_passed_over(tmp_path, caplog, name, how):
    store = CheckpointStore(tmp_path, asynchronous=False)
    content = {"model.bin": b"w" * 999, "ranks/rank-00000.bin": b"state", "runner.json": b"{}"}
    store.save("step-1", Files(content), at(1))
    store.save("step-2", Files(content), at(2))
    damage(tmp_path / "step-2" / name, how)
    assert len(store.verify(tmp_path / "step-2")) == 1 and store.verify(tmp_path / "step-2")[0].startswith(f"{name}: ")
    with pytest.raises(CheckpointError, match=f"step-2 is damaged: {name}"):
        require_whole(tmp_path / "step-2")
    with caplog.at_level(logging.WARNING):
        assert store.newest().name == "step-1"
    assert "step-2" in caplog.text and name in caplog.text


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_a_damaged_manifest_is_passed_over(tmp_path, caplog, how):
    store = CheckpointStore(tmp_path, asynchronous=False)
    save(store, 1)
    save(store, 2)
    manifest = tmp_path / "step-2" / MANIFEST
    if how == "flipped":
        manifest.write_text(manifest.read_text().replace('"sha256"', '"sha257"'))
    else:
        damage(manifest, how)
    with pytest.raises(CheckpointError, match="manifest"):
        verify(tmp_path / "step-2")
    with caplog.at_level(logging.WARNING):
        assert store.newest().name == "step-1"
    assert "step-2" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a manifest of danling"),
        ('{"model": 1}', "not a manifest of danling"),
        ('{"format_version": 1, "files": []}', "list of files"),
        ('{"format_version": 1, "files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}', "list of files"),
        ('{"format_version": 1, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}', "list of files"),
        ('{"format_version": 9, "danling_version": "7.1", "files": {}}', "version 9, written by danling 7.1.*upgrade"),
    ],
)
def test_a_foreign_manifest(tmp_path, content, message):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path / "step-1")
    assert newest_checkpoint(tmp_path) is None


def test_newest_goes_by_progress_whatever_the_aliases_say(tmp_path):
    store = CheckpointStore(tmp_path, asynchronous=False)
    store.save("epoch-2", Files(), at(20, epoch=2))
    store.save("step-15", Files(), at(15))
    store.save("step-20", Files(), at(20, phase="evaluate"), ())
    assert store.resolve("latest").name == "step-15"
    assert [info.name for info in store.list()] == ["step-15", "step-20", "epoch-2"]
    assert store.newest().name == "epoch-2"


def test_every_way_to_name_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    store = CheckpointStore(run / "checkpoints", asynchronous=False)
    save(store, 1, ("latest", "best"))
    save(store, 2)
    one, two = store.directory / "step-1", store.directory / "step-2"
    assert store.resolve("best") == one and store.resolve("step-2") == two
    for source, expected in [
        (one, one),
        (store.directory / "latest.pointer", two),
        (store.directory / "best", one),
        (store.directory, two),
        (run, two),
        (str(run), two),
    ]:
        assert resolve(source) == expected, source


def test_a_run_with_another_checkpoint_directory(tmp_path):
    store = CheckpointStore(tmp_path / "saves", asynchronous=False)
    save(store, 1)
    (tmp_path / "runner.yaml").write_text("checkpoint:\n  dir_name: saves\n")
    assert resolve(tmp_path) == tmp_path / "saves" / "step-1"


def test_a_run_with_weights_alone(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    store.save("final", Files(), at(1, kind="model"), final=True)
    assert resolve(tmp_path).name == "final"


def test_nothing_there(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    save(store, 1)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint at .*nope.*holds step-1"):
        store.resolve("nope")
    with pytest.raises(FileNotFoundError):
        resolve(tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="neither a checkpoint"):
        resolve(tmp_path / "empty")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file.txt")
    (tmp_path / "odd.pointer").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        resolve(tmp_path / "odd.pointer")
    (tmp_path / "gone.pointer").write_text("step-9")
    with pytest.raises(CheckpointNotFoundError, match="names step-9, which does not exist"):
        resolve(tmp_path / "gone.pointer")
