"""`AccelerateRunner`: danling's runner with Hugging Face Accelerate as its engine.

Importing this module does not import accelerate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danling.backends.accelerate.usable import usable

if TYPE_CHECKING:
    from danling.backends.accelerate.runner import AccelerateRunner

__all__ = ["AccelerateRunner", "usable"]


def __getattr__(name: str) -> Any:
    if name == "AccelerateRunner":
        from danling.backends.accelerate.runner import AccelerateRunner

        return AccelerateRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
