"""JSON or text, whatever was asked for."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from ..atomic import dump_json


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(obj: Any) -> None:
    """Print as indented JSON; numbers that are not finite as the files of a run have them."""
    print(dump_json(obj if isinstance(obj, dict) else {"items": obj}, indent=2))


def width() -> int | None:
    """Columns of the terminal, None when the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
