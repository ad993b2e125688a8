"""The numbers in nested metrics, by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | bool]:
    """Numbers by dotted name; what is not a scalar is left out.

    Examples:
        >>> flatten({"loss": 0.5, "f1": {"macro": 1, "per_class": [0.0, 1.0]}, "note": "x"})
        {'loss': 0.5, 'f1.macro': 1}
    """
    flat: dict[str, float | int | bool] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
            continue
        if not isinstance(value, bool | int | float) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, bool | int | float):
            flat[name] = value
    return flat
