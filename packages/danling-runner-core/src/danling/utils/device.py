"""Moving nested data to a device."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any


def to_device(data: Any, device: Any, non_blocking: bool = False) -> Any:
    """Move tensors, and whatever else has a `.to`, to a device, inside containers of any depth.

    Lists, tuples, named tuples, dicts and dataclasses keep their type; other values are returned as they are.

    Args:
        data: what to move. It is not changed.
        device: anything that `.to` accepts.
        non_blocking: whether copies from pinned memory may overlap with what follows.

    Returns:
        The same structure on the device.

    Examples:
        >>> to_device({"name": "a", "ids": [1, 2]}, "cpu")
        {'name': 'a', 'ids': [1, 2]}
    """
    if isinstance(data, (str, bytes, int, float, type(None))):
        return data
    if hasattr(data, "to") and callable(data.to) and not isinstance(data, type):
        return data.to(device, non_blocking=True) if non_blocking else data.to(device)
    if isinstance(data, dict):
        return _refilled(data, {key: to_device(value, device, non_blocking) for key, value in data.items()})
    if isinstance(data, (list, tuple)):
        items = [to_device(item, device, non_blocking) for item in data]
        if type(data) is list:
            return items
        if type(data) is tuple:
            return tuple(items)
        if hasattr(data, "_make"):
            return data._make(items)
        if isinstance(data, list):
            return _refilled(data, items)
        return type(data)(items)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        moved = copy.copy(data)
        for field in dataclasses.fields(data):
            if hasattr(data, field.name):
                object.__setattr__(moved, field.name, to_device(getattr(data, field.name), device, non_blocking))
        return moved
    return data


def _refilled(container: Any, content: Any) -> Any:
    """Return a container of the same type, with the same attributes and new content."""
    if type(container) is dict:
        return content
    # A copy keeps what a constructor call would lose: a default factory, attributes, an unusual signature.
    fresh = copy.copy(container)
    if isinstance(fresh, dict):
        for key, value in content.items():
            fresh[key] = value
    else:
        fresh[:] = content
    return fresh
