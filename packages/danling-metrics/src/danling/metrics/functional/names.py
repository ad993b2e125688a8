"""The constructors by name: one table of what exists for which task, and one function that builds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from .counts import RATIOS, BalancedAccuracy, CohenKappa, CountMetric, ExactMatchRatio, TopKAccuracy
from .descriptor import MetricFunc
from .regression import MOMENTS, Kendall, MomentMetric, Spearman
from .scores import Auprc, Auroc, CalibrationError, LogLossMetric

# Options that a metric takes beyond `name` and `ignore_index`, with their defaults, and how they are explained.
_OPTIONS = {
    "threshold": (0.5, "threshold: probability above which a prediction is positive."),
    "average": ("macro", 'average: `"micro"`, `"macro"`, `"weighted"`, or None for one value per class.'),
    "k": (1, "k: a target among the k highest scores counts as predicted."),
    "beta": (1.0, "beta: weight of recall against precision."),
    "zero_division": (0.0, "zero_division: value where the denominator is 0 although there is data."),
    "weights": (None, 'weights: None, `"linear"` or `"quadratic"` cost of a disagreement.'),
    "n_bins": (15, "n_bins: number of confidence bins."),
    "norm": ("l1", 'norm: `"l1"`, `"l2"` or `"max"`.'),
    "ignore_index": (-100, "ignore_index: target value that does not count, None for none."),
    "ignore_nan": (False, "ignore_nan: leave out rows whose target is NaN."),
    "multioutput": (
        "uniform_average",
        'multioutput: `"uniform_average"`, `"raw_values"` or `"variance_weighted"`.',
    ),
}
_WIDTHS = {
    "multiclass": ("num_classes", "num_classes: number of classes."),
    "multilabel": ("num_labels", "num_labels: number of labels."),
    "regression": ("num_outputs", "num_outputs: number of outputs."),
}
_ZERO = {"precision", "recall", "specificity", "f1_score", "fbeta_score", "jaccard_index", "iou"}
_ALL = ("binary", "multiclass", "multilabel")

# Suffix: (class, key, tasks, its own options)
_Row = tuple[Callable[..., MetricFunc], str, tuple[str, ...], dict[str, Any]]
_TABLE: dict[str, _Row] = {
    suffix: (
        partial(CountMetric, suffix),
        key,
        _ALL,
        ({"beta": 1.0} if suffix == "fbeta_score" else {}) | ({"zero_division": 0.0} if suffix in _ZERO else {}),
    )
    for suffix, (key, _, _) in RATIOS.items()
}
_TABLE |= {
    "balanced_accuracy": (BalancedAccuracy, "balanced_accuracy", _ALL, {}),
    "auroc": (Auroc, "auroc", _ALL, {}),
    "auprc": (Auprc, "auprc", _ALL, {}),
    "cohen_kappa": (CohenKappa, "cohen_kappa", _ALL[:2], {"weights": None}),
    "calibration_error": (CalibrationError, "calibration_error", _ALL[:2], {"n_bins": 15, "norm": "l1"}),
    "log_loss": (LogLossMetric, "log_loss", _ALL, {}),
    "top_k_accuracy": (TopKAccuracy, "top_k_accuracy", ("multiclass",), {"k": 5}),
    "exact_match": (ExactMatchRatio, "exact_match", ("multiclass", "multilabel"), {}),
}
_AVERAGED = {*RATIOS, "balanced_accuracy", "auroc", "auprc"}
_THRESHOLDED = {*RATIOS, "balanced_accuracy", "cohen_kappa", "exact_match"}
_REGRESSION: dict[str, tuple[Callable[..., MetricFunc], str, dict[str, Any]]] = {
    kind: (
        partial(MomentMetric, kind),
        key,
        {"multioutput": "uniform_average"} if kind in ("r2_score", "explained_variance") else {},
    )
    for kind, (key, _, _) in MOMENTS.items()
}
_REGRESSION |= {"spearman": (Spearman, "spearman", {}), "kendall": (Kendall, "kendall", {})}


def constructors(module: str) -> dict[str, Callable[..., MetricFunc]]:
    """Return every constructor by its public name, as functions of `module`."""
    made: dict[str, Callable[..., MetricFunc]] = {}
    for suffix, (cls, key, tasks, own) in _TABLE.items():
        for task in tasks:
            options = dict(own)
            if task != "binary" and suffix in _AVERAGED:
                options["average"] = "macro"
            if task != "multiclass" and suffix in _THRESHOLDED:
                options["threshold"] = 0.5
            if task == "multiclass" and (suffix in RATIOS or suffix == "balanced_accuracy"):
                options["k"] = 1
            options["ignore_index"] = -100
            made[f"{task}_{suffix}"] = _constructor(f"{task}_{suffix}", cls, key, task, options, module)
    made["binary_f1"] = made["binary_f1_score"]
    made["binary_fbeta"] = made["binary_fbeta_score"]
    for name, (cls, key, own) in _REGRESSION.items():
        options = {**own, "ignore_nan": False}
        made[name] = _constructor(name, cls, key, "regression", options, module)
    return made


def _constructor(
    name: str, cls: Callable[..., MetricFunc], key: str, task: str, options: dict[str, Any], module: str
) -> Callable[..., MetricFunc]:
    """Return the function that builds one descriptor, with its own signature and docstring."""
    width = _WIDTHS.get(task)
    parameters = []
    if width:
        default = 1 if task == "regression" else inspect.Parameter.empty
        parameters.append(inspect.Parameter(width[0], inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
    for option, value in {**options, "name": key}.items():
        parameters.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=value))
    signature = inspect.Signature(parameters)

    def build(*args: Any, **kwargs: Any) -> MetricFunc:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{name}{signature}: {e}") from None
        bound.apply_defaults()
        return cls(task=task, **bound.arguments)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__signature__ = signature  # type: ignore[attr-defined]
    call = f"{name}({3 if width and task != 'regression' else ''})"
    lines = [width[1]] if width else []
    lines += [_OPTIONS[option][1] for option in options] + ["name: key in results."]
    about = (inspect.getdoc(cls.func if isinstance(cls, partial) else cls) or "").split("\n\n")[0]
    if isinstance(cls, partial):
        title = name.split("_", 1)[1].replace("_", " ") if task != "regression" else name.replace("_", " ")
        about = f"{title[0].upper()}{title[1:]}. {about}"
    arguments = "\n    ".join(lines)
    build.__doc__ = (
        f"Return the descriptor `{key}` for {task} data.\n\n{about}\n\nArgs:\n    {arguments}\n\n"
        f"Examples:\n    >>> {call}.name\n    {key!r}\n"
    )
    return build
