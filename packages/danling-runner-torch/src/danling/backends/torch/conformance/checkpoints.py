"""Checkpoints: killed runs, saves in the background, saves that fail, files that are damaged, files that attack."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .decisions import STOP_AT, STORY, assert_same_story, story
from .marks import shows
from .worker import Place, scenario

KILL = "DANLING_CONFORMANCE_KILL_AT"
ROOM = 1024  # bytes that a file may have where saves are to fail: no rank's random states fit


# Killed


@scenario
def endure(place: Place) -> dict[str, Any]:
    """The run of `straight`, which goes on where it was; the environment says when the last rank is killed."""
    from .task import Task

    with Task(place.config(auto_resume=True, **STORY)) as runner:
        resumed_at = runner.global_step
        at = int(os.environ.get(KILL, "0"))

        def die(runner: Any, event: Any) -> None:
            if place.last and event.global_step == at:
                os.kill(os.getpid(), signal.SIGKILL)

        runner.on("step", die)
        runner.train()
        return {"resumed": resumed_at, "story": story(runner)}


@pytest.fixture(scope="session")
def endured(jobs: Any) -> dict[str, Any]:
    """The last rank killed in training, then rank 0 between the rename of a commit and its pointer, then left alone."""

    def whole() -> list[int]:
        from danling.runners.locate import list_checkpoints
        from danling.runners.manifest import verify

        (folder,) = Path(jobs.folder, "killed", "endure", "run").glob("*/*/*/checkpoints")
        infos = list_checkpoints(folder)
        bad = {info.name: problems for info in infos if (problems := verify(info.path))}
        assert not bad, f"committed checkpoints are damaged after a kill: {bad}"
        return sorted(info.manifest["global_step"] for info in infos)

    _, first = jobs.run("killed", "endure", check=False, **{KILL: str(STOP_AT)})
    after_first = whole()
    _, second = jobs.run("killed", "endure", check=False, DANLING_CRASH_AT="save.rename@0")
    after_second = whole()
    outcomes, _ = jobs.run("killed", "endure")
    codes = first[-1].returncode, second[0].returncode
    return {"codes": codes, "steps": (after_first, after_second), "found": [found["endure"] for found in outcomes]}


@shows(2)
def test_after_a_kill_the_newest_commit_loads(endured: dict[str, Any]) -> None:
    """Every checkpoint there is, is whole, and the newest is what the run goes on from."""
    assert endured["codes"] == (-signal.SIGKILL, 137)
    first, second = endured["steps"]
    assert first and max(first) in (STOP_AT - 3, STOP_AT - 1) and max(second) > max(first)
    assert {rank["resumed"] for rank in endured["found"]} == {max(second)}


@shows(3, "straight")
def test_a_killed_run_is_resumed_bit_for_bit(found: list[Any], endured: dict[str, Any]) -> None:
    """Killed twice, it ends as the run that was never killed."""
    assert_same_story([rank["story"] for rank in endured["found"]], found)


# In the background


@scenario
def saves_while_training(place: Place) -> dict[str, Any]:
    """A save after every update, by a slow writer."""
    import time

    from .task import Task

    class Later:
        """Writes what `capture` gave, after a while."""

        def __init__(self, write: Any) -> None:
            self.write = write

        def __call__(self, directory: Path) -> Any:
            time.sleep(0.03)
            return self.write(directory)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.write, name)

    class Slow(Task):
        def capture(self) -> Any:
            return Later(super().capture())

    options: dict[str, Any] = {"steps": 6, "evaluate_splits": [], "checkpoint__interval": "1 steps"}
    with Slow(place.config(**options)) as runner:
        runner.record = True
        runner.train()
        runner.checkpoint_manager.drain()
        runner.barrier()
        steps = {info.manifest["global_step"]: info.path for info in runner.checkpoint_manager.list()}
        stored = {step: runner.read_weights(path) for step, path in steps.items()}
        return {"stored": stored, "updates": runner.updates}


@shows(6, "saves_while_training")
def test_a_save_holds_the_weights_of_its_step(found: list[Any]) -> None:
    """However slow the writer is."""
    for rank in found:
        assert sorted(rank["stored"]) == [1, 2, 3, 4, 5, 6]
        for step, weights in rank["stored"].items():
            for name, value in rank["updates"][step - 1].items():
                assert value.equal(weights[name].to(value.dtype)), f"{name} in step-{step}"


# That fail


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process stay small: what is written beyond that is an error of the system."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@scenario
def failing_saves(place: Place) -> dict[str, Any]:
    """The last rank has no room while step 2 is saved; then while the last step is."""
    from contextlib import ExitStack

    from danling.runners import CheckpointError

    from .task import Task

    found: dict[str, Any] = {}
    options = {"evaluate_splits": [], "eval_interval": 0, "checkpoint__interval": "2 steps"}
    for name, steps, full in (("periodic", 6, (2, 3)), ("final", 4, (4, 5))):
        tight = ExitStack()
        told: list[str] = []
        runner = Task(place.config(name, steps=steps, **options))

        def change(runner: Any, event: Any, tight: ExitStack = tight, full: tuple[int, int] = full) -> None:
            if event.global_step == full[1]:
                runner.checkpoint_manager.drain()
                tight.close()
            elif event.global_step == full[0]:
                runner.checkpoint_manager.drain()
                if place.last:
                    tight.enter_context(no_room())

        runner.on("step", change)
        runner.on("save_error", lambda runner, event, told=told: told.append(str(event.payload["error"])))
        error = None
        try:
            runner.train()
        except CheckpointError as raised:
            error = str(raised)
        finally:
            tight.close()
            runner.close()
        infos = runner.checkpoint_manager.list()
        found[name] = {
            "error": error,
            "told": told,
            "names": [info.name for info in infos],
            "whole": not any(runner.checkpoint_manager.verify(info.path) for info in infos),
            "leftovers": [path.name for path in Path(runner.checkpoint_dir).iterdir() if path.name.startswith(".tmp")],
            "summary": (runner.dir / "summary.json").read_text() if runner.is_main_process else None,
        }
    return found


@shows(10, "failing_saves")
def test_a_periodic_save_that_fails_is_counted(found: list[Any]) -> None:
    """No rank commits it, all are told, training goes on, and the next save succeeds."""
    import json

    for rank in found:
        run = rank["periodic"]
        assert run["error"] is None and len(run["told"]) == 1 and "step-2" in run["told"][0], run
        assert run["names"] == ["step-4", "step-6"] and run["whole"] and not run["leftovers"]
    summary = json.loads(found[0]["periodic"]["summary"])
    assert summary["status"] == "finished" and summary["checkpoint_health"]["failures"] == 1


@shows(10, "failing_saves")
def test_a_final_save_that_fails_fails_the_run(found: list[Any]) -> None:
    """On every rank."""
    import json

    for rank in found:
        run = rank["final"]
        assert run["error"] is not None and "step-4" in run["error"], run
        assert run["names"] == ["step-2"] and run["whole"] and not run["leftovers"]
    if len(found) > 1:  # alone, the process without room is the one that writes the summary
        assert json.loads(found[0]["final"]["summary"])["status"] == "failed"


# Damaged and hostile


def on_each_rank(
    runner: Any, change: Callable[[], Any], load: Callable[[], Any], undo: Callable[[], Any]
) -> str | None:
    """Let rank 0 change files, let all ranks load them; the error of this rank."""
    if runner.is_main_process:
        change()
    runner.barrier()
    try:
        load()
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    runner.barrier()
    if runner.is_main_process:
        undo()
    runner.barrier()
    return error


def flip(file: Path, content: bytes) -> None:
    """Change one bit in the middle."""
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "cut": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "flipped": flip,
    "removed": lambda file, content: file.unlink(),
}


@scenario
def damaged(place: Place) -> dict[str, Any]:
    """Every file of the newest checkpoint cut, changed in one bit, and removed; then one left that way."""
    from .task import Task

    options = {**STORY, "steps": 4, "auto_resume": True}
    with Task(place.config(**options)) as runner:
        runner.train()
    errors = {}
    with Task(place.config(**options)) as runner:
        newest = Path(runner.checkpoint_manager.resolve("latest"))
        for file in sorted(path for path in newest.rglob("*") if path.is_file()):
            content = file.read_bytes()
            for name, damage in DAMAGES.items():
                errors[f"{file.relative_to(newest)} {name}"] = on_each_rank(
                    runner,
                    partial(damage, file, content),
                    partial(runner.load_checkpoint, newest),
                    partial(file.write_bytes, content),
                )
    if place.rank == 0:
        (newest / "runner.json").write_text("{}")
    with Task(place.config(**options)) as runner:
        return {"errors": errors, "resumed": runner.global_step, "newest": newest.name}


@shows(1, "damaged")
def test_a_damaged_checkpoint_does_not_load(found: list[Any]) -> None:
    """Whatever file is damaged, and however, all ranks get an error that says so; automatic resume takes the one before."""
    for rank, outcome in enumerate(found):
        assert len(outcome["errors"]) >= 9 and outcome["newest"] == "step-4"
        for name, error in outcome["errors"].items():
            assert error is not None and re.match("Checkpoint(NotFound)?Error: ", error), (
                f"{name}, rank {rank}: {error}"
            )
        assert outcome["resumed"] == 2


class Attack:
    """Makes a folder when it is read by pickle."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def sign(checkpoint: Path) -> None:
    """Write a manifest that vouches for the files as they are now."""
    from danling.runners.manifest import describe_files, read_manifest, walk, write_manifest

    header = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "format_version")}
    header.pop("checksum", None)
    write_manifest(checkpoint, header, describe_files(checkpoint, walk(checkpoint)))


