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
from typing import TYPE_CHECKING, Any

__path__ = extend_path(__path__, __name__)

if TYPE_CHECKING:
    from .metrics import METRICS as METRICS
    from .metrics import AverageMeter as AverageMeter
    from .metrics import AverageMeters as AverageMeters
    from .metrics import GlobalMetrics as GlobalMetrics
    from .metrics import MetricFunc as MetricFunc
    from .metrics import MetricMeter as MetricMeter
    from .metrics import MetricMeters as MetricMeters
    from .metrics import MetricState as MetricState
    from .metrics import MetricSyncError as MetricSyncError
    from .metrics import MultiTaskMetrics as MultiTaskMetrics
    from .metrics import NonFinitePredictionWarning as NonFinitePredictionWarning
    from .metrics import OnlineMetrics as OnlineMetrics
    from .metrics import RoundDict as RoundDict
    from .metrics import StreamMetrics as StreamMetrics
    from .metrics import UndefinedMetricWarning as UndefinedMetricWarning
    from .optim import OPTIMIZERS as OPTIMIZERS
    from .optim import SCHEDULERS as SCHEDULERS
    from .optim import LRScheduler as LRScheduler
    from .optim import OptimizerContainer as OptimizerContainer
    from .optim import OptimizerStep as OptimizerStep
    from .optim import OptimizerStepResult as OptimizerStepResult
    from .runners import BaseRunner as BaseRunner
    from .runners import CheckpointError as CheckpointError
    from .runners import CheckpointNotFoundError as CheckpointNotFoundError
    from .runners import CheckpointStore as CheckpointStore
    from .runners import ConfigError as ConfigError
    from .runners import Results as Results
    from .runners import ResumeError as ResumeError
    from .runners import RunBusyError as RunBusyError
    from .runners import Runner as Runner
    from .runners import RunnerConfig as Config  # noqa: F401
    from .runners import RunnerConfig as RunnerConfig
    from .runners import RunnerMode as RunnerMode
    from .runners import RunnerState as RunnerState
    from .runners import StackError as StackError
    from .runners import Supervisor as Supervisor
    from .runners import Workspace as Workspace
    from .runners import on_local_main_process as on_local_main_process
    from .runners import on_main_process as on_main_process
    from .runners import read_metrics as read_metrics
    from .runners import stacks as stacks
    from .tensors import NestedTensor as NestedTensor
    from .tensors import PNTensor as PNTensor
    from .tensors import tensor as tensor
    from .utils import catch as catch
    from .utils import debug as debug
    from .utils import ensure_dir as ensure_dir
    from .utils import flexible_decorator as flexible_decorator
    from .utils import is_json_serializable as is_json_serializable
    from .utils import load as load
    from .utils import load_pandas as load_pandas
    from .utils import method_cache as method_cache
    from .utils import save as save
    from .utils import to_device as to_device

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
