"""``danling runs DIR``"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..text import format_duration, format_number, table
from .main import CommandError
from .output import add_json, print_json
from .run_files import RunFiles, find_runs

COLUMNS = ("name", "config_id", "status", "progress", "latest", "best", "duration", "changed", "dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("dir", metavar="DIR", nargs="?", default="experiments", help="default: experiments")
    parser.add_argument(
        "--sort", metavar="KEY", default="changed", help=f"one of {', '.join(COLUMNS)}; default: changed"
    )
    parser.add_argument("--reverse", action="store_true", help="turn the order round")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.sort not in COLUMNS:
        raise CommandError(f"--sort {args.sort}: must be one of {', '.join(COLUMNS)}")
    facts = [_facts(files) for files in find_runs(args.dir)]
    known = [fact for fact in facts if fact[args.sort] is not None]
    known.sort(key=lambda fact: fact[args.sort], reverse=args.reverse)
    facts = known + [fact for fact in facts if fact[args.sort] is None]
    if args.json:
        print_json({"runs": facts})
    elif not facts:
        print(f"no runs below {args.dir}")
    else:
        print(
            table(
                ["name", "config_id", "status", "progress", "latest", "best", "duration", "last change", "directory"],
                [_row(fact) for fact in facts],
            )
        )
    return 0


def _facts(files: RunFiles) -> dict[str, Any]:
    return {
        "name": files.name,
        "config_id": files.config_id,
        "status": files.status,
        "progress": files.progress,
        "latest": files.score("latest"),
        "best": files.score("best"),
        "duration": files.summary.get("duration"),
        "changed": files.changed,
        "dir": str(files.dir),
    }


def _row(fact: dict[str, Any]) -> list[str]:
    progress = fact["progress"]
    return [
        fact["name"],
        fact["config_id"] or "-",
        fact["status"],
        "-" if progress is None else f"{100 * progress:.0f}%",
        format_number(fact["latest"]),
        format_number(fact["best"]),
        format_duration(fact["duration"]),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(fact["changed"])),
        fact["dir"],
    ]
