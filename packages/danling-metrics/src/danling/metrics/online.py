"""`OnlineMetrics`: metrics over any amount of data in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .containers import MetricContainer
from .functional.scores import RankingMetric
from .round_dict import RoundDict
from .state import BoundState
from .sums import read_scalars


class OnlineMetrics(MetricContainer):
    """Metrics over everything since `reset()` in constant memory.

    Metrics of counts, sums and moments are exact. AUROC and AUPRC are computed from `bins` bins per class; by how much
    they may be off on this data, `error_bound()` says. Bins are of equal width in u = z / (|z| + 4), where z is the
    logit of the score, so that saturated models keep resolution: 0.002 at z = 0, 0.008 at 4, 0.05 at 16 (4,096 bins).

    Memory per rank: 32 bytes per bin and class (half with a fixed `from_logits`; 131 kB per class with 4,096 bins),
    8 C² bytes per confusion matrix, one block of at most 4,096 rows, and the last batch.

    Args:
        *metrics, preprocess, from_logits, channel_dim, device, distributed, group, **named: as for `GlobalMetrics`.
        bins: number of score bins per class.

    Raises:
        ValueError: a metric needs all predictions at once, which only `GlobalMetrics` keeps.

    Examples:
        >>> from danling.metrics.functional import binary_accuracy, binary_auroc
        >>> metrics = OnlineMetrics(binary_accuracy(), binary_auroc())
        >>> metrics.update(torch.tensor([0.9, 0.2, 0.7, 0.4]), torch.tensor([1, 0, 1, 1]))
        >>> metrics.avg
        RoundDict({'acc': 0.75, 'auroc': 1.0})
        >>> metrics.error_bound()
        RoundDict({'acc': 0.0, 'auroc': 0.0})
    """

    def __init__(
        self,
        *metrics: Any,
        bins: int = 4096,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        from_logits: bool | str = "auto",
        channel_dim: int | None = None,
        device: Any = None,
        distributed: bool = True,
        group: Any = None,
        **named: Any,
    ) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins must be an integer of at least 2, got {bins!r}")
        self.bins = bins
        super().__init__(
            metrics,
            named,
            preprocess=preprocess,
            from_logits=from_logits,
            channel_dim=channel_dim,
            device=device,
            distributed=distributed,
            group=group,
        )
        if offline := [name for name, metric in self._metrics.items() if metric.preds_targets]:
            raise ValueError(
                f"{', '.join(offline)} cannot be computed online; use GlobalMetrics, which keeps predictions"
            )

    def error_bound(self, sync: bool = True) -> RoundDict:
        """Return, per metric, how far binning may have moved its average on this data; 0.0 for exact ones.

        Args:
            sync: include all ranks, which makes the call collective.
        """
        kind = "local_average"
        if sync and self._is_distributed():
            self._exchange("average")
            kind = "average"
        bounds: dict[str, Any] = {}
        for group, source in zip(self._groups, self._get_sources(kind), strict=True):
            source.validate(group.store.views)
            for name, metric in group.metrics.items():
                exact = not isinstance(metric, RankingMetric)
                bounds[name] = 0.0 if exact else metric.error_bound(BoundState(source, metric))  # type: ignore[attr-defined]
        values = [bounds[name] for name in self._metrics]
        return RoundDict(zip(self._metrics, read_scalars([torch.as_tensor(v) for v in values]), strict=True))
