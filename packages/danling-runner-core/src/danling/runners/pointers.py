"""Aliases of checkpoints: a text file `<alias>.pointer` decides, a symlink `<alias>` beside it is for people."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from .atomic import fsync_dir, write_text
from .crash import crash_point

SUFFIX = ".pointer"
NUMBERED = re.compile(r"(epoch|step)-(\d+)(?:\.(\d+))?")
RESERVED = re.compile(r"(?:(?:epoch|step)-\d+|seed|final)(?:\.\d+)?")


def check_alias(alias: str) -> None:
    """Refuse what cannot be an alias.

    Raises:
        ValueError: the text is empty, has a path separator or a leading dot, or is the name of a checkpoint.
    """
    if not alias or alias.startswith(".") or "/" in alias or "\\" in alias or alias.endswith(SUFFIX):
        raise ValueError(f"a checkpoint alias is a plain name without path separators, got {alias!r}")
    if RESERVED.fullmatch(alias):
        raise ValueError(f"{alias!r} names a checkpoint and cannot be an alias; choose another name")


def read_pointer(directory: Path, alias: str) -> str | None:
    """The name of the checkpoint that an alias stands for; None when there is no readable pointer."""
    try:
        name = (directory / f"{alias}{SUFFIX}").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name and os.path.basename(name) == name else None


def read_pointers(directory: Path) -> dict[str, str]:
    """All aliases with the names they stand for."""
    found = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        if not path.name.startswith("."):
            name = read_pointer(directory, path.name.removesuffix(SUFFIX))
            if name is not None:
                found[path.name.removesuffix(SUFFIX)] = name
    return found


def move(directory: Path, alias: str, name: str) -> None:
    """Let an alias stand for a committed checkpoint.

    Raises:
        OSError: the pointer cannot be written; the old one stands.
    """
    if read_pointer(directory, alias) != name:
        write_text(directory / f"{alias}{SUFFIX}", f"{name}\n")
    if alias in ("latest", "best"):
        crash_point(f"alias.{alias}")
    link(directory, alias, name)


def link(directory: Path, alias: str, name: str) -> None:
    """Make the symlink of an alias agree with its pointer, where the file system has symlinks."""
    path = directory / alias
    try:
        if path.is_symlink():
            if os.readlink(path) == name:
                return
        elif path.exists():  # somebody's directory: theirs
            return
        temporary = directory / f".{alias}.{secrets.token_hex(4)}.tmp"
        os.symlink(name, temporary, target_is_directory=True)
        try:
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(directory)
    except (OSError, NotImplementedError):
        return
