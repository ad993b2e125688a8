"""Finding checkpoints on disk: by directory, alias, pointer file or run, and the newest one that is whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, CheckpointNotFoundError
from .manifest import MANIFEST, read_manifest, verify
from .pointers import NUMBERED, SUFFIX, read_pointer

_log = logging.getLogger(__name__)
PHASES = {"evaluate": 0, "train": 1, "done": 2}


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        path: its directory.
        manifest: what it says about itself.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    @property
    def kind(self) -> str:
        """`full`, `model` or `seed`."""
        return self.manifest.get("kind", "full")

    @property
    def order(self) -> tuple[int, int, int, int, float]:
        """Sorts by progress: update, micro-batch, phase; then by suffix and time of commit."""
        facts = self.manifest
        match = NUMBERED.fullmatch(self.name)
        return (
            facts.get("global_step") or 0,
            facts.get("micro_step") or 0,
            PHASES.get(facts.get("phase") or "train", 1),
            int(match[3] or 0) if match else 0,
            facts.get("wall_time") or 0.0,
        )

    @property
    def size(self) -> int:
        """Bytes in its files."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    @property
    def is_numbered(self) -> bool:
        """Whether it is one of `epoch-*` and `step-*`."""
        return NUMBERED.fullmatch(self.name) is not None


def list_checkpoints(directory: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """List the committed checkpoints of a checkpoint directory, oldest progress first.

    Directories without a readable manifest are left out.
    """
    found = []
    for entry in _entries(directory):
        if entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            found.append(CheckpointInfo(Path(entry.path), read_manifest(entry.path)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda info: info.order)


def newest_checkpoint(
    directory: str | os.PathLike[str],
    kinds: Collection[str] = ("full",),
    *,
    logger: logging.Logger | None = None,
) -> Path | None:
    """Return the checkpoint with the most progress that is whole, whatever the aliases say.

    Args:
        directory: the checkpoint directory.
        kinds: which kinds count.
        logger: warned about each checkpoint that is newer but damaged.

    Returns:
        Its directory; None when no checkpoint is whole.
    """
    logger = logger or _log
    for path, reason in _unreadable(directory):
        logger.warning("passed over checkpoint %s: %s", path, reason)
    for info in reversed(list_checkpoints(directory)):
        if info.kind not in kinds:
            continue
        try:
            problems = verify(info.path)
        except CheckpointError as error:
            problems = [str(error)]
        if not problems:
            return info.path
        logger.warning("passed over checkpoint %s, which is damaged: %s", info.path, "; ".join(problems))
    return None


def resolve(src: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Path:
    """Turn whatever names a checkpoint into its directory.

    Args:
        src: a checkpoint directory, an alias, the name of a checkpoint, a pointer file, or a run directory (its newest
            checkpoint that is whole; one with weights alone when there is no other).
        directory: checkpoint directory in which bare names are looked up; None takes paths alone.

    Returns:
        The directory, not verified unless it was searched for.

    Raises:
        CheckpointNotFoundError: nothing there; says what was looked at.
        CheckpointError: there is something, but it is no checkpoint.
    """
    text = os.fspath(src)
    candidates = [Path(text).expanduser()]
    if directory is not None and os.path.basename(text) == text:
        candidates.insert(0, Path(directory) / text)
    for path in candidates:
        found = _resolve_path(path)
        if found is not None:
            return found
    looked = " and ".join(str(path) for path in candidates)
    names = [info.name for info in list_checkpoints(directory)] if directory is not None else []
    here = f"; {directory} holds {', '.join(names)}" if names else ""
    raise CheckpointNotFoundError(f"no checkpoint at {looked}{here}")


def _resolve_path(path: Path) -> Path | None:
    if path.suffix == SUFFIX and path.is_file():
        return _follow(path.parent, path.name.removesuffix(SUFFIX))
    if (path.parent / f"{path.name}{SUFFIX}").is_file():  # before the symlink of that name: the pointer decides
        return _follow(path.parent, path.name)
    if not path.is_dir():
        if path.exists():
            raise CheckpointError(f"{path} is a file, not a checkpoint directory")
        return None
    if (path / MANIFEST).exists():
        return path
    inner = path / _checkpoint_dir_name(path)
    for folder in (inner, path):
        found = newest_checkpoint(folder) or newest_checkpoint(folder, ("model", "seed"))
        if found is not None:
            return found
    raise CheckpointNotFoundError(
        f"{path} is neither a checkpoint (no {MANIFEST}) nor a directory with a checkpoint that is whole"
    )


def _follow(directory: Path, alias: str) -> Path:
    for _ in range(10):  # the pointer may move, and its old target go, between the two looks
        name = read_pointer(directory, alias)
        if name is None:
            raise CheckpointError(f"{directory / (alias + SUFFIX)} names no checkpoint")
        if (directory / name / MANIFEST).exists():
            return directory / name
        if read_pointer(directory, alias) == name:
            break
    raise CheckpointNotFoundError(f"{directory / (alias + SUFFIX)} names {name}, which does not exist")


def _checkpoint_dir_name(run: Path) -> str:
    from .configfile import parse_yaml

    try:
        return str(parse_yaml((run / "runner.yaml").read_text(encoding="utf-8"))["checkpoint"]["dir_name"])
    except Exception:  # no such file, or not ours: the default name is as good a guess as any
        return "checkpoints"


def _entries(directory: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(directory), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unreadable(directory: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    found = []
    for entry in _entries(directory):
        if NUMBERED.fullmatch(entry.name) and not entry.is_symlink() and entry.is_dir():
            try:
                read_manifest(entry.path)
            except CheckpointError as error:
                found.append((Path(entry.path), str(error)))
    return found
