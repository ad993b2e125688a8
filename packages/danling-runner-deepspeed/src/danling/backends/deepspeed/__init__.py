"""`DeepSpeedRunner`: danling's runner with a DeepSpeed engine that owns wrapping, gradients and the update.

Importing this module does not import deepspeed. `usable` is what `stack: auto` asks before it chooses DeepSpeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danling.backends.deepspeed.usable import usable

if TYPE_CHECKING:
    from danling.backends.deepspeed.runner import DeepSpeedRunner

__all__ = ["DeepSpeedRunner", "usable"]


def __getattr__(name: str) -> Any:
    if name == "DeepSpeedRunner":
        from danling.backends.deepspeed.runner import DeepSpeedRunner

        return DeepSpeedRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
