"""Metrics by name.

A name with a task, such as `multiclass_f1_score`, builds a descriptor for a container. A bare name, such as `accuracy`,
computes the value of one pair of predictions and targets at once.

`average="micro"` accuracy is the plain share of correct rows; the default, `"macro"`, is the mean over classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .counts import mcc
from .descriptor import MetricFunc
from .names import constructors
from .oneshot import ONE_SHOT
from .scores import ndcg, perplexity

_MADE = {**constructors(__name__), **ONE_SHOT}
globals().update(_MADE)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = sorted(["MetricFunc", "mcc", "ndcg", "perplexity", *_MADE])  # pyright: ignore[reportUnsupportedDunderAll]
