"""What a person sees of a run: log lines, the blocks at its start and end, the progress bar, tables."""

from .console import Console
from .progress import Progress
from .text import block, evaluation_table, format_duration, format_number, format_size, table

__all__ = [
    "Console",
    "Progress",
    "block",
    "evaluation_table",
    "format_duration",
    "format_number",
    "format_size",
    "table",
]
