"""Meters and metrics whose value never depends on how the data was cut into batches or ranks.

Names are resolved on first use, so that importing the package costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AverageMeter": "meters",
    "AverageMeters": "meters",
    "MetricSyncError": "errors",
    "NonFinitePredictionWarning": "errors",
    "RoundDict": "round_dict",
    "UndefinedMetricWarning": "errors",
}
_MODULES = ()

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .errors import MetricSyncError, NonFinitePredictionWarning, UndefinedMetricWarning
    from .meters import AverageMeter, AverageMeters
    from .round_dict import RoundDict


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
