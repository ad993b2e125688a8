"""The commit of a checkpoint by several real processes: together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danling.backends.torch.payload import MODEL, rank_file
from danling.backends.torch.snapshot import read_file
from danling.runners import CheckpointStore
from danling.runners.manifest import require_whole
from support.ranks import run_ranks

# Saves steps 1, 2, ... from the newest on; arguments: directory, last step, mode, rank that fails in step 3 or -1.
SAVER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from danling.backends.torch.collective import Header, TorchCoordinator, new_commit_group
from danling.backends.torch.payload import MODEL, rank_file, read_payload
from danling.backends.torch.snapshot import HostBuffers, TorchSnapshot
from danling.runners import CheckpointError, CheckpointStore

directory, last, mode, failing = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo")
rank = dist.get_rank()
group = new_commit_group() if mode == "async" else None
coordinator = TorchCoordinator(group, threaded=mode == "async")
header = Header(3)
assert header.sum([1.0, rank, 0]) == [2.0, 1.0, 0.0]
assert header.sum([2.5, rank == 1, 3]) == [5.0, 1.0, 6.0]
assert (coordinator.rank, coordinator.world_size, coordinator.is_main) == (rank, 2, rank == 0)
told, errors = [], []
store = CheckpointStore(
    directory, coordinator=coordinator, keep_latest_k=1, asynchronous=mode != "sync",
    on_commit=lambda path: told.append(path.name), on_error=lambda error: errors.append(str(error)),
)
store.repair()
newest = coordinator.broadcast_object(store.newest() if rank == 0 else None)
step = 0 if newest is None else read_payload(newest, rank)["step"]
assert coordinator.gather_objects(step) == [step, step]
buffers = HostBuffers()


class Failing(TorchSnapshot):
    def write(self, folder):
        super().write(folder)
        raise OSError(28, "No space left on device")


while step < last:
    step += 1
    files = {rank_file(rank): {"step": step, "rank": rank}}
    if rank == 0:
        files[MODEL] = {"w": torch.full((1000,), float(step))}
    kind = Failing if rank == failing and step == 3 else TorchSnapshot
    meta = {"kind": "full", "global_step": step, "world_size": 2}
    store.save(f"step-{step}", kind(files, buffers), meta, ("latest", "best"))
    dist.all_reduce(torch.ones(1))  # training goes on on the default group
    store.boundary()
assert store.close()
if failing >= 0:
    assert store.health["failures"] == 1 and len(errors) == 1, (store.health, errors)
    who = "" if rank == failing else f"rank {failing}: "
    assert f"step-3 could not be saved: {who}OSError: [Errno 28] No space left on device" in errors[0], errors
    assert "step-3" not in told and told[-1] == f"step-{last}", told
    try:
        store.save("step-9", Failing(files, buffers), {"kind": "full", "global_step": 9}, final=True)
    except CheckpointError as error:
        assert "No space left" in str(error)
    else:
        raise AssertionError("a final save that fails must raise on every rank")
else:
    assert store.health["failures"] == 0, store.health
print("done", step)
dist.destroy_process_group()
"""


def check(directory: Path, step: int) -> None:
    store = CheckpointStore(directory)
    newest = store.newest()
    assert newest is not None and newest.name == f"step-{step}" and store.resolve("latest") == newest
    assert store.resolve("best") == newest
    manifest = require_whole(newest)
    assert set(manifest["files"]) == {MODEL, rank_file(0), rank_file(1)} and manifest["world_size"] == 2
    assert torch.equal(read_file(newest / MODEL)["w"], torch.full((1000,), float(step)))
    for rank in (0, 1):
        assert read_file(newest / rank_file(rank)) == {"step": step, "rank": rank}
    assert [path.name for path in directory.glob(".*")] == []


def save(directory: Path, last: int, mode: str, failing: int = -1, crash: str | None = None) -> None:
    env = {} if crash is None else {"DANLING_CRASH_AT": crash}
    results = run_ranks(SAVER, 2, [str(directory), str(last), mode, str(failing)], env=env, check=crash is None)
    if crash is not None:
        assert 137 in [result.returncode for result in results], results
        assert all(result.returncode != 0 for result in results), results


# "boundary" commits asynchronous saves on the default group at the next boundary.
@pytest.mark.parametrize(
    "mode", ["async", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("boundary", "sync"))]
)
def test_a_rank_that_fails_fails_the_save_on_all(tmp_path: Path, mode: str) -> None:
    save(tmp_path, 5, mode, failing=1)
    check(tmp_path, 5)


@pytest.mark.slow
def test_a_main_process_that_fails_fails_the_save_on_all(tmp_path: Path) -> None:
    save(tmp_path, 4, "async", failing=0)
    check(tmp_path, 4)


POINTS = [
    ("save.begin@1:3", 2),
    ("save.staged@0:3", 2),
    ("save.file@1:3", 2),
    ("save.file_fsync@0:6", 2),
    ("save.barrier@1:3", 3),  # the main process may commit what is complete
    ("save.barrier@0:3", 2),
    ("save.manifest_tmp@0:3", 2),
    ("save.manifest@0:3", 2),
    ("save.rename@0:3", 3),
    ("save.parent_fsync@0:3", 3),
    ("alias.latest@0:3", 3),
    ("alias.best@0:3", 3),
    ("retain.trash@0:2", 3),
    ("retain.remove@0:2", 3),
]


def kill(tmp_path: Path, crash: str, committed: int, mode: str) -> None:
    save(tmp_path, 5, mode, crash=crash)
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    expected = {f"step-{committed}"} | ({"step-2"} if crash.startswith("save.barrier@1") else set())
    assert newest.name in expected
    require_whole(newest)
    save(tmp_path, 5, mode)
    check(tmp_path, 5)


def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    kill(tmp_path, "save.file@1:3", 2, "async")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("mode", ["sync", "async", "boundary"])
@pytest.mark.parametrize(("crash", "committed"), POINTS)
def test_one_of_two_ranks_is_killed_at_every_point(tmp_path: Path, crash: str, committed: int, mode: str) -> None:
    kill(tmp_path, crash, committed, mode)
