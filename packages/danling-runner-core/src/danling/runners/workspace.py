"""Where a run lives and what it is called: ids, directories, the lock, what is kept about each attempt."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from .atomic import fsync_dir, write_yaml
from .errors import ConfigError
from .lock import LOCK_NAME, RunLock
from .provenance import GitState, git_state, source_directory, write_metadata

NAMESPACE = uuid.UUID("4d0c8a6b-60a5-5d31-9a0c-3f1c4cf8f0aa")
"""The namespace of all uuids that danling gives to experiments and runs."""


def new_timestamp() -> str:
    """The present UTC time as `YYYYMMDD-HHMMSS-ffffff`, which sorts by time."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


class Workspace:
    """The names and places of one run.

    The run directory `{root}/{lineage}/{experiment}/{name}-{config_id}` depends on the configuration alone: neither
    code, clock nor number of processes moves it. Nothing is written before `lock`.

    Args:
        root: `workspace_root`.
        lineage: groups experiments.
        experiment: normally one commit's worth of runs.
        config_id: hash of the identity view.
        name: of the run; None is the name of the experiment.
        git: state of the code, None without git.
        timestamp: UTC start of the attempt; None is now.
        checkpoint_dir_name: relative to the run directory.
        part: a folder in the run directory for everything but checkpoints; replica groups share those.

    Examples:
        >>> workspace = Workspace("experiments", "lin", "exp", config_id="0ff59a7a0b77")
        >>> workspace.dir.as_posix(), workspace.id
        ('experiments/lin/exp/exp-0ff59a7a0b77', '0ff59a7a0b77')
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        lineage: str,
        experiment: str,
        *,
        config_id: str,
        name: str | None = None,
        git: GitState | None = None,
        timestamp: str | None = None,
        checkpoint_dir_name: str = "checkpoints",
        part: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.lineage = lineage
        self.experiment = experiment
        self.config_id = config_id
        self.name = name or experiment
        self.git = git
        self.timestamp = timestamp or new_timestamp()
        self.checkpoint_dir_name = checkpoint_dir_name
        self.part = part
        self._lock = RunLock(self.dir)

    @classmethod
    def from_config(cls, config: Any, *, source: type | None = None, timestamp: str | None = None) -> Workspace:
        """Make the workspace of a validated configuration.

        Args:
            config: a `RunnerConfig`.
            source: the runner's class; the repository that holds its file gives the `code_id`.
            timestamp: of the attempt, when another process has chosen it.
        """
        from .identity import config_id

        return cls(
            config.workspace_root,
            config.lineage,
            config.experiment,
            config_id=config_id(config.identity()),
            name=config.name,
            git=git_state(source_directory(source)) if source is not None else None,
            timestamp=timestamp,
            checkpoint_dir_name=config.checkpoint.dir_name,
            part=f"replica-{config.ft.replica_id}" if config.ft.enabled and config.ft.replica_id else None,
        )

    # ----------------------------------------------------------------- ids

    @property
    def run_id(self) -> str:
        """The same as `config_id`."""
        return self.config_id

    @property
    def code_id(self) -> str | None:
        """Short revision of the code, with a mark and hash when it was changed since; None without git."""
        return self.git.code_id if self.git is not None else None

    @property
    def experiment_id(self) -> str | None:
        """The same as `code_id`."""
        return self.code_id

    @property
    def id(self) -> str:
        """`{code_id}-{config_id}`, or `config_id` without git."""
        return f"{self.code_id}-{self.config_id}" if self.code_id else self.config_id

    @cached_property
    def experiment_uuid(self) -> uuid.UUID:
        """uuid5 over `code_id`."""
        return uuid.uuid5(NAMESPACE, self.code_id or "")

    @cached_property
    def run_uuid(self) -> uuid.UUID:
        """uuid5 of `experiment_uuid` over `config_id`."""
        return uuid.uuid5(self.experiment_uuid, self.config_id)

    @cached_property
    def uuid(self) -> uuid.UUID:
        """uuid5 of `run_uuid` over `id`."""
        return uuid.uuid5(self.run_uuid, self.id)

    def header(self) -> dict[str, Any]:
        """What names the run inside its files: `name`, `id`, `uuid`, `config_id`, `code_id`, `timestamp`."""
        return {
            "name": self.name,
            "id": self.id,
            "uuid": str(self.uuid),
            "config_id": self.config_id,
            "code_id": self.code_id,
            "timestamp": self.timestamp,
        }

    # -------------------------------------------------------------- places

    @property
    def dir(self) -> Path:
        """The run directory, or the part of it that is this process's."""
        return self._base / (self.part or "")

    @property
    def _base(self) -> Path:
        return self.root / self.lineage / self.experiment / f"{self.name}-{self.config_id}"

    @property
    def checkpoint_dir(self) -> Path:
        """Where checkpoints are."""
        return self._base / self.checkpoint_dir_name

    @property
    def log_file(self) -> Path:
        """The log of this attempt."""
        return self.dir / "logs" / f"{self.timestamp}.log"

    @property
    def metadata_dir(self) -> Path:
        """What is kept about this attempt."""
        return self.dir / "metadata" / self.timestamp

    # ---------------------------------------------------------------- lock

    @property
    def locked(self) -> bool:
        """Whether this process holds the lock of the run."""
        return self._lock.held

    def lock(self) -> None:
        """Make the run directory and hold its lock until `release` or the end of the process.

        Raises:
            RunBusyError: another live process runs here; names host, pid and start time.
            ConfigError: the directory cannot be made or written.
        """
        try:
            self._lock.acquire()
        except OSError as error:
            raise ConfigError(
                f"workspace_root: cannot write to the run directory {self.dir}: {error.strerror or error}; "
                "choose another workspace_root or fix its permissions"
            ) from error

    def release(self) -> None:
        """Give the lock up."""
        self._lock.release()

    def set_aside(self) -> Path:
        """Rename the run directory to `{dir}.{timestamp}`, deleting nothing, and lock a new one in its place.

        Returns:
            Where the old directory is now.

        Raises:
            RunBusyError: another process took the new directory in the meantime.
        """
        held = self._lock.held
        target = self.dir.with_name(f"{self.dir.name}.{self.timestamp}")
        count = 0
        while target.exists():
            count += 1
            target = self.dir.with_name(f"{self.dir.name}.{self.timestamp}.{count}")
        os.rename(self.dir, target)
        fsync_dir(target.parent)
        self._lock.release()
        self._lock = RunLock(self.dir)
        if held:
            self.lock()
        return target

    def has_checkpoints(self) -> bool:
        """Whether the run directory holds a committed checkpoint."""
        return any(self.checkpoint_dir.glob("*/manifest.json"))

    def check_dir(self, action: str = "warn") -> bool:
        """Report a run directory that is not empty.

        Args:
            action: `warn`, `raise` or `ignore`.

        Returns:
            Whether it is empty or missing.

        Raises:
            FileExistsError: it is not empty, with `raise`.
            ValueError: another action.
        """
        if action not in ("warn", "raise", "ignore"):
            raise ValueError(f"action must be warn, raise or ignore, got {action!r}")
        try:
            empty = all(name == LOCK_NAME for name in os.listdir(self.dir))
        except FileNotFoundError:
            return True
        if empty or action == "ignore":
            return empty
        message = f"the run directory {self.dir} is not empty"
        if action == "raise":
            raise FileExistsError(message)
        warnings.warn(message, stacklevel=2)
        return False

    # --------------------------------------------------------------- files

    def write_config(self, config: Mapping[str, Any], **facts: Any) -> None:
        """Write `runner.yaml`: the configuration, and beside it `danling_version`, `config_id` and further facts.

        Args:
            config: plain or chanfig mapping with the full configuration.
            facts: the chosen `stack`, the drawn `seed`.
        """
        write_yaml(self.dir / "runner.yaml", self.config_content(config, **facts))

    def config_content(self, config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """The content of `runner.yaml`."""
        return {**config, **facts, "danling_version": danling_version(), "config_id": self.config_id}

    def write_metadata(
        self, config: Mapping[str, Any], identity: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> list[tuple[str, Exception]]:
        """Write `metadata/{timestamp}/`; see `danling.runners.provenance.write_metadata`."""
        return write_metadata(self.metadata_dir, git=self.git, config=config, identity=identity, extra=extra)


def danling_version() -> str:
    """The version of danling that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("danling-runner-core")
    except PackageNotFoundError:
        return "unknown"
