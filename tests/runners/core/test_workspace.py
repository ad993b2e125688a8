"""Names, directories, the lock and the provenance of a run, with real git and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from danling.runners import RunBusyError, Workspace
from danling.runners.atomic import read_yaml
from danling.runners.errors import ConfigError
from danling.runners.lock import RunLock, is_locked, read_holder
from danling.runners.provenance import MAX_DIFF, GitState, environment, git_state, write_metadata
from danling.runners.workspace import NAMESPACE, new_timestamp

HOLDER = """
import sys, time
from danling.runners.lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


def workspace(root: Path, **options) -> Workspace:
    return Workspace(root, "lin", "exp", config_id="0ff59a7a0b77", **options)


def hold(directory: Path, code: str = HOLDER) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


# -------------------------------------------------------------------------- names


def test_the_directory_depends_on_the_configuration_alone(tmp_path):
    plain = workspace(tmp_path)
    assert plain.dir == tmp_path / "lin" / "exp" / "exp-0ff59a7a0b77"
    other = workspace(tmp_path, git=GitState("a" * 40, None, b"diff"), timestamp="20260101-000000-000000")
    assert other.dir == plain.dir
    named = workspace(tmp_path, name="mine", checkpoint_dir_name="saves")
    assert named.dir.name == "mine-0ff59a7a0b77" and named.checkpoint_dir == named.dir / "saves"
    assert named.log_file == named.dir / "logs" / f"{named.timestamp}.log"
    assert not plain.dir.exists()  # nothing is written before lock()


def test_ids():
    clean, dirty = GitState("0123456789" * 4, "main", b""), GitState("0123456789" * 4, "main", b"+x\n")
    assert clean.code_id == "01234567" and not clean.dirty
    assert dirty.code_id.startswith("01234567-d") and len(dirty.code_id) == 18 and dirty.dirty
    with_git = workspace(Path("r"), git=clean)
    assert with_git.id == "01234567-0ff59a7a0b77" and with_git.experiment_id == with_git.code_id == "01234567"
    assert with_git.run_id == with_git.config_id == "0ff59a7a0b77"
    assert with_git.experiment_uuid == uuid.uuid5(NAMESPACE, "01234567")
    assert with_git.run_uuid == uuid.uuid5(with_git.experiment_uuid, "0ff59a7a0b77")
    assert with_git.uuid == uuid.uuid5(with_git.run_uuid, with_git.id)
    without = workspace(Path("r"))
    assert without.id == "0ff59a7a0b77" and without.code_id is None and without.uuid != with_git.uuid


def test_timestamps_sort_by_time():
    stamps = [new_timestamp() for _ in range(50)]
    assert stamps == sorted(stamps) and len(stamps[0]) == len("20260101-000000-000000")


def test_from_config(tmp_path):
    from danling.runners import RunnerConfig

    config = RunnerConfig({"workspace_root": str(tmp_path), "name": "mine", "epochs": 3})
    config.validate()
    made = Workspace.from_config(config, source=Workspace, timestamp="20260101-000000-000000")
    longer = RunnerConfig({"workspace_root": str(tmp_path), "name": "mine", "epochs": 30})
    longer.validate()
    assert made.dir.name.startswith("mine-") and made.dir == Workspace.from_config(longer).dir
    assert made.timestamp == "20260101-000000-000000"


# --------------------------------------------------------------------------- lock


