"""`TorchRunner`: danling's runner on one process or on DistributedDataParallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runner import TorchRunner

__all__ = ["TorchRunner"]


def usable() -> tuple[bool, str]:
    """Whether this stack works here, and why."""
    return True, "torch is installed"


def __getattr__(name: str) -> Any:
    # Imported on first use: other modules of this package, such as the conformance suite, need no runner and no torch.
    if name == "TorchRunner":
        from .runner import TorchRunner

        return TorchRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
