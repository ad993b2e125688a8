"""A process that saves again and again is killed at every point of the commit, while somebody reads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from danling.runners.crash import POINTS
from danling.runners.errors import CheckpointError
from danling.runners.locate import list_checkpoints, newest_checkpoint, resolve
from danling.runners.manifest import require_whole
from danling.runners.pointers import read_pointer

# Trains "weights" that are a function of the step, from the newest checkpoint on, and says so when it is done.
TRAINER = """
import sys, time
from pathlib import Path
from danling.runners.atomic import read_json
from danling.runners.results import Results
from danling.runners.store import CheckpointStore
from danling.runners.lock import RunLock

run, last, asynchronous, keep = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "async", int(sys.argv[4])
lock = RunLock(run)
lock.acquire()

class State:
    def __init__(self, step):
        self.step = step
    def write(self, directory):
        (directory / "ranks").mkdir()
        (directory / "model.bin").write_bytes(bytes([self.step % 256]) * 20_000)
        (directory / "ranks" / "rank-00000.bin").write_bytes(str(self.step).encode())
        return ["model.bin", "ranks/rank-00000.bin"]

store = CheckpointStore(run / "checkpoints", keep_latest_k=keep, asynchronous=asynchronous)
store.repair()
leftovers = [path.name for path in (run / "checkpoints").glob(".*")] if (run / "checkpoints").exists() else []
assert not leftovers, leftovers
newest = store.newest()
step = 0
results = Results("step")
if newest is not None:
    step = int((newest / "ranks" / "rank-00000.bin").read_text())
    assert store.resolve("latest") == newest, (store.resolve("latest"), newest)
    results.load_state_dict(read_json(newest / "runner.json")["results"])

class Full(State):
    def __init__(self, step, results):
        super().__init__(step)
        self.record = {"results": results.state_dict()}
    def write(self, directory):
        from danling.runners.atomic import write_json
        write_json(directory / "runner.json", self.record)
        return [*super().write(directory), "runner.json"]

while step < last:
    step += 1
    results.append({"val": {"loss": 1.0 / step}}, step)
    results.write(run, {"name": "trainer"})
    meta = {"kind": "full", "global_step": step, "micro_step": step, "epoch": 0, "phase": "train"}
    store.save(f"step-{step}", Full(step, results), meta, ("latest", "best"))
    store.boundary()
assert store.close()
assert store.health["failures"] == 0, store.health
print("done", step)
"""


def start(run: Path, last: int, mode: str, *, crash: str | None = None, keep: int = 1) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key != "DANLING_CRASH_AT"}
    if crash is not None:
        env["DANLING_CRASH_AT"] = crash
    command = [sys.executable, "-c", TRAINER, str(run), str(last), mode, str(keep)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_content(path: Path) -> int:
    """The checkpoint is whole and is what its name says."""
    manifest = require_whole(path)
    step = manifest["global_step"]
    assert path.name == f"step-{step}"
    assert (path / "model.bin").read_bytes() == bytes([step % 256]) * 20_000
    assert (path / "ranks" / "rank-00000.bin").read_text() == str(step)
    return step


class Reader(threading.Thread):
    """Loads `latest` all the time: once there is one, there is always one, and it never goes back."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.stop = threading.Event()
        self.reads = 0
        self.seen = 0
        self.fault: str | None = None

    def run(self) -> None:
        while not self.stop.is_set() and self.fault is None:
            name = read_pointer(self.directory, "latest")
            if name is None:
                if self.seen:
                    self.fault = f"latest is gone after step {self.seen}"
                time.sleep(0.001)
                continue
            try:
                step = check_content(resolve("latest", self.directory))
            except (CheckpointError, OSError, AssertionError) as error:
                if read_pointer(self.directory, "latest") == name:
                    self.fault = f"{type(error).__name__}: {error}"
                continue  # replaced by a newer one while it was being read
            self.reads += 1
            if step < self.seen:
                self.fault = f"latest went back from step {self.seen} to {step}"
            self.seen = step

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.join()
        assert self.fault is None, self.fault


def finish(run: Path, mode: str, last: int) -> None:
    process = start(run, last, mode)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.strip().endswith(f"done {last}"), output
    checkpoints = run / "checkpoints"
    assert check_content(newest_checkpoint(checkpoints)) == last
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(
        [f"step-{last}", "latest", "latest.pointer", "best", "best.pointer"]
    )
    assert (checkpoints / "latest").resolve().name == f"step-{last}"


FILE_POINTS = [point for point in POINTS if point.split(".")[0] in ("save", "alias", "retain", "results")]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("point", FILE_POINTS)
def test_killed_at_a_point_the_old_or_the_new_checkpoint_loads(tmp_path: Path, point: str, mode: str) -> None:
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    # During the third save, which writes three files like the two before it; retention begins with the second save.
    passage = 8 if point.startswith("save.file") else 2 if point.startswith("retain") else 3
    with Reader(checkpoints) as reader:
        process = start(run, 5, mode, crash=f"{point}:{passage}")
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 137, output
        newest = newest_checkpoint(checkpoints)
        assert newest is not None
        committed = point in ("save.rename", "save.parent_fsync") or point.startswith(("alias", "retain"))
        expected = {3} if committed else {2}
        if point == "results.write" and mode == "async":
            expected = {1, 2}  # the second save was perhaps still on its way
        assert check_content(newest) in expected
        old_or_new = check_content(resolve("latest", checkpoints))
        assert old_or_new in {*expected, min(expected) - committed}
        finish(run, mode, 5)
        time.sleep(0.01)
    assert reader.reads > 0


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("point", ["save.begin", "save.staged", "save.manifest", "save.rename", "alias.latest"])
def test_killed_during_the_first_save(tmp_path: Path, point: str, mode: str) -> None:
    run = tmp_path / "run"
    process = start(run, 3, mode, crash=point)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 137, output
    newest = newest_checkpoint(run / "checkpoints")
    if point in ("save.rename", "alias.latest"):
        assert newest is not None and check_content(newest) == 1
    else:
        assert newest is None
    finish(run, mode, 3)


def kill_at_random(tmp_path: Path, mode: str, kills: int) -> None:
    rng = random.Random(7)
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    reached = 0
    with Reader(checkpoints) as reader:
        for _ in range(kills):
            process = start(run, 1_000_000, mode)
            deadline = time.monotonic() + 30
            begun = reached
            while (latest := read_pointer(checkpoints, "latest")) is None or int(latest.removeprefix("step-")) <= begun:
                assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.08))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)
            newest = newest_checkpoint(checkpoints)
            assert newest is not None
            step = check_content(newest)
            assert step > reached
            reached = step
        finish(run, mode, reached + 2)
    assert reader.reads > kills


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed_at_random_instants(tmp_path: Path, mode: str) -> None:
    kill_at_random(tmp_path, mode, kills=8)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed_at_many_random_instants(tmp_path: Path, mode: str) -> None:
    kill_at_random(tmp_path, mode, kills=100)


def test_all_checkpoints_stay_without_retention(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, 4, "async", crash="save.rename:3", keep=0)
    process.communicate(timeout=60)
    process = start(run, 4, "sync", keep=0)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert [info.name for info in list_checkpoints(run / "checkpoints")] == ["step-1", "step-2", "step-3", "step-4"]
