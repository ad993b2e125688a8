"""Whether Accelerate can be used here."""

from __future__ import annotations

import importlib.util


def usable() -> tuple[bool, str]:
    """Tell whether Accelerate is installed.

    Returns:
        A pair: the verdict, and the reason in words (empty when usable).

    Example:
        >>> verdict, reason = usable()
        >>> verdict or "pip install" in reason
        True
    """
    if importlib.util.find_spec("accelerate") is None:
        return False, "accelerate is not installed: pip install danling[accelerate]"
    return True, ""
