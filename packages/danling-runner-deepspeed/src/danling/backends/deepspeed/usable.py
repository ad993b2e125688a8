"""Whether DeepSpeed can drive this machine."""

from __future__ import annotations

import importlib.util


def usable() -> tuple[bool, str]:
    """Tell whether DeepSpeed is installed and has an accelerator to drive.

    Returns:
        A pair: the verdict, and the reason in words (empty when usable). Neither deepspeed nor, when deepspeed is
        absent, torch is imported.

    Example:
        >>> verdict, reason = usable()
        >>> verdict or len(reason) > 0
        True
    """
    if importlib.util.find_spec("deepspeed") is None:
        return False, "deepspeed is not installed: pip install danling[deepspeed]"
    import torch

    if not torch.accelerator.is_available():
        return False, "no accelerator: choose it with --stack deepspeed"
    return True, ""
