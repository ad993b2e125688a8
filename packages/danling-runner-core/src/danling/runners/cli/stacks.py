"""``danling stacks``"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

from ..discovery import StackInfo, load_engine, stacks
from ..errors import StackError
from ..text import table
from .output import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--check", action="store_true", help="also import each engine, to see whether that works")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    infos = [_checked(info) if args.check else info for info in stacks().values()]
    if args.json:
        print_json(
            {"stacks": [asdict(info) | {"installed": info.installed, "install": info.install} for info in infos]}
        )
        return 0
    rows = [[info.name, info.target or "-", info.distribution, info.version or "-", _state(info)] for info in infos]
    print(table(["stack", "class", "package", "version", "state"], rows))
    return 0


def _state(info: StackInfo) -> str:
    return (info.problem or "installed") if info.installed else info.install or "not installed"


def _checked(info: StackInfo) -> StackInfo:
    if not info.installed:
        return info
    try:
        load_engine(info.name)
    except StackError as error:
        return replace(info, problem=" ".join(str(error).split()))
    return info
