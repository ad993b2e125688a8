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
    facts = _sorted(facts, args.sort, args.reverse)
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


def _sorted(facts: list[dict[str, Any]], key: str, reverse: bool) -> list[dict[str, Any]]:
    """In the order of a column; what is missing or NaN there comes last."""
    empty = [fact[key] is None or fact[key] != fact[key] for fact in facts]
    known = [fact for fact, is_empty in zip(facts, empty, strict=True) if not is_empty]
    known.sort(key=lambda fact: fact[key], reverse=reverse)
    return known + [fact for fact, is_empty in zip(facts, empty, strict=True) if is_empty]


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
