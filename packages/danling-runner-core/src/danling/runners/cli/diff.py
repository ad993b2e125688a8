"""``danling diff A B``"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..identity import differences, excluded, flatten, identity_view
from ..scalars import flatten as scalars
from ..text import format_number, table
from .output import add_json, print_json, width
from .run_files import ABOUT_THE_RUN, RunFiles, find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", metavar="A", help="run directory")
    parser.add_argument("b", metavar="B", help="run directory")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what differs."""
    left, right = find_run(args.a), find_run(args.b)
    identity = differences(_identity(left), _identity(right))
    both = set(flatten(_identity(left))) | set(flatten(_identity(right)))
    config = {
        name: values
        for name, values in differences(left.config, right.config).items()
        if name not in both and not excluded(name, ABOUT_THE_RUN)
    }
    git = differences(_git(left), _git(right))
    best = {name: (_best(left).get(name), _best(right).get(name)) for name in {**_best(left), **_best(right)}}
    if args.json:
        print_json(
            {"a": str(left.dir), "b": str(right.dir), "identity": identity, "config": config, "git": git, "best": best}
        )
        return 0
    parts = [
        _part("identity", identity, left, right, "the same experiment: no identity key differs"),
        _part("other keys", config, left, right, "no other key differs"),
        _part("git", git, left, right, "the same revision" if _git(left) else "no revision is recorded of either run"),
        _part("best", best, left, right, "no results yet", format_number),
    ]
    print("\n\n".join(parts))
    return 0


def _identity(files: RunFiles) -> dict[str, Any]:
    """The identity view stored with the newest attempt; recomputed where that is missing."""
    return files.metadata("identity.yaml") or identity_view(
        {key: value for key, value in files.config.items() if key not in ABOUT_THE_RUN}
    )


def _git(files: RunFiles) -> dict[str, Any]:
    stored = files.metadata("git.yaml")
    return {key: stored.get(key) for key in ("revision", "branch", "dirty") if key in stored}


def _best(files: RunFiles) -> dict[str, Any]:
    row = files.best
    flat = {key: row[key] for key in ("index", "global_step", "epoch", "score") if row.get(key) is not None}
    return flat | {
        f"{split}/{name}": value
        for split, metrics in row.items()
        if isinstance(metrics, Mapping)
        for name, value in scalars(metrics).items()
    }


def _part(
    title: str, pairs: Mapping[str, tuple[Any, Any]], left: RunFiles, right: RunFiles, none: str, text: Any = str
) -> str:
    if not pairs:
        return f"{title}: {none}"
    header = [
        title,
        *(f"{files.name}-{files.config_id}" if files.config_id else str(files.dir) for files in (left, right)),
    ]
    rows = [[name, *(text(value) for value in values)] for name, values in pairs.items()]
    return table(header, rows, width=width())
