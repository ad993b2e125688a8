"""The parts of deep-learning work that everybody rewrites, under one name.

``import danling as dl`` loads nothing; each name below comes from its package on first use:

- `danling.tensors`: ``NestedTensor``, ``PNTensor``, ``tensor``;
- `danling.metrics`: meters, metric containers, ``METRICS``;
- `danling.optim`: ``OPTIMIZERS``, ``SCHEDULERS``, ``LRScheduler``, ``OptimizerStep``;
- `danling.runners`: ``Runner``, ``RunnerConfig`` (also ``Config``), the concrete runners and the errors;
- `danling.utils`: ``save``, ``load``, ``catch``, ``debug`` and the other helpers.

A piece that is not installed raises an ``ImportError`` naming the ``pip install`` that brings it.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)

_PIECES = {
    "tensors": ("danling-tensors", ("NestedTensor", "PNTensor", "tensor")),
    "metrics": (
        "danling-metrics",
        (
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
        ),
    ),
    "optim": (
        "danling-optim",
        ("OPTIMIZERS", "SCHEDULERS", "LRScheduler", "OptimizerContainer", "OptimizerStep", "OptimizerStepResult"),
    ),
    "runners": (
        "danling-runner-core",
        (
            "AccelerateRunner",
            "BaseRunner",
            "CheckpointError",
            "CheckpointNotFoundError",
            "CheckpointStore",
            "ConfigError",
            "DeepSpeedRunner",
            "ParallelRunner",
            "Results",
            "ResumeError",
            "RunBusyError",
            "Runner",
            "RunnerConfig",
            "RunnerMode",
            "RunnerState",
            "StackError",
            "Supervisor",
            "TorchRunner",
            "Workspace",
            "on_local_main_process",
            "on_main_process",
            "read_metrics",
            "stacks",
        ),
    ),
    "utils": (
        "danling-runner-core",
        (
            "catch",
            "debug",
            "ensure_dir",
            "flexible_decorator",
            "is_json_serializable",
            "load",
            "load_pandas",
            "method_cache",
            "save",
            "to_device",
        ),
    ),
}
_HOME = {name: piece for piece, (_, names) in _PIECES.items() for name in names}
_HOME["Config"] = "runners"
_RENAMED = {"Config": "RunnerConfig"}
_NOT_STARRED = {"AccelerateRunner", "DeepSpeedRunner", "ParallelRunner", "TorchRunner"}

__all__ = sorted({*_HOME, *_PIECES} - _NOT_STARRED)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("danling")
    if name in _PIECES:
        return _piece(name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_piece(_HOME[name]), _RENAMED.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _piece(name: str) -> Any:
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(f"{module} is not installed: pip install {_PIECES[name][0]}", name=module) from None
