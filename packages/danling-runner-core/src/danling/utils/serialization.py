"""Whether an object can be written as JSON."""

from __future__ import annotations

import json
from typing import Any


def is_json_serializable(obj: Any) -> bool:
    """Return whether `json.dumps(obj)` succeeds.

    Examples:
        >>> is_json_serializable({"loss": [0.1, None]}), is_json_serializable({"ids": {1, 2}})
        (True, False)
    """
    try:
        json.dumps(obj)
    except Exception:  # cycles, depth, unknown types, and whatever an object raises while it is looked at
        return False
    return True
