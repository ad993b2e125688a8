"""What identifies a run: the identity view of its configuration and the ids made from it.

Model, data and optimisation are inside; budget, resources, logging, cadence, directories and the layout over devices
are not, so a run can be extended, moved to other machines and resumed. All functions are pure, of plain mappings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from .aliases import canonical
from .configfile import plain
from .keys import CONSTRUCTOR_SECTIONS, KEYS, TOP_LEVEL, lookup


def flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted names; lists and empty mappings are leaves.

    Examples:
        >>> flatten({"optim": {"lr": 0.1}, "tags": ["a"], "model": {}})
        {'optim.lr': 0.1, 'tags': ['a'], 'model': {}}
    """
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def normalise(value: Any) -> Any:
    """Return a plain value in the one form in which equal values are written equally.

    Examples:
        >>> normalise([1e3, 0.001, float("inf")])
        [1000, 0.001, 'inf']
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [normalise(item) for item in value]
    if isinstance(value, dict):
        return {str(key): normalise(item) for key, item in value.items()}
    return value


def excluded(name: str, exclude: Collection[str]) -> bool:
    """Return whether a dotted name, or a section it stands in, is listed."""
    return any(name == item or name.startswith(f"{item}.") for item in exclude)


def identity_view(config: Mapping[str, Any], exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return the identity view of a validated configuration: sorted dotted names and normalised values.

    Keys of danling are left out when they are not part of the identity or have danling's own default, so that a key
    danling gains later moves no run. What the user added always stands.

    Args:
        config: a validated `RunnerConfig`, or the mapping read from a `runner.yaml`.
        exclude: dotted names of the user's own keys or sections to leave out.

    Examples:
        >>> identity_view({"seed": 1016, "epochs": 3, "optim": {"lr": 1e-3}, "model": {"width": 64.0}})
        {'model.width': 64, 'optim.lr': 0.001}
    """
    view: dict[str, Any] = {}
    exclude = {canonical(name) for name in exclude}
    for name, value in flatten(plain(config, "config")).items():
        top = name.split(".")[0]
        if excluded(name, exclude):
            continue
        if top in TOP_LEVEL and not _identifies(name, value):
            continue
        view[name] = normalise(value)
    return dict(sorted(view.items()))


def _identifies(name: str, value: Any) -> bool:
    key = lookup(name)
    if key is None:  # an argument of the optimizer or scheduler identifies; deepspeed, accelerate, ... do not
        return name.split(".")[0] in CONSTRUCTOR_SECTIONS and value != {}
    if not key.identity:
        return False
    is_default = name in KEYS and normalise(value) == normalise(key.default)
    return not is_default and value not in key.neutral


def canonical_json(value: Any) -> str:
    """Return the text an id is computed from: sorted keys, no spaces, all of Unicode as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def config_id(view: Mapping[str, Any]) -> str:
    """Return the id of a run: the first 12 hex digits of the SHA-256 of its identity view.

    Examples:
        >>> config_id({"optim.lr": 0.001})
        '9af5f3ce1e76'
    """
    return hashlib.sha256(canonical_json(view).encode()).hexdigest()[:12]


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted names that differ between two flat or nested mappings, with both values; None where absent.

    Examples:
        >>> differences({"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1})
        {'lr': (0.1, 0.2)}
    """
    left, right = flatten(plain(mine)), flatten(plain(other))
    names = sorted(left.keys() | right.keys())
    return {
        name: (left.get(name), right.get(name))
        for name in names
        if canonical_json(normalise(left.get(name))) != canonical_json(normalise(right.get(name)))
    }
