"""Whether the parallel stack can be used here."""

from __future__ import annotations

import os


def usable() -> tuple[bool, str]:
    """Tell whether this process is one of several.

    Returns:
        A pair: the verdict, and the reason in words (empty when usable).

    Example:
        >>> verdict, reason = usable()
        >>> verdict or "torchrun" in reason
        True
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True, ""
    return False, "one process: start several with torchrun, or use the torch stack"
