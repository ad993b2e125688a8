"""Which number of a results row is the score, and whether more of it is better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

SMALLER_IS_BETTER = frozenset(
    "loss error err mae mse rmse msle mape smape nll bce perplexity ppl wer cer mer ter eer kl brier ece fid distance "
    "cost latency".split()
)
VALIDATION_NAMES = ("val", "validate", "validation", "dev")


def score_direction(name: str, mode: str = "auto", higher_is_better: bool | None = None) -> str:
    """Decide whether the smallest or the largest score is the best one.

    Args:
        name: the score's name, such as `loss` or `val/top5_error`.
        mode: `min` or `max` decide at once; `auto` asks the metric, then the name.
        higher_is_better: what the metric declares about itself; None if nothing.

    Returns:
        `"min"` or `"max"`.

    Raises:
        ValueError: `mode` is something else.

    Examples:
        >>> score_direction("top5_error"), score_direction("binary_cross_entropy"), score_direction("accuracy")
        ('min', 'min', 'max')
        >>> score_direction("loss", "max"), score_direction("mcc", higher_is_better=False)
        ('max', 'min')
    """
    mode = mode.lower()
    if mode in ("min", "max"):
        return mode
    if mode != "auto":
        raise ValueError(f"score_mode must be auto, min or max, got {mode!r}")
    if higher_is_better is not None:
        return "max" if higher_is_better else "min"
    lowered = name.lower()
    if lowered.endswith("cross_entropy") or SMALLER_IS_BETTER.intersection(re.split(r"[./_-]", lowered)):
        return "min"
    return "max"


def is_better(score: float | None, reference: float | None, direction: str) -> bool:
    """Tell whether `score` is strictly better than `reference`; a missing or NaN score is worse than any other.

    Examples:
        >>> is_better(0.2, 0.3, "min"), is_better(0.3, 0.3, "max"), is_better(float("nan"), None, "min")
        (True, False, False)
    """
    if score is None or math.isnan(score):
        return False
    if reference is None or math.isnan(reference):
        return True
    return score < reference if direction == "min" else score > reference


def find_score(row: Mapping[str, Any], split: str | None, name: str) -> float | None:
    """Look a score up in a row `{split: {metric: value}}`; None when it is not there or not one number.

    Args:
        row: one entry of the results.
        split: the split it is read from.
        name: a metric's name, or a dotted path into nested metrics.

    Examples:
        >>> find_score({"val": {"loss": 0.5, "task": {"f1": 0.25}}}, "val", "task.f1")
        0.25
    """
    node: Any = row.get(split) if split is not None else None
    if not isinstance(node, Mapping):
        return None
    if name in node:
        node = node[name]
    else:
        for part in name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
    if isinstance(node, Mapping) or isinstance(node, (str, bytes, list, tuple)):
        return None
    try:
        return float(node)
    except (TypeError, ValueError):
        return None


def choose_score_split(splits: Iterable[str]) -> str | None:
    """Return the split the score is read from by default: the validation split, else the first; None without any.

    Examples:
        >>> choose_score_split(["test", "dev"]), choose_score_split(["test"]), choose_score_split([])
        ('dev', 'test', None)
    """
    names = list(splits)
    return next((name for name in VALIDATION_NAMES if name in names), names[0] if names else None)
