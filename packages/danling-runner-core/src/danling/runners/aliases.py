"""Older names of configuration keys, and lasting synonyms of sections."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "platform": "stack",
    "epoch_end": "epochs",
    "step_end": "steps",
    "iter_end": "steps",
    "save_interval": "checkpoint.interval",
    "project_root": "workspace_root",
    "experiments_root": "workspace_root",
    "checkpoint_dir": "checkpoint.dir_name",
    "checkpoint_dir_name": "checkpoint.dir_name",
    "index_set": "score_split",
    "index": "score_name",
    "score_metric": "score_name",
    "experiment_name": "experiment",
    "run_name": "name",
}
SYNONYMS = {"sched": "scheduler", "optimizer": "optim"}


def warn_renamed(old: str) -> None:
    """Tell the user what an older key is called now, at the line outside of danling and chanfig that used it."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("danling.runners", "chanfig")):
        frame, stacklevel = frame.f_back, stacklevel + 1
    message = f"the configuration key {old!r} is now called {RENAMED[old]!r}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def canonical(name: Any) -> Any:
    """Return a dotted name with a synonym at its head replaced.

    Examples:
        >>> canonical("sched.type"), canonical("seed")
        ('scheduler.type', 'seed')
    """
    if not isinstance(name, str):
        return name
    head, dot, rest = name.partition(".")
    return SYNONYMS.get(head, head) + dot + rest


def conflict(old: str, value: Any, new: str, current: Any) -> str:
    """Return the line that reports two names of one key with different values."""
    return f"{old}: {value!r} contradicts {new}: {current!r}; they are two names of one key, give {new!r} alone"


def translate(layer: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """Return a mapping of configuration keys with today's names, and a line for each contradiction in it.

    Args:
        layer: what somebody gave: constructor arguments, a file, or a command line; dotted and nested names both work.

    Examples:
        >>> translate({"sched": {"type": "cosine"}})
        ({'scheduler': {'type': 'cosine'}}, [])
    """
    result: dict[Any, Any] = {}
    problems: list[str] = []
    renamed = []
    for name, value in layer.items():
        if name in RENAMED:
            renamed.append((name, value))
            continue
        new = canonical(name)
        if new in result and isinstance(result[new], Mapping) and isinstance(value, Mapping):
            clashes = differing(result[new], value, "")
            problems += [
                conflict(f"{_other_name(name)}{path}", given, f"{new}{path}", kept) for path, kept, given in clashes
            ]
            result[new] = overlay(result[new], value)
        elif new in result and result[new] != value:
            problems.append(conflict(_other_name(name), value, new, result[new]))
        else:
            result[new] = value
    for name, value in renamed:
        warn_renamed(name)
        new = RENAMED[name]
        found, current = find(result, new)
        if found and current != value:
            problems.append(conflict(name, value, new, current))
        elif not found:
            place(result, new, value)
    return result, problems


def _other_name(name: str) -> str:
    """Return the name with a synonym at its head, which it may have already."""
    head, dot, rest = name.partition(".")
    return next((synonym for synonym, section in SYNONYMS.items() if section == head), head) + dot + rest


def differing(mine: Mapping[Any, Any], other: Mapping[Any, Any], path: str) -> list[tuple[str, Any, Any]]:
    """Return (path, mine, other) for every leaf that both mappings hold with different values."""
    found: list[tuple[str, Any, Any]] = []
    for key in mine.keys() & other.keys():
        if isinstance(mine[key], Mapping) and isinstance(other[key], Mapping):
            found += differing(mine[key], other[key], f"{path}.{key}")
        elif mine[key] != other[key]:
            found.append((f"{path}.{key}", mine[key], other[key]))
    return sorted(found, key=lambda item: item[0])


def overlay(mine: Mapping[Any, Any], other: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return both mappings as one, where `other` wins."""
    result = dict(mine)
    for key, value in other.items():
        both = isinstance(result.get(key), Mapping) and isinstance(value, Mapping)
        result[key] = overlay(result[key], value) if both else value
    return result


def find(layer: Mapping[Any, Any], name: str) -> tuple[bool, Any]:
    """Return whether a layer holds a dotted name, written flat or nested, and its value."""
    if name in layer:
        return True, layer[name]
    head, dot, rest = name.partition(".")
    if dot and isinstance(layer.get(head), Mapping):
        return find(layer[head], rest)
    return False, None


def place(layer: dict[Any, Any], name: str, value: Any) -> None:
    """Put a value under a dotted name; a section on the way is copied, not changed."""
    head, dot, rest = name.partition(".")
    if not dot:
        layer[name] = value
    elif isinstance(layer.get(head), Mapping):
        layer[head] = section = dict(layer[head])
        place(section, rest, value)
    else:  # no such section yet, or a value where a section should be, which validation reports
        layer[name] = value
