"""Values of one pair of predictions and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .names import constructors

_NAMES = (
    "accuracy",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "calibration_error",
    "cohen_kappa",
    "exact_match",
    "f1_score",
    "fbeta_score",
    "hamming_loss",
    "iou",
    "jaccard_index",
    "log_loss",
    "precision",
    "recall",
    "specificity",
    "top_k_accuracy",
)
_DESCRIPTORS = constructors("danling.metrics.functional")


def _evaluate(
    suffix: str,
    input: Any,
    target: Any,
    task: str | None,
    num_classes: int | None,
    num_labels: int | None,
    mask: Any,
    from_logits: bool | str,
    ignore_index: int | None,
    options: dict[str, Any],
) -> Any:
    from ..containers import GlobalMetrics

    if num_classes is not None and num_labels is not None:
        raise ValueError("give num_classes or num_labels, not both")
    if task is None:
        task = "multiclass" if num_classes is not None else "multilabel" if num_labels is not None else "binary"
    build = _DESCRIPTORS.get(f"{task}_{suffix}")
    if build is None:
        tasks = [name.split("_", 1)[0] for name in _DESCRIPTORS if name.split("_", 1)[1:] == [suffix]]
        raise ValueError(f"{suffix} is defined for {', '.join(tasks)}, not for task={task!r}")
    width = {"multiclass": num_classes, "multilabel": num_labels}.get(task)
    if width is None and task != "binary":
        raise ValueError(f"task={task!r} needs {'num_classes' if task == 'multiclass' else 'num_labels'}")
    channel_dim = options.pop("channel_dim", None)
    metric = build(*([width] if width is not None else []), ignore_index=ignore_index, **options)
    container = GlobalMetrics(metric, from_logits=from_logits, channel_dim=channel_dim, distributed=False)
    container.update(input, target, mask=mask)
    return container.average()[metric.name]


def _one_shot(suffix: str) -> Callable[..., Any]:
    def function(
        input: Any,
        target: Any,
        *,
        task: str | None = None,
        num_classes: int | None = None,
        num_labels: int | None = None,
        mask: Any = None,
        from_logits: bool | str = "auto",
        ignore_index: int | None = -100,
        **kw: Any,
    ) -> Any:
        return _evaluate(suffix, input, target, task, num_classes, num_labels, mask, from_logits, ignore_index, kw)

    function.__name__ = function.__qualname__ = suffix
    function.__module__ = "danling.metrics.functional"
    function.__doc__ = f"""Return the {suffix.replace("_", " ")} of one pair of predictions and targets.

    Args:
        input: scores or labels: a tensor, a NestedTensor, or a sequence.
        target: targets, likewise.
        task: `"binary"`, `"multiclass"` or `"multilabel"`; if None, `num_classes` means multiclass, `num_labels`
            multilabel, and neither binary.
        num_classes: number of classes.
        num_labels: number of labels.
        mask: bool, True where data is (dense inputs).
        from_logits: whether scores are logits; `"auto"`: if and only if a valid score lies outside [0, 1].
        ignore_index: target value that does not count.
        **kw: options of the metric, such as `average` or `threshold`, and `channel_dim`.

    Returns:
        A float, or a tensor with one value per class.
    """
    return function


ONE_SHOT = {suffix: _one_shot(suffix) for suffix in _NAMES}
