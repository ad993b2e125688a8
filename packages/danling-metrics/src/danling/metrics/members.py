"""Foreign metric objects as members of `MetricMeters`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAN = float("nan")


class ObjectMember:
    """A member with `update`, `compute` and `reset` of its own, such as a `torchmetrics.Metric`."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.last: tuple[Tensor, Tensor] | None = None
        self.count = 0
        self.n = 0

    def update(self, preds: Tensor, targets: Tensor) -> None:
        """Forward the valid rows."""
        self.last = (preds.clone(), targets.clone())
        self.n = len(targets) if targets.dim() else 1
        if self.n:
            self.metric.update(preds, targets)
            self.count += self.n

    def value(self) -> Any:
        """Return the value of the last batch, computed by a clone."""
        if not self.n or self.last is None:
            return _NAN
        clone = copy.deepcopy(self.metric)
        clone.reset()
        clone.update(*self.last)
        return _plain(clone.compute())

    def average(self) -> Any:
        """Return the value over all data; the object synchronises itself."""
        return _plain(self.metric.compute()) if self.count else _NAN

    def reset(self) -> None:
        self.metric.reset()
        self.last, self.count, self.n = None, 0, 0


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().reshape(()) if value.numel() == 1 else value.detach()
    return value


def object_state(metric: Any) -> dict[str, Any]:
    """Return the state of a foreign metric object as tensors and plain values."""
    if hasattr(metric, "metric_state"):  # torchmetrics: its state_dict holds only what was marked persistent
        state = {
            k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in metric.metric_state.items()
        }
        return {"state": state, "updates": metric.update_count}
    if hasattr(metric, "state_dict"):
        return {"dict": metric.state_dict()}
    return {
        "vars": {k: v for k, v in vars(metric).items() if isinstance(v, (int, float, str, bool, Tensor, type(None)))}
    }


def load_object_state(metric: Any, saved: Mapping[str, Any]) -> None:
    """Restore what `object_state` returned."""
    if "state" in saved:
        metric.reset()
        for name, value in saved["state"].items():
            setattr(metric, name, [t.clone() for t in value] if isinstance(value, list) else value.clone())
        metric._update_count = saved["updates"]
    elif "dict" in saved:
        metric.load_state_dict(saved["dict"])
    else:
        vars(metric).update(saved["vars"])
