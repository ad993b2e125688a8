"""`TorchRunner`: danling's runner on one process or on DistributedDataParallel."""

from __future__ import annotations

from .runner import TorchRunner

__all__ = ["TorchRunner"]


def usable() -> tuple[bool, str]:
    """Whether this stack works here, and why."""
    return True, "torch is installed"
