"""The command ``danling``: one module per verb, imported when that verb is asked for."""

from .main import CommandError, main

__all__ = ["CommandError", "main"]