def test_a_second_process_is_refused_with_host_pid_and_time(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(RunBusyError, match=rf"pid {holder.pid} on .* since 20\d\d-.*Wait for that run"):
            RunLock(tmp_path).acquire()
        assert is_locked(tmp_path) and read_holder(tmp_path)["pid"] == holder.pid
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert not is_locked(tmp_path)  # a dead process holds nothing
    lock = RunLock(tmp_path)
    lock.acquire()
    assert read_holder(tmp_path)["pid"] == os.getpid()
    lock.release()


def test_a_second_lock_in_the_same_process_is_refused(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.acquire()  # its own: nothing to do
    with pytest.raises(RunBusyError, match="another runner of this process"):
        RunLock(tmp_path / ".." / tmp_path.name).acquire()
    assert is_locked(tmp_path) and read_holder(tmp_path)["pid"] == os.getpid()
    refused = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True)
    assert "RunBusyError" in refused.stderr  # looking at it has not given it up
    lock.release()
    lock.release()
    assert not is_locked(tmp_path)


FORKS = """
import os, sys, time
from danling.runners.lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
if os.fork() == 0:
    assert not lock.held
    lock.release()
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_forked_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    parent = hold(tmp_path, FORKS)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = int(children.read_text().split()[0]) if children.exists() else None
    assert is_locked(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        RunLock(tmp_path).acquire()
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)
        assert parent.stdout is not None
        parent.stdout.close()


def test_nothing_is_locked_where_nothing_is(tmp_path):
    assert not is_locked(tmp_path / "none") and read_holder(tmp_path / "none") == {}
    (tmp_path / ".lock").write_text("not json")
    assert not is_locked(tmp_path) and read_holder(tmp_path) == {}


def test_a_file_system_without_locks_is_warned_about_once(tmp_path, monkeypatch):
    from danling.runners import lock as module

    def unsupported(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", unsupported)
    monkeypatch.setattr(module, "_warned", False)
    with pytest.warns(UserWarning, match="has no locks"):
        RunLock(tmp_path / "a").acquire()
    RunLock(tmp_path / "b").acquire()


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workspace_root: cannot write to the run directory"):
        workspace(tmp_path / "file").lock()


# -------------------------------------------------------------------- directories


def test_set_aside_keeps_everything_and_the_lock(tmp_path):
    space = workspace(tmp_path)
    space.lock()
    (space.checkpoint_dir / "epoch-1").mkdir(parents=True)
    (space.checkpoint_dir / "epoch-1" / "manifest.json").write_text("{}")
    assert space.has_checkpoints()
    aside = space.set_aside()
    assert aside == space.dir.with_name(f"{space.dir.name}.{space.timestamp}")
    assert (aside / "checkpoints" / "epoch-1" / "manifest.json").exists()
    assert not space.has_checkpoints() and space.locked and is_locked(space.dir) and not is_locked(aside)
    again = space.set_aside()
    assert again.name == f"{aside.name}.1"
    space.release()
    assert not space.locked


@pytest.mark.parametrize("action", ["warn", "raise", "ignore"])
def test_check_dir(tmp_path, action):
    space = workspace(tmp_path)
    assert space.check_dir(action)
    space.lock()
    assert space.check_dir(action)  # the lock does not count
    (space.dir / "results.json").write_text("{}")
    if action == "warn":
        with pytest.warns(UserWarning, match="is not empty"):
            assert not space.check_dir()
    elif action == "raise":
        with pytest.raises(FileExistsError, match="is not empty"):
            space.check_dir("raise")
    else:
        assert not space.check_dir("ignore")
    with pytest.raises(ValueError, match="warn, raise or ignore"):
        space.check_dir("delete")


# --------------------------------------------------------------------- provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "repository"
    root.mkdir()

    def git(*args: str) -> None:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(root), *identity, *args], check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    (root / "train.py").write_text("print(1)\n")
    git("add", ".")
    git("commit", "-qm", "first")
    return root, git


def test_the_state_of_a_repository(repository):
    root, git = repository
    clean = git_state(root)
    assert clean is not None and clean.branch == "main" and not clean.dirty and len(clean.revision) == 40
    (root / "new.txt").write_text("untracked files are not the code\n")
    assert git_state(root) == clean
    (root / "train.py").write_text("print(2)\n")
    dirty = git_state(root / ".")
    assert dirty is not None and dirty.dirty and b"+print(2)" in dirty.diff and dirty.code_id != clean.code_id
    git("checkout", "-q", "--detach")
    detached = git_state(root)
    assert detached is not None and detached.branch is None


def test_no_repository_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(".") is None


def test_metadata_of_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    git = GitState("0" * 40, "main", b"+x\n")
    space = workspace(tmp_path, git=git)
    failures = space.write_metadata({"optim": {"lr": 1e-3}}, {"optim.lr": 0.001}, {"world_size": 2})
    assert failures == []
    assert sorted(path.name for path in space.metadata_dir.iterdir()) == [
        "config.yaml",
        "environment.yaml",
        "git.diff",
        "git.yaml",
        "identity.yaml",
    ]
    facts = read_yaml(space.metadata_dir / "git.yaml")
    assert facts["revision"] == "0" * 40 and facts["dirty"] and facts["code_id"] == space.code_id
    assert (space.metadata_dir / "git.diff").read_bytes() == b"+x\n"
    about = read_yaml(space.metadata_dir / "environment.yaml")
    assert about["world_size"] == 2 and about["variables"]["SLURM_JOB_ID"] == "77" and about["pid"] == os.getpid()
    assert "chanfig" in about["packages"] and "hush" not in (space.metadata_dir / "environment.yaml").read_text()
    assert read_yaml(space.metadata_dir / "config.yaml") == {"optim": {"lr": 0.001}}


def test_a_large_diff_leaves_its_hash_and_a_note(tmp_path):
    git = GitState("0" * 40, None, b"x" * (MAX_DIFF + 1))
    assert write_metadata(tmp_path, git=git, config={}, identity={}) == []
    facts = read_yaml(tmp_path / "git.yaml")
    assert facts["diff_bytes"] == MAX_DIFF + 1 and len(facts["diff_sha256"]) == 64 and "not kept" in facts["note"]
    assert not (tmp_path / "git.diff").exists()


def test_metadata_that_cannot_be_written_is_reported_file_by_file(tmp_path):
    (tmp_path / "file").write_text("")
    failures = write_metadata(tmp_path / "file" / "m", git=None, config={}, identity={})
    assert [name for name, _ in failures] == ["", "environment.yaml", "config.yaml", "identity.yaml"]
    assert write_metadata(tmp_path / "m", git=None, config={"x": object()}, identity={})[0][0] == "config.yaml"


def test_environment_names_what_ran():
    about = environment()
    assert about["argv"] == list(sys.argv) and about["python"] == ".".join(map(str, sys.version_info[:3]))


def test_run_file(tmp_path):
    space = workspace(tmp_path)
    space.lock()
    space.write_config({"epochs": 3, "optim": {"lr": 1e-4}}, stack="torch", seed=7)
    content = read_yaml(space.dir / "runner.yaml")
    assert content.pop("danling_version")
    assert content == {"epochs": 3, "optim": {"lr": 1e-4}, "stack": "torch", "seed": 7, "config_id": "0ff59a7a0b77"}
