"""Which checkpoints stay, and how the others go; decided from what is on disk, so that restarts forget nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from .atomic import fsync_dir
from .crash import crash_point
from .errors import CheckpointError
from .locate import CheckpointInfo, list_checkpoints
from .manifest import verify
from .pointers import NUMBERED, read_pointers

TEMPORARY = ".tmp-"
TRASH = ".trash-"


def expired(directory: Path, keep: int) -> list[CheckpointInfo]:
    """List the checkpoints that may go: `epoch-*` and `step-*` beyond the `keep` newest that no alias names.

    Args:
        directory: the checkpoint directory.
        keep: how many stay; 0 keeps all. A damaged checkpoint neither counts nor goes.
    """
    if keep < 1:
        return []
    named = set(read_pointers(directory).values())
    whole = [info for info in list_checkpoints(directory) if info.is_numbered and _complete(info)]
    return [info for info in whole[:-keep] if info.name not in named]


def prune(directory: Path, keep: int, problem: Callable[[str, BaseException], None]) -> None:
    """Remove the expired checkpoints: rename to `.trash-*`, then delete.

    Args:
        directory: the checkpoint directory.
        keep: see `expired`.
        problem: told about each that could not be removed; never an error.
    """
    for info in expired(directory, keep):
        try:
            trash = directory / f"{TRASH}{info.name}-{secrets.token_hex(4)}"
            os.rename(info.path, trash)
            fsync_dir(directory)
            crash_point("retain.trash")
            shutil.rmtree(trash)
            crash_point("retain.remove")
        except OSError as error:
            problem("retention", error)


def sweep(directory: Path, problem: Callable[[str, BaseException], None]) -> list[str]:
    """Remove what a killed process left: staging and trash directories, temporary files. Needs the run's lock.

    Returns:
        The names removed.
    """
    removed = []
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        name = entry.name
        try:
            if name.startswith((TEMPORARY, TRASH)) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif name.startswith(".") and name.endswith(".tmp") and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            else:
                continue
            removed.append(name)
        except OSError as error:
            problem("retention", error)
    return removed


def free_name(directory: Path, name: str) -> str:
    """Return the name, or the first of `name.1`, `name.2`, ... that is not taken."""
    base = name
    count = 0
    match = NUMBERED.fullmatch(name)
    if match and match[3]:
        base, count = f"{match[1]}-{match[2]}", int(match[3])
    while (directory / name).exists() or (directory / name).is_symlink():
        count += 1
        name = f"{base}.{count}"
    return name


def _complete(info: CheckpointInfo) -> bool:
    try:
        return not verify(info.path, checksums=False)
    except CheckpointError:
        return False
