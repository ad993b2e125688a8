"""Checkpoints that are committed whole: staging directory, checksums, manifest, rename; then aliases and retention."""

from __future__ import annotations

import atexit
import builtins
import logging
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .atomic import fsync_dir
from .coordinator import Coordinator
from .crash import crash_point
from .errors import CheckpointError
from .locate import CheckpointInfo, list_checkpoints, newest_checkpoint, resolve
from .manifest import KINDS, MANIFEST, describe_files, read_manifest, verify, walk, write_manifest
from .pointers import check_alias, move, read_pointer, read_pointers
from .pointers import link as link_alias
from .retention import TEMPORARY, free_name, prune, sweep

_log = logging.getLogger(__name__)
BOUNDARY = ("kind", "global_step", "micro_step", "epoch")


class Snapshot(Protocol):
    """The state of this rank at the step that is saved.

    A snapshot may also have `capture()`: called on the training thread once the save before it is out of the way and
    it is certain that something will be written, so that host buffers can be reused. From its return on, the snapshot
    must not depend on live state. With a true attribute `collective`, `write` is called on all ranks or on none.

    What a snapshot has in its attribute `report` after `write` reaches the main process, where `finish(directory,
    reports)` is called with those of all ranks, in order, just before the commit; it may write further files.
    """

    def write(self, directory: Path) -> Iterable[str] | None:
        """Put this rank's files there, on whichever thread; return their relative paths, None for "look yourself"."""


@dataclass
class _Job:
    """One save on its way."""

    name: str
    staging: Path
    header: dict[str, Any]
    aliases: tuple[str, ...]
    snapshot: Snapshot
    error: BaseException | None = None
    files: dict[str, Any] = field(default_factory=dict)
    report: Any = None
    thread: threading.Thread | None = None
    needs_commit: bool = False


