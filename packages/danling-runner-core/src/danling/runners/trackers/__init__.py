"""Where metrics go while a run lasts: ``metrics.jsonl`` always, TensorBoard and Weights & Biases when asked for."""

from .base import Tracker, Trackers
from .jsonl import MetricsFile, read_metrics

__all__ = ["MetricsFile", "Tracker", "Trackers", "read_metrics"]
