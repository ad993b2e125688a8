"""The manifest of a checkpoint: what it is, and the size and checksum of every file in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .atomic import dump_json, fsync_file, write_json
from .crash import crash_point
from .errors import CheckpointError, CheckpointNotFoundError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
KINDS = ("full", "model", "seed")


def walk(directory: Path) -> Iterator[str]:
    """Yield the files below a checkpoint, relative, with forward slashes, sorted; the manifest is not one of them."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() or path.is_symlink():
            name = path.relative_to(directory).as_posix()
            if name != MANIFEST and not (name.startswith(f".{MANIFEST}.") and name.endswith(".tmp")):
                yield name


def checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Make files durable and return their table: path → size and SHA-256.

    Args:
        directory: of the checkpoint.
        names: relative paths.
    """
    table = {}
    folders = set()
    for name in names:
        path = directory / name
        crash_point("save.file")
        fsync_file(path)
        crash_point("save.file_fsync")
        table[name] = {"size": path.stat().st_size, "sha256": checksum(path)}
        folders.add(path.parent)
    return table


def write_manifest(
    directory: Path, header: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the manifest, the last file of a checkpoint: temporary file, fsync, rename, fsync of the directory.

    Args:
        directory: of the checkpoint, in which all files are complete.
        header: what the checkpoint is; see `CheckpointStore.save`.
        files: the table of `describe_files`, of all ranks.

    Returns:
        The manifest.
    """
    manifest = {"format_version": FORMAT_VERSION, **header, "files": dict(sorted(files.items()))}
    stored = json.loads(dump_json(manifest))
    stored["checksum"] = _own_checksum(stored)
    write_json(directory / MANIFEST, stored, before_rename=lambda: crash_point("save.manifest_tmp"))
    crash_point("save.manifest")
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint.

    Raises:
        CheckpointNotFoundError: there is no such directory, or no manifest in it.
        CheckpointError: the manifest is damaged, or of a format this version does not know.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = f"{directory} has no {MANIFEST}" if directory.is_dir() else f"{directory} does not exist"
        raise CheckpointNotFoundError(f"not a checkpoint: {what}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is damaged or unreadable: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is not a manifest of danling")
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {directory} has format version {manifest['format_version']}, written by danling "
            f"{manifest.get('danling_version')}; this version reads up to {FORMAT_VERSION}: upgrade danling"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(f"checkpoint {directory}: the list of files in {MANIFEST} is damaged")
    if manifest.pop("checksum", None) != _own_checksum(manifest):
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is damaged: it differs from its own checksum")
    from .atomic import restore_nonfinite

    try:
        return restore_nonfinite(manifest)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is damaged: {error}") from error


def verify(directory: str | os.PathLike[str], *, checksums: bool = True) -> list[str]:
    """Compare a checkpoint with its manifest.

    Args:
        directory: of the checkpoint.
        checksums: False looks at existence and size alone.

    Returns:
        One line per bad file, empty when the checkpoint is whole.

    Raises:
        CheckpointNotFoundError, CheckpointError: see `read_manifest`.
    """
    directory = Path(directory)
    problems = []
    for name, entry in read_manifest(directory)["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                problems.append(f"{name}: {size} bytes, {entry['size']} expected")
            elif checksums and checksum(path) != entry["sha256"]:
                problems.append(f"{name}: its checksum differs: the content has changed since it was written")
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
    return problems


def require_whole(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Verify a checkpoint and return its manifest.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError: it does not verify; names the files.
    """
    manifest = read_manifest(directory)
    problems = verify(directory)
    if problems:
        raise CheckpointError(f"checkpoint {directory} is damaged: " + "; ".join(problems))
    return manifest


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the manifest itself, as sorted JSON, without the entry that holds it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    parts = name.split("/")
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and not os.path.isabs(name)
        and ".." not in parts
        and "" not in parts
    )
