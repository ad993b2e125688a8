"""``danling verify CHECKPOINT``"""

from __future__ import annotations

import argparse

from .checkpoints import check, find_all
from .output import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint directory or alias; all checkpoints of a run directory"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check every file; status 1 if one is bad."""
    found = {str(path): check(path) for path in find_all(args.checkpoint)}
    if args.json:
        items = [{"checkpoint": path, "whole": not problems, "problems": problems} for path, problems in found.items()]
        print_json({"checkpoints": items})
    else:
        for path, problems in found.items():
            print(f"{path}: {'damaged' if problems else 'whole'}", *(f"  {problem}" for problem in problems), sep="\n")
    return 1 if any(found.values()) else 0