@scenario
def hostile(place: Place) -> dict[str, Any]:
    """Each kind of binary file in a checkpoint replaced by one that runs code, with a manifest that vouches for it."""
    import io
    import pickle
    import shutil

    import torch

    from .task import Task

    options = {**STORY, "steps": 2}
    with Task(place.config(**options)) as runner:
        runner.train()
    owned = place.folder / "owned"
    copy = place.folder / "copy"
    errors = {}
    with Task(place.config(auto_resume=True, **options)) as runner:
        newest = Path(runner.checkpoint_manager.resolve("latest"))
        kinds: dict[str, list[Path]] = {}
        for file in sorted(newest.rglob("*")):
            if file.is_file() and file.suffix not in (".json", ".yaml", ".yml"):
                kinds.setdefault(re.sub(r"\d+", "N", str(file.relative_to(newest))), []).append(file)
        for kind, files in kinds.items():
            for form in ("zip", "pickle"):

                def change(files: list[Path] = files, form: str = form) -> None:
                    shutil.copytree(newest, copy)
                    for file in files:
                        target = copy / file.relative_to(newest)
                        buffer = io.BytesIO()
                        save = torch.save if form == "zip" else pickle.dump
                        save({"0.weight": Attack(str(owned))}, buffer)
                        target.write_bytes(buffer.getvalue())
                    sign(copy)

                errors[f"{kind}, {form}"] = on_each_rank(
                    runner, change, lambda: runner.load_checkpoint(copy), lambda: shutil.rmtree(copy)
                )
    return {"errors": errors, "owned": owned.exists()}


@shows(9, "hostile")
def test_loading_runs_no_code(found: list[Any]) -> None:
    """A file that would run code when unpickled is refused with an error that says so."""
    for rank, outcome in enumerate(found):
        assert not outcome["owned"], "code from a checkpoint was run"
        assert len(outcome["errors"]) >= 4
        for name, error in outcome["errors"].items():
            assert error is not None and error.startswith("CheckpointError: "), f"{name}, rank {rank}: {error}"
