"""Files that are replaced whole or not at all, and JSON/YAML that stays readable when a loss is not a number."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

NONFINITE = "nonfinite"
NONFINITE_VALUES = "nonfinite_values"


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make what was created, renamed or removed in a directory durable, where directories can be synced."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:  # Windows opens no directories
        if os.name == "nt":
            return
        raise
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(
    path: str | os.PathLike[str], data: bytes, *, durable: bool = True, before_rename: Callable[[], None] | None = None
) -> None:
    """Replace a file atomically: temporary sibling, fsync, rename, fsync of the directory.

    A reader sees the old content or the new one; after a crash the file holds one of the two. When anything fails the
    temporary file is removed and the old content stands.

    Args:
        path: the file; its directory must exist.
        data: the new content.
        durable: False leaves out both fsyncs: still atomic for readers, but a power failure may bring the old one back.
        before_rename: called when the temporary file is complete.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = True) -> None:
    """Replace a text file atomically (UTF-8); see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


def write_json(
    path: str | os.PathLike[str],
    obj: Any,
    *,
    indent: int | None = 2,
    durable: bool = True,
    before_rename: Callable[[], None] | None = None,
) -> None:
    """Replace a JSON file atomically; see `dump_json` for what may be in it and `write_bytes` for how it is written."""
    text = dump_json(obj, indent=indent) + "\n"
    write_bytes(path, text.encode("utf-8"), durable=durable, before_rename=before_rename)


def write_yaml(path: str | os.PathLike[str], obj: Any, *, durable: bool = True) -> None:
    """Replace a YAML file atomically; the same content as `write_json`, in the order given."""
    from .configfile import dump_yaml

    text = dump_yaml(_strict(obj))
    write_bytes(path, text.encode("utf-8"), durable=durable)


def read_json(path: str | os.PathLike[str], *, restore: bool = True) -> Any:
    """Read a JSON file written by `write_json`.

    Args:
        path: the file.
        restore: put NaN and infinities back where `"nonfinite"` says they were, and take that list out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is not JSON; names the file.
    """
    text = Path(path).read_bytes()
    try:
        obj = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return restore_nonfinite(obj) if restore else obj


def read_yaml(path: str | os.PathLike[str], *, restore: bool = True) -> Any:
    """Read a YAML file written by `write_yaml`; the counterpart of `read_json`."""
    import yaml

    from .configfile import parse_yaml

    try:
        obj = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    return restore_nonfinite(obj) if restore else obj


def dump_json(obj: Any, *, indent: int | None = None) -> str:
    r"""Return JSON text that every parser reads: floats in full, no NaN or Infinity.

    Non-finite numbers become `null`; in a mapping their paths (JSON pointers) and values are listed beside it, so that
    `read_json` gives back the same object.

    Args:
        obj: mappings, sequences, sets, strings, numbers, None, paths, enumerations, and scalars with `item()`.
        indent: as in `json.dumps`.

    Raises:
        TypeError: something in it is of another type; names its path.
        ValueError: a non-finite number in something that is not a mapping, which has no room for the list.

    Examples:
        >>> dump_json({"loss": float("nan"), "lr": 0.1})
        '{"loss": null, "lr": 0.1, "nonfinite": ["/loss"], "nonfinite_values": ["nan"]}'
        >>> restore_nonfinite(json.loads(_))
        {'loss': nan, 'lr': 0.1}
    """
    return json.dumps(_strict(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def restore_nonfinite(obj: Any) -> Any:
    """Put back the non-finite numbers that `dump_json` took out, and remove their list."""
    if not isinstance(obj, dict) or NONFINITE_VALUES not in obj:
        return obj
    values = obj.pop(NONFINITE_VALUES)
    for pointer, value in zip(obj.pop(NONFINITE), values, strict=True):
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:])
        node: Any = obj
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = float(value)
    return obj


def plain(obj: Any) -> Any:
    """Return a copy made of dict, list, str, int, float, bool and None alone; types as in `dump_json`.

    Examples:
        >>> plain({1: (Path("a"), {2})})
        {'1': ['a', [2]]}
    """
    return _plain(obj, "", None)


def _strict(obj: Any) -> Any:
    bad: list[tuple[str, float]] = []
    result = _plain(obj, "", bad)
    if bad:
        if not isinstance(result, dict):
            raise ValueError(f"{bad[0][1]} at {bad[0][0] or '/'}: only a mapping can list its non-finite numbers")
        result[NONFINITE] = [path for path, _ in bad]
        result[NONFINITE_VALUES] = [str(value) for _, value in bad]
    return result


def _plain(obj: Any, path: str, bad: list[tuple[str, float]] | None) -> Any:
    if isinstance(obj, Enum):
        return _plain(obj.value, path, bad)
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, str):
        return str(obj)
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        value = float(obj)
        if bad is not None and not math.isfinite(value):
            bad.append((path, value))
            return None
        return value
    if isinstance(obj, Mapping):
        return {
            (str(key.value) if isinstance(key, Enum) else str(key)): _plain(
                value, f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}", bad
            )
            for key, value in obj.items()
        }
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, (set, frozenset)):
        obj = sorted(obj, key=repr)
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return [_plain(value, f"{path}/{index}", bad) for index, value in enumerate(obj)]
    if hasattr(obj, "item") and getattr(obj, "ndim", 0) == 0:
        return _plain(obj.item(), path, bad)
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist(), path, bad)
    raise TypeError(f"{path or '/'}: cannot store {type(obj).__name__} as JSON")
