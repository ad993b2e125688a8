"""Meters and metrics whose value never depends on how the data was cut into batches or ranks.

Names are resolved on first use, so that importing the package costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AverageMeter": "meters",
    "AverageMeters": "meters",
    "GlobalMetrics": "containers",
    "METRICS": "registry",
    "MetricFunc": "functional.descriptor",
    "MetricMeter": "stream",
    "MetricMeters": "stream",
    "MetricState": "state",
    "MetricSyncError": "errors",
    "MultiTaskMetrics": "multitask",
    "NonFinitePredictionWarning": "errors",
    "OnlineMetrics": "online",
    "RoundDict": "round_dict",
    "StreamMetrics": "stream",
    "UndefinedMetricWarning": "errors",
    "binary_metrics": "factories",
    "multiclass_metrics": "factories",
    "multilabel_metrics": "factories",
    "regression_metrics": "factories",
}
_MODULES = ("functional", "preprocess")

__all__ = [
    "METRICS",
    "AverageMeter",
    "AverageMeters",
    "GlobalMetrics",
    "MetricFunc",
    "MetricMeter",
    "MetricMeters",
    "MetricState",
    "MetricSyncError",
    "MultiTaskMetrics",
    "NonFinitePredictionWarning",
    "OnlineMetrics",
    "RoundDict",
    "StreamMetrics",
    "UndefinedMetricWarning",
    "binary_metrics",
    "functional",
    "multiclass_metrics",
    "multilabel_metrics",
    "preprocess",
    "regression_metrics",
]

if TYPE_CHECKING:
    from . import functional, preprocess
    from .containers import GlobalMetrics
    from .errors import MetricSyncError, NonFinitePredictionWarning, UndefinedMetricWarning
    from .factories import binary_metrics, multiclass_metrics, multilabel_metrics, regression_metrics
    from .functional.descriptor import MetricFunc
    from .meters import AverageMeter, AverageMeters
    from .multitask import MultiTaskMetrics
    from .online import OnlineMetrics
    from .registry import METRICS
    from .round_dict import RoundDict
    from .state import MetricState
    from .stream import MetricMeter, MetricMeters, StreamMetrics


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
