"""What a person sees of a run: log lines, the blocks at its start and end, the progress bar, tables."""

from ..text import block, evaluation_table, format_duration, table
from .console import Console
from .progress import Progress

__all__ = ["Console", "Progress", "block", "evaluation_table", "format_duration", "table"]
