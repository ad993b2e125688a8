"""The error and the warnings that reading a metric can raise."""

from __future__ import annotations


class MetricSyncError(ValueError):
    """Ranks that read a metric together do not agree on what they hold.

    Every rank of the group raises it, so none is left waiting; the message names the ranks and what differs.
    """


class UndefinedMetricWarning(UserWarning):
    """A metric has no defined value on the data it was given, for instance AUROC with one class."""


class NonFinitePredictionWarning(UserWarning):
    """Valid rows have NaN scores, so the metrics that read them are NaN."""
