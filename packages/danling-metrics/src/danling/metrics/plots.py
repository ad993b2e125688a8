"""Confusion matrix, ROC and precision-recall curves as matplotlib figures.

Figures are built without pyplot, so nothing is shown and no global state changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ranking import ClassRanking, Ranking

KINDS = ("confusion_matrix", "roc", "pr")
_MAX_CURVES = 10
_MAX_POINTS = 1000


def plot_metrics(
    container: Any,
    kind: str | None,
    class_names: Sequence[str] | None,
    normalize: str | None,
    ax: Any,
    sync: bool,
) -> Any:
    """Draw one kind, or all that the container's state allows; see `GlobalMetrics.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "danling-metrics[plot]"') from None
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} or None, got {kind!r}")
    if normalize not in (None, "true", "pred", "all"):
        raise ValueError(f"normalize must be 'true', 'pred', 'all' or None, got {normalize!r}")
    known = container._plot_states(sync)
    drawn = [k for k in KINDS if k in known] if kind is None else [kind]
    if missing := [k for k in drawn if k not in known]:
        raise ValueError(f"these metrics hold nothing for a plot of kind {missing[0]!r}; they allow {sorted(known)}")
    if not drawn:
        raise ValueError("these metrics hold neither a confusion matrix nor rankings to plot")
    if ax is not None:
        axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, (list, tuple)) else [ax]
        if len(axes) != len(drawn):
            raise ValueError(f"{len(drawn)} panels ({', '.join(drawn)}) need as many axes, got {len(axes)}")
        figure = axes[0].figure
    else:
        figure = Figure(figsize=(5.5 * len(drawn), 4.8), layout="constrained")
        axes = [figure.add_subplot(1, len(drawn), i + 1) for i in range(len(drawn))]
    for name, axis in zip(drawn, axes, strict=True):
        metric, state = known[name]
        if name == "confusion_matrix":
            _draw_confusion(figure, axis, metric, state, class_names, normalize)
        else:
            _draw_curves(axis, name, metric, state, class_names)
    return figure


def _draw_confusion(figure: Any, axis: Any, metric: Any, confmat: Tensor, names: Any, normalize: str | None) -> None:
    if confmat.dim() == 3:
        confmat, names = confmat.sum(0), None  # labels pooled
    names = _names(names, confmat.shape[0])
    if not confmat.sum():
        raise ValueError("there is no data to plot")
    shown = confmat.double()
    if normalize is not None:
        total = {"true": shown.sum(1, keepdim=True), "pred": shown.sum(0, keepdim=True), "all": shown.sum()}[normalize]
        shown = torch.where(total > 0, shown / total, 0)
    image = axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1 if normalize else None)
    figure.colorbar(image, ax=axis, shrink=0.8)
    size = len(shown)
    axis.set(xlabel="prediction", ylabel="target", title="confusion matrix")
    if size <= 30:
        axis.set_xticks(range(size), names, rotation=45 if size > 3 else 0)
        axis.set_yticks(range(size), names)
    if size <= 20:
        half = float(shown.max()) / 2
        for i in range(size):
            for j in range(size):
                value = float(shown[i, j])
                text = f"{value:.2f}" if normalize else str(int(value))
                axis.text(j, i, text, ha="center", va="center", color="white" if value > half else "black")


def _draw_curves(axis: Any, kind: str, metric: Any, ranking: Ranking, names: Any) -> None:
    area = "AUROC" if kind == "roc" else "AUPRC"
    values = [r.auroc if kind == "roc" else r.auprc for r in ranking]
    if not any(r.positives + r.negatives for r in ranking):
        raise ValueError("there is no data to plot")
    defined = [i for i, value in enumerate(values) if value == value]
    if len(ranking) == 1:
        for i in defined:
            axis.plot(*_curve(ranking[i], kind), label=f"{area} {values[i]:.4f}")
    elif len(ranking) <= _MAX_CURVES:
        labels = _names(names, len(ranking))
        for i in defined:
            axis.plot(*_curve(ranking[i], kind), label=f"{labels[i]}: {area} {values[i]:.4f}")
    else:
        grid = torch.linspace(0, 1, 201, dtype=torch.float64)
        mean = torch.stack([_sampled(ranking[i], kind, grid) for i in defined]).mean(0) if defined else grid * 0
        average = sum(values[i] for i in defined) / max(1, len(defined))
        axis.plot(grid, mean, label=f"macro: {area} {average:.4f}")
    if kind == "roc":
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        axis.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    else:
        axis.set(xlabel="recall", ylabel="precision", title="precision-recall")
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    if axis.get_legend_handles_labels()[1]:
        axis.legend()


def _curve(ranking: ClassRanking, kind: str) -> tuple[Tensor, Tensor]:
    x, y = ranking.roc() if kind == "roc" else _steps(*ranking.pr())
    if len(x) > _MAX_POINTS:
        keep = torch.linspace(0, len(x) - 1, _MAX_POINTS, dtype=torch.float64).round().long()
        x, y = x[keep], y[keep]
    return x, y


def _steps(recall: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners of the step curve whose area is the average precision."""
    left = torch.cat([torch.zeros(1, dtype=recall.dtype), recall[:-1]])
    return torch.stack([left, recall], 1).flatten(), torch.stack([precision, precision], 1).flatten()


def _sampled(ranking: ClassRanking, kind: str, grid: Tensor) -> Tensor:
    if kind == "roc":
        x, y = ranking.roc()
        index = torch.searchsorted(x.contiguous(), grid, right=True).clamp(max=len(x) - 1) - 1
        return y[index.clamp(min=0)]
    recall, precision = ranking.pr()
    return precision[torch.searchsorted(recall.contiguous(), grid).clamp(max=len(recall) - 1)]


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(i) for i in range(count)]
    if len(names) != count:
        raise ValueError(f"class_names has {len(names)} names for {count} classes")
    return list(names)