class CheckpointStore:
    """Writes, finds, verifies and forgets the checkpoints in one directory.

    Every rank calls `save`, `drain`, `boundary`, `repair` and `close` in the same order; the rest is local. The ranks
    need a common file system.

    Args:
        directory: made at the first save.
        coordinator: reaches the other ranks; None is a single process.
        keep_latest_k: how many `epoch-*` and `step-*` stay beside those that an alias names; 0 keeps all.
        asynchronous: write on a thread of its own. `save` returns once the snapshot is captured.
        load_only: never write anything.
        on_commit: told, on the training thread, the directory of each checkpoint that was committed.
        on_error: told, on the training thread, the error of each save that failed.
        problem: told service and error where something that is not essential failed.
        logger: for what the user should see.

    Attributes:
        health: `saves`, `failures`, `first_error`, `last_error`, `stall_seconds` (time that `save` kept its caller).

    Examples:
        >>> import tempfile
        >>> class Text:
        ...     def write(self, directory):
        ...         (directory / "model.txt").write_text("weights")
        >>> store = CheckpointStore(tempfile.mkdtemp(), asynchronous=False)
        >>> store.save("epoch-1", Text(), {"kind": "full", "global_step": 10, "epoch": 1}, ("latest", "best"))
        >>> store.resolve("best").name, store.verify(store.newest())
        ('epoch-1', [])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        coordinator: Coordinator | None = None,
        keep_latest_k: int = 0,
        asynchronous: bool = True,
        load_only: bool = False,
        on_commit: Callable[[Path], None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
        problem: Callable[[str, BaseException], None] | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.coordinator = coordinator or Coordinator()
        self.keep_latest_k = keep_latest_k
        self.asynchronous = asynchronous
        self.load_only = load_only
        self.on_commit = on_commit
        self.on_error = on_error
        self.logger = logger or _log
        self._problem = problem or self._log_problem
        self.health: dict[str, Any] = {
            "saves": 0,
            "failures": 0,
            "first_error": None,
            "last_error": None,
            "stall_seconds": 0.0,
        }
        self.last_committed: Path | None = None
        self._job: _Job | None = None
        self._news: deque[tuple[Path | None, BaseException | None]] = deque()

    # -------------------------------------------------------------- saving

    def save(
        self,
        name: str,
        snapshot: Snapshot,
        meta: Mapping[str, Any],
        aliases: Iterable[str] = ("latest",),
        *,
        final: bool = False,
        force: bool = False,
    ) -> None:
        """Save under a name; every rank calls it.

        A name that is committed already is never written again: at the same boundary only the aliases move; with
        `force`, or at another boundary, the save is called `name.1`, `name.2`, ...

        Args:
            name: `epoch-N`, `step-N`, `seed` or `final`.
            snapshot: state of this rank.
            meta: for the manifest: `kind` (full, model, seed), `global_step`, `micro_step`, `epoch`, `phase`, `score`,
                `config_id`, `code_id`, `stack`, `axes`, `world_size`, ...
            aliases: names to move once it is committed. `latest` moves for full saves alone.
            final: wait for the commit, and raise if it fails; otherwise failures are logged and counted.
            force: write even at a boundary that is committed.

        Raises:
            CheckpointError: a final save failed.
            ValueError: an alias or kind is not possible.
        """
        aliases = tuple(aliases)
        for alias in aliases:
            check_alias(alias)
        kind = meta.get("kind", "full")
        if kind not in KINDS:
            raise ValueError(f"a checkpoint's kind is one of {', '.join(KINDS)}, got {kind!r}")
        if self.load_only:
            return
        if kind == "model":
            aliases = tuple(alias for alias in aliases if alias != "latest")
        start = time.monotonic()
        error: CheckpointError | None = None
        try:
            self._finish()
            crash_point("save.begin")
            error = self._save(name, snapshot, {**meta, "kind": kind}, aliases, final, force)
        finally:
            self.health["stall_seconds"] += time.monotonic() - start
        self._tell()
        if final and error is not None:
            raise error

    def _save(
        self, name: str, snapshot: Snapshot, meta: dict[str, Any], aliases: tuple[str, ...], final: bool, force: bool
    ) -> CheckpointError | None:
        try:
            verb, name, staging = self._agree(self._prepare, name, meta, force)
            if verb == "move":
                self._agree(self._move_aliases, name, aliases)
                self._succeeded(name)
                return None
        except Exception as error:
            return self._failed(name, error)
        header = self._header(name, meta, aliases)
        job = _Job(name, Path(staging), header, aliases, snapshot)
        try:
            capture = getattr(snapshot, "capture", None)
            if capture is not None:
                capture()
        except Exception as error:  # the other ranks learn of it when they commit
            job.error = error
        if getattr(snapshot, "collective", False):
            self._share_error(job)
        if not self.asynchronous or final:
            self._write(job)
            return self._commit(job)
        self._job = job
        job.needs_commit = self.coordinator.world_size > 1 and not self.coordinator.threaded
        target = self._write if job.needs_commit else self._write_and_commit
        job.thread = threading.Thread(target=target, args=(job,), name=f"danling-save-{name}", daemon=True)
        atexit.register(job.thread.join)  # a process that ends without `close` still finishes the save
        job.thread.start()
        return None

    def _share_error(self, job: _Job) -> None:
        """Let no rank begin to write with others of which one cannot."""
        errors = self.coordinator.gather_objects(_describe(job.error))
        if job.error is None and any(errors):
            job.error = CheckpointError("another rank has failed")

    def _prepare(self, name: str, meta: Mapping[str, Any], force: bool) -> tuple[str, str, str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not force and self._is_saved(self.directory / name, meta):
            return "move", name, ""
        name = free_name(self.directory, name)
        staging = self.directory / f"{TEMPORARY}{name}-{secrets.token_hex(4)}"
        staging.mkdir()
        crash_point("save.staged")
        return "write", name, str(staging)

    def _is_saved(self, path: Path, meta: Mapping[str, Any]) -> bool:
        try:
            manifest = read_manifest(path)
            same = all(manifest.get(key) == meta.get(key) for key in BOUNDARY)
            evaluating = [facts.get("phase") == "evaluate" for facts in (manifest, meta)]
            return same and evaluating[0] == evaluating[1] and not verify(path, checksums=False)
        except CheckpointError:
            return False

    def _header(self, name: str, meta: Mapping[str, Any], aliases: tuple[str, ...]) -> dict[str, Any]:
        from .workspace import danling_version

        return {"danling_version": danling_version(), "name": name, **meta, "aliases": list(aliases)}

    def _write(self, job: _Job) -> None:
        try:
            if job.error is None:
                names = job.snapshot.write(job.staging)
                job.files = describe_files(job.staging, names or ())
                job.report = getattr(job.snapshot, "report", None)
        except Exception as error:
            job.error = error

    def _write_and_commit(self, job: _Job) -> None:
        self._write(job)
        self._commit(job)

    def _commit(self, job: _Job) -> CheckpointError | None:
        try:
            outcomes = self.coordinator.gather_objects((_describe(job.error), job.files, job.report))
            crash_point("save.barrier")
            errors = [f"rank {rank}: {text}" for rank, (text, *_) in enumerate(outcomes) if text is not None]
            if errors:
                if self.coordinator.is_main:
                    shutil.rmtree(job.staging, ignore_errors=True)
                self.coordinator.barrier()
                if job.error is not None and len(errors) == 1:
                    raise job.error
                raise CheckpointError("; ".join(errors))
            self._agree(self._rename, job, [files for _, files, _ in outcomes], [report for *_, report in outcomes])
            self._agree(self._move_aliases, job.name, job.aliases)
        except Exception as error:
            return self._failed(job.name, error)
        self._succeeded(job.name)
        return None

    def _rename(self, job: _Job, tables: Sequence[dict[str, Any]], reports: Sequence[Any]) -> None:
        staging = job.staging
        try:
            finish = getattr(job.snapshot, "finish", None)
            if finish is not None:
                finish(staging, reports)
            files = {name: entry for table in tables for name, entry in table.items()}
            for name, entry in files.items():
                if not (staging / name).exists():
                    raise CheckpointError(
                        f"{staging / name} was written by another rank and is not seen by the main process: all ranks "
                        "need the checkpoint directory on one common file system"
                    )
                if (staging / name).stat().st_size != entry["size"]:
                    raise CheckpointError(f"{staging / name} has changed since it was written")
            files |= describe_files(staging, [name for name in walk(staging) if name not in files])
            for folder in sorted({parent for name in files for parent in (staging / name).parents}, reverse=True):
                if folder == staging or staging in folder.parents:
                    fsync_dir(folder)
            existing = [info.manifest.get("wall_time") or 0.0 for info in list_checkpoints(self.directory)]
            wall_time = max(time.time(), *(moment + 1e-6 for moment in existing), 0.0)
            write_manifest(staging, {**job.header, "wall_time": wall_time}, files)
            os.rename(staging, self.directory / job.name)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        crash_point("save.rename")
        fsync_dir(self.directory)
        crash_point("save.parent_fsync")

    def _move_aliases(self, name: str, aliases: tuple[str, ...]) -> None:
        for alias in aliases:
            move(self.directory, alias, name)
        prune(self.directory, self.keep_latest_k, self._problem)

    def _agree(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run something on the main process and give every rank its result, or its error."""
        outcome: tuple[Any, str | None] = None, None
        cause: BaseException | None = None
        if self.coordinator.is_main:
            try:
                outcome = function(*args), None
            except Exception as error:
                cause, outcome = error, (None, _describe(error))
        result, text = self.coordinator.broadcast_object(outcome)
        if cause is not None:
            raise cause
        if text is not None:
            raise CheckpointError(f"on the main process: {text}")
        return result

    def _succeeded(self, name: str) -> None:
        self.health["saves"] += 1
        self.last_committed = self.directory / name
        self._news.append((self.last_committed, None))

    def _failed(self, name: str, error: BaseException) -> CheckpointError:
        text = _describe(error)
        failure = CheckpointError(f"checkpoint {name} could not be saved: {text}; earlier checkpoints are as they were")
        failure.__cause__ = error
        self.health["failures"] += 1
        self.health["first_error"] = self.health["first_error"] or text
        self.health["last_error"] = text
        self.logger.error("%s", failure)
        self._news.append((None, failure))
        return failure

    # ------------------------------------------------------------- waiting

    @property
    def busy(self) -> bool:
        """Whether an asynchronous save is on its way."""
        return self._job is not None and (
            self._job.needs_commit or self._job.thread is not None and self._job.thread.is_alive()
        )

    def boundary(self) -> None:
        """To be called at every boundary of training: commits what waits for that and tells about finished saves."""
        if self._job is None and not self._news:
            return
        if self._job is not None and self._job.needs_commit:
            start = time.monotonic()
            self._finish()
            self.health["stall_seconds"] += time.monotonic() - start
        self._tell()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing is on its way.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            False when the time was up first.
        """
        done = self._finish(timeout)
        self._tell()
        return done

    def close(self, timeout: float | None = None, *, commit: bool = True) -> bool:
        """Drain; a save that is still on its way when the time is up counts as failed.

        Args:
            timeout: see `drain`.
            commit: False gives up a save that would need the other ranks here, when they may not come.

        Returns:
            False when the time was up first.
        """
        job = self._job
        if job is not None and not commit and job.needs_commit:
            self._job = None
            if job.thread is not None:
                job.thread.join(timeout)
            self._failed(job.name, CheckpointError("the run ended before the ranks could commit it"))
            self._tell()
            return True
        done = self.drain(timeout)
        if not done and job is not None and job.thread is not None:
            atexit.unregister(job.thread.join)  # the time is up for the end of the process, too
            self._failed(job.name, TimeoutError(f"still being written after {timeout} s"))
            self._tell()
        return done

    def _finish(self, timeout: float | None = None) -> bool:
        job = self._job
        if job is None:
            return True
        if job.thread is not None:
            job.thread.join(timeout)
            if job.thread.is_alive():
                return False
            atexit.unregister(job.thread.join)
        self._job = None
        if job.needs_commit:
            self._commit(job)
        return True

    def _tell(self) -> None:
        while self._news:
            path, error = self._news.popleft()
            if error is not None:
                if self.on_error is not None:
                    self.on_error(error)
            elif path is not None and self.on_commit is not None:
                self.on_commit(path)

    # ------------------------------------------------------------- reading

    def list(self) -> builtins.list[CheckpointInfo]:
        """The committed checkpoints, oldest progress first."""
        return list_checkpoints(self.directory)

    def exists(self, name: str) -> bool:
        """Whether a checkpoint of this name is committed."""
        return (self.directory / name / MANIFEST).exists()

    def resolve(self, src: str | os.PathLike[str]) -> Path:
        """Turn an alias, name, pointer file, checkpoint or run directory into a directory; see `locate.resolve`."""
        return resolve(src, self.directory)

    def newest(self, kinds: Collection[str] = ("full",)) -> Path | None:
        """The checkpoint with the most progress that is whole; warns about damaged ones that it passes over."""
        return newest_checkpoint(self.directory, kinds, logger=self.logger)

    def verify(self, path: str | os.PathLike[str]) -> builtins.list[str]:
        """Compare a checkpoint with its manifest: one line per bad file; see `manifest.verify`."""
        return verify(path)

    def read_manifest(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a checkpoint says about itself; see `manifest.read_manifest`."""
        return read_manifest(path)

    # -------------------------------------------------------------- repair

    def repair(self) -> None:
        """Put right what a killed process left: staging and trash directories, aliases that lag behind.

        Every rank calls it, at the start, with the run's lock held.
        """
        if not self.load_only:
            self._agree(self._repair)

    def _repair(self) -> None:
        if not self.directory.is_dir():
            return
        sweep(self.directory, self._problem)
        checkpoints = [info for info in list_checkpoints(self.directory) if not verify(info.path, checksums=False)]
        by_name = {info.name: info for info in checkpoints}
        pointers = read_pointers(self.directory)
        wanted = {alias for info in checkpoints for alias in info.manifest.get("aliases") or ()}
        for alias in sorted(wanted | set(pointers)):
            target = by_name.get(pointers.get(alias, ""))
            later = [
                info
                for info in checkpoints
                if alias in (info.manifest.get("aliases") or ())
                and (target is None or _wall_time(info) > _wall_time(target))
            ]
            if alias == "latest" and target is None and not later:
                later = [info for info in checkpoints if info.kind == "full"]
            if later:
                name = max(later, key=_wall_time).name
                self.logger.info("checkpoint alias %s now names %s", alias, name)
                move(self.directory, alias, name)
            elif target is not None:
                link_alias(self.directory, alias, target.name)
            else:
                missing = read_pointer(self.directory, alias)
                self.logger.warning("checkpoint alias %s names %s, which is not there or damaged", alias, missing)
        prune(self.directory, self.keep_latest_k, self._problem)

    def _log_problem(self, service: str, error: BaseException) -> None:
        self.logger.warning("%s: %s", service, _describe(error))


def _wall_time(info: CheckpointInfo) -> float:
    return info.manifest.get("wall_time") or 0.0


def _describe(error: BaseException | None) -> str | None:
    if error is None:
        return None
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
