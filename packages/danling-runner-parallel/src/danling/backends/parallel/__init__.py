"""`ParallelRunner`: danling's runner over replicate, shard, context, pipeline, tensor and expert axes.

Importing this module does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danling.backends.parallel.topology import AXES, DOMAINS, ParallelTopology
from danling.backends.parallel.usable import usable

if TYPE_CHECKING:
    from danling.backends.parallel.context import ParallelContext
    from danling.backends.parallel.runner import ParallelRunner

__all__ = ["AXES", "DOMAINS", "ParallelContext", "ParallelRunner", "ParallelTopology", "usable"]

_LAZY = {"ParallelContext": "context", "ParallelRunner": "runner"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
