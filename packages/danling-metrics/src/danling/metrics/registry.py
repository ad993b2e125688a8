"""`METRICS`: the factories by name."""

from __future__ import annotations

import difflib
from typing import Any

from chanfig import Registry

from .factories import binary_metrics, multiclass_metrics, multilabel_metrics, regression_metrics

_COUNTS = {"multiclass": "num_classes", "multilabel": "num_labels", "regression": "num_outputs"}


class MetricRegistry(Registry):
    """Builds a set of metrics by the name of a task.

    Examples:
        >>> METRICS.build("multiclass", num_classes=10, mode="online")
        OnlineMetrics(auroc, auprc, acc, f1, mcc)
        >>> METRICS.build({"type": "Binary"})
        GlobalMetrics(auroc, auprc, acc, f1, mcc)
    """

    def build(self, type: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Build the metrics of a task.

        Args:
            type: `"binary"`, `"multiclass"`, `"multilabel"` or `"regression"` in any case, or a mapping with the key
                `type` and options.
            *args: metrics in place of the default ones.
            **kwargs: options of the factory. `num_labels` is accepted for multiclass; `num_outputs` defaults to 1.

        Raises:
            ValueError: unknown type (the nearest names are shown), or a count that is missing, contradicts another or
                is not positive.
        """
        if isinstance(type, dict):
            kwargs = {**type, **kwargs}
            type = kwargs.pop("type", None)
        task = str(type).lower() if type is not None else ""
        if task not in self:
            near = difflib.get_close_matches(task, list(self), n=3, cutoff=0.4) or list(self)
            raise ValueError(f"unknown type of metrics {type!r}; nearest: {', '.join(near)}")
        counts = {k: kwargs.pop(k) for k in ("num_classes", "num_labels", "num_outputs") if kwargs.get(k) is not None}
        for key in ("num_classes", "num_labels", "num_outputs"):
            kwargs.pop(key, None)
        for key, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{key} must be a positive integer, got {count!r}")
        own = _COUNTS.get(task)
        if own is None:
            if any(count not in (1, 2) for count in counts.values()):
                raise ValueError(f"binary metrics have no {', '.join(counts)}")
            return self[task](*args, **kwargs)
        if task == "multiclass" and "num_classes" not in counts and "num_labels" in counts:
            counts = {"num_classes": counts.pop("num_labels"), **counts}
        if len(set(counts.values())) > 1:
            raise ValueError(f"conflicting counts: {', '.join(f'{k}={v}' for k, v in counts.items())}")
        if own not in counts and task == "regression" and not counts:
            counts[own] = 1
        if own not in counts:
            raise ValueError(f"{task} metrics need {own}")
        return self[task](counts[own], *args, **kwargs)


METRICS = MetricRegistry()
METRICS.register(binary_metrics, "binary")
METRICS.register(multiclass_metrics, "multiclass")
METRICS.register(multilabel_metrics, "multilabel")
METRICS.register(regression_metrics, "regression")
