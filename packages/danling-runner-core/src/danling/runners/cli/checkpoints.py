"""Checkpoints as the command names and shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import locate, pointers
from ..errors import CheckpointError, CheckpointNotFoundError
from ..manifest import MANIFEST, verify
from .main import CommandError
from .run_files import RunFiles, is_run


def checkpoint_dir(files: RunFiles) -> Path:
    """Where the run keeps its checkpoints."""
    section = files.config.get("checkpoint")
    name = section.get("dir_name") if isinstance(section, dict) else None
    return files.dir / (name or "checkpoints")


def list_checkpoints(files: RunFiles) -> list[dict[str, Any]]:
    """Committed checkpoints, oldest first, with size in bytes and the aliases that name them."""
    root = checkpoint_dir(files)
    aliases: dict[str, list[str]] = {}
    for alias, name in pointers.read_pointers(root).items():
        aliases.setdefault(name, []).append(alias)
    return [
        {
            "name": info.name,
            "kind": info.kind,
            **{key: info.manifest.get(key) for key in ("global_step", "micro_step", "epoch", "phase", "score")},
            "size": info.size,
            "aliases": aliases.get(info.name, []),
        }
        for info in locate.list_checkpoints(root)
    ]


def find_checkpoint(path: str) -> Path:
    """The checkpoint that a directory, alias, pointer file or run directory names.

    Raises:
        CommandError: there is none.
    """
    try:
        return locate.resolve(path)
    except CheckpointError as error:
        raise CommandError(str(error)) from error


def find_all(path: str) -> list[Path]:
    """The checkpoint that ``path`` names, or everything that should be one below a run or checkpoint directory.

    Raises:
        CommandError: there is none.
    """
    directory = Path(path)
    if is_run(directory):
        directory = checkpoint_dir(RunFiles(directory))
    elif not directory.is_dir() or directory.is_symlink() or (directory / MANIFEST).exists():
        return [find_checkpoint(path)]
    entries = directory.iterdir() if directory.is_dir() else ()
    found = [e for e in entries if e.is_dir() and not e.is_symlink() and not e.name.startswith(".")]
    found.sort(key=lambda entry: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry.name)])
    if not found:
        raise CommandError(f"no checkpoint at {path}")
    return found


def check(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each.

    Raises:
        CommandError: there is no such directory.
    """
    try:
        return verify(checkpoint)
    except CheckpointNotFoundError as error:
        if not checkpoint.is_dir():
            raise CommandError(str(error)) from error
        return [str(error)]
    except CheckpointError as error:
        return [str(error)]
