"""Ready sets of metrics per task, and the registry that builds them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import functional as F
from .containers import GlobalMetrics, as_metric, flatten
from .functional.descriptor import MetricFunc
from .online import OnlineMetrics


def _containers() -> dict[str, Callable[..., Any]]:
    from .stream import StreamMetrics

    return {"global": GlobalMetrics, "stream": StreamMetrics, "online": OnlineMetrics}


def _build(
    defaults: Callable[[], list[MetricFunc]],
    metrics: tuple[Any, ...],
    named: Mapping[str, Any],
    mode: str,
    **options: Any,
) -> Any:
    containers = _containers()
    if mode not in containers:
        raise ValueError(f"mode must be one of {', '.join(map(repr, containers))}, got {mode!r}")
    chosen: dict[str, Any] = {}
    positional = list(flatten(metrics))
    for metric in positional or defaults():
        name, metric = metric if isinstance(metric, tuple) else (None, metric)
        if not callable(metric):
            raise TypeError(
                f"metrics are descriptors or callables, got {metric!r}; options such as average, mode and ignore_nan "
                "are keyword-only"
            )
        metric = as_metric(metric) if mode != "stream" or isinstance(metric, MetricFunc) else metric
        name = name or getattr(metric, "name", None) or type(metric).__name__
        if name in chosen:
            raise ValueError(f"two metrics are called {name!r}; name one of them with a keyword")
        chosen[name] = metric
    chosen |= named
    return containers[mode]({**chosen}, **options)


def binary_metrics(
    *metrics: Any,
    mode: str = "global",
    ignore_index: int | None = -100,
    threshold: float = 0.5,
    from_logits: bool | str = "auto",
    device: Any = None,
    distributed: bool = True,
    group: Any = None,
    preprocess: Any = None,
    **named: Any,
) -> Any:
    """Return AUROC, AUPRC, accuracy, F1 and MCC for binary data.

    Args:
        *metrics: used in place of the default ones.
        mode: `"global"` (exact), `"online"` (exact counts, binned rankings, constant memory) or `"stream"` (means of
            per-batch values).
        ignore_index: target value that does not count, for the default metrics.
        threshold: probability above which a prediction is positive, for the default metrics.
        from_logits, device, distributed, group, preprocess: as for `GlobalMetrics`.
        **named: added to the others, or in place of the one of the same name.

    Examples:
        >>> import torch
        >>> metrics = binary_metrics()
        >>> metrics.update(torch.tensor([2.0, -1.0, 0.5, -0.3]), torch.tensor([1, 0, 1, 1]))
        >>> metrics.avg.round(4)
        RoundDict({'auroc': 1.0, 'auprc': 1.0, 'acc': 0.75, 'f1': 0.8, 'mcc': 0.5774})
    """
    common: dict[str, Any] = {"ignore_index": ignore_index}

    def defaults() -> list[MetricFunc]:
        return [
            F.binary_auroc(**common),
            F.binary_auprc(**common),
            F.binary_accuracy(threshold=threshold, **common),
            F.binary_f1_score(threshold=threshold, **common),
            F.mcc(task="binary", threshold=threshold, **common),
        ]

    options = {"from_logits": from_logits, "device": device, "distributed": distributed, "group": group}
    return _build(defaults, metrics, named, mode, preprocess=preprocess, **options)


def multiclass_metrics(
    num_classes: int,
    *metrics: Any,
    average: str | None = "macro",
    channel_dim: int | None = None,
    mode: str = "global",
    ignore_index: int | None = -100,
    from_logits: bool | str = "auto",
    device: Any = None,
    distributed: bool = True,
    group: Any = None,
    preprocess: Any = None,
    **named: Any,
) -> Any:
    """Return AUROC, AUPRC, accuracy, F1 and MCC for multiclass data.

    Args:
        num_classes: number of classes.
        *metrics: used in place of the default ones.
        average: how the default metrics average over classes. `"micro"` accuracy is the plain share of correct rows.
        channel_dim: the dim of `input` that holds the classes, where shapes do not tell.
        mode, ignore_index, from_logits, device, distributed, group, preprocess, **named: as for `binary_metrics`.

    Examples:
        >>> import torch
        >>> metrics = multiclass_metrics(3, mode="online", average="micro")
        >>> metrics.update(torch.eye(3)[[0, 1, 2, 1]], torch.tensor([0, 1, 2, 2]))
        >>> metrics.avg.acc
        0.75
    """
    common: dict[str, Any] = {"ignore_index": ignore_index}

    def defaults() -> list[MetricFunc]:
        return [
            F.multiclass_auroc(num_classes, average=average, **common),
            F.multiclass_auprc(num_classes, average=average, **common),
            F.multiclass_accuracy(num_classes, average=average, **common),
            F.multiclass_f1_score(num_classes, average=average, **common),
            F.mcc(task="multiclass", num_classes=num_classes, **common),
        ]

    _positive("num_classes", num_classes)
    options = {"from_logits": from_logits, "device": device, "distributed": distributed, "group": group}
    return _build(defaults, metrics, named, mode, preprocess=preprocess, channel_dim=channel_dim, **options)


def multilabel_metrics(
    num_labels: int,
    *metrics: Any,
    average: str | None = "macro",
    mode: str = "global",
    ignore_index: int | None = -100,
    threshold: float = 0.5,
    from_logits: bool | str = "auto",
    device: Any = None,
    distributed: bool = True,
    group: Any = None,
    preprocess: Any = None,
    **named: Any,
) -> Any:
    """Return AUROC, AUPRC, accuracy, F1 and MCC for multilabel data.

    Args:
        num_labels: number of labels.
        *metrics: used in place of the default ones.
        average: how the default metrics average over labels.
        mode, ignore_index, threshold, from_logits, device, distributed, group, preprocess, **named: as for
            `binary_metrics`.

    Examples:
        >>> import torch
        >>> metrics = multilabel_metrics(2)
        >>> metrics.update(torch.tensor([[0.9, 0.2], [0.3, 0.6]]), torch.tensor([[1, 0], [0, 1]]))
        >>> metrics.avg.acc
        1.0
    """
    common: dict[str, Any] = {"ignore_index": ignore_index}

    def defaults() -> list[MetricFunc]:
        counted = {"threshold": threshold, **common}
        return [
            F.multilabel_auroc(num_labels, average=average, **common),
            F.multilabel_auprc(num_labels, average=average, **common),
            F.multilabel_accuracy(num_labels, average=average, **counted),
            F.multilabel_f1_score(num_labels, average=average, **counted),
            F.mcc(task="multilabel", num_labels=num_labels, **counted),
        ]

    _positive("num_labels", num_labels)
    options = {"from_logits": from_logits, "device": device, "distributed": distributed, "group": group}
    return _build(defaults, metrics, named, mode, preprocess=preprocess, **options)


def regression_metrics(
    num_outputs: int = 1,
    *metrics: Any,
    ignore_nan: bool = True,
    mode: str = "global",
    device: Any = None,
    distributed: bool = True,
    group: Any = None,
    preprocess: Any = None,
    **named: Any,
) -> Any:
    """Return Pearson, Spearman, R², MSE and RMSE; online, MAE takes the place of Spearman.

    Args:
        num_outputs: number of outputs.
        *metrics: used in place of the default ones.
        ignore_nan: leave out rows whose target is NaN, for the default metrics.
        mode, device, distributed, group, preprocess, **named: as for `binary_metrics`.

    Examples:
        >>> import torch
        >>> metrics = regression_metrics(mode="online")
        >>> metrics.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> metrics.avg.round(4)
        RoundDict({'pearson': 0.982, 'mae': 0.3333, 'r2': 0.5, 'mse': 0.3333, 'rmse': 0.5774})
    """
    common: dict[str, Any] = {"num_outputs": num_outputs, "ignore_nan": ignore_nan}

    def defaults() -> list[MetricFunc]:
        second = F.mae if mode == "online" else F.spearman
        return [make(**common) for make in (F.pearson, second, F.r2_score, F.mse, F.rmse)]

    _positive("num_outputs", num_outputs)
    options = {"device": device, "distributed": distributed, "group": group}
    return _build(defaults, metrics, named, mode, preprocess=preprocess, **options)


def _positive(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {count!r}; metrics come after it")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
