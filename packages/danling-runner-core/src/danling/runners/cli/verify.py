"""``danling verify CHECKPOINT``"""

from __future__ import annotations

import argparse

from ..manifest import verify
from .checkpoints import find_checkpoint
from .output import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, alias or run directory")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check every file; status 1 if one is bad."""
    checkpoint = find_checkpoint(args.checkpoint)
    problems = verify(checkpoint)
    if args.json:
        print_json({"checkpoint": str(checkpoint), "complete": not problems, "problems": problems})
    elif problems:
        print(f"{checkpoint} is damaged:", *(f"  {problem}" for problem in problems), sep="\n")
    else:
        print(f"{checkpoint} is complete")
    return 1 if problems else 0
