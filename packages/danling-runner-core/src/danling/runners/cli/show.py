"""``danling show RUN``"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..text import block, evaluation_table, format_duration, format_number, format_size, table
from .checkpoints import list_checkpoints
from .output import add_json, print_json, width
from .run_files import ABOUT_THE_RUN, RunFiles, find_run

NOT_SPLITS = {"name", "id", "timestamp", "index", "global_step", "epoch", "score"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run directory, or anything inside one")
    parser.add_argument("--all", action="store_true", help="every configuration key, not only those that were set")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the run."""
    files = find_run(args.run)
    checkpoints = list_checkpoints(files)
    if args.json:
        content = {
            "dir": str(files.dir),
            "status": files.status,
            "summary": files.summary,
            "config": files.config,
            "latest": files.latest,
            "best": files.best,
            "checkpoints": checkpoints,
            "unreadable": files.unreadable,
        }
        print_json(content)
        return 0
    parts = [
        _identity(files),
        _config(files, args.all),
        _row("best", files.best),
        _row("latest", files.latest),
        _checkpoints(checkpoints),
        _attempts(files.summary.get("attempts") or []),
        _problems(files),
    ]
    print("\n\n".join(part for part in parts if part))
    return 0


def _identity(files: RunFiles) -> str:
    summary = files.summary
    counters = summary.get("counters") or {}
    error = summary.get("error")
    git = files.metadata("git.yaml")
    progress = files.progress
    return block(
        f"{files.name}-{files.config_id}" if files.config_id else files.dir.name,
        {
            "directory": str(files.dir),
            "id": summary.get("id") or files.results.get("id"),
            "uuid": files.results.get("uuid"),
            "status": files.status + (f" ({summary['reason']})" if summary.get("reason") else ""),
            "error": f"{error['type']}: {error['message']}" if isinstance(error, Mapping) else None,
            "stack": summary.get("stack"),
            "progress": None if progress is None else f"{100 * progress:.0f}%",
            "updates": counters.get("updates"),
            "epochs": counters.get("epochs"),
            "duration": format_duration(summary["duration"]) if "duration" in summary else None,
            "git": f"{git['revision']}{' (dirty)' if git.get('dirty') else ''}" if git.get("revision") else None,
        },
    )


def _config(files: RunFiles, everything: bool) -> str:
    """What differs from danling's defaults, or everything as YAML."""
    if not files.config:
        return "config: none"
    if everything:
        from ..configfile import dump_yaml

        return f"config\n{_indent(dump_yaml(files.config))}"
    from ..identity import flatten, normalise
    from ..keys import KEYS

    leaves = {name: value for name, value in flatten(files.config).items() if name not in ABOUT_THE_RUN}
    set_ = {k: v for k, v in leaves.items() if k not in KEYS or normalise(v) != normalise(KEYS[k].default)}
    title = f"config, without {len(leaves) - len(set_)} keys at their defaults (--all shows them)"
    return block(title, {name: str(value) for name, value in set_.items()})


def _row(title: str, row: Mapping[str, Any]) -> str:
    if not row:
        return f"{title}: no results yet"
    splits = {key: value for key, value in row.items() if key not in NOT_SPLITS and isinstance(value, Mapping)}
    where = ", ".join(
        f"{key} {format_number(row[key])}" for key in ("index", "global_step", "score") if row.get(key) is not None
    )
    return f"{title}: {where}\n{_indent(evaluation_table(splits, width=width()))}"


def _checkpoints(checkpoints: list[dict[str, Any]]) -> str:
    if not checkpoints:
        return "checkpoints: none"
    rows = [
        [
            found["name"],
            found["kind"] or "-",
            format_number(found["global_step"]),
            format_number(found["epoch"]),
            format_number(found["score"]),
            format_size(found["size"]),
            " ".join(found["aliases"]) or "-",
        ]
        for found in checkpoints
    ]
    return table(["checkpoint", "kind", "global_step", "epoch", "score", "size", "aliases"], rows)


def _attempts(attempts: list[Mapping[str, Any]]) -> str:
    if not attempts:
        return ""
    rows = [
        [
            str(attempt.get("attempt", "-")),
            str(attempt.get("start", "-")),
            str(attempt.get("status", "-")),
            str(attempt.get("reason") or "-"),
            format_duration(attempt.get("duration")),
        ]
        for attempt in attempts
    ]
    return table(["attempt", "start", "status", "reason", "duration"], rows)


def _problems(files: RunFiles) -> str:
    found = [
        f"{p.get('service')}: {p.get('count')} times, last {p.get('last')}" for p in files.summary.get("problems") or []
    ]
    found += [f"{name}: {why}" for name, why in files.unreadable.items()]
    return "problems\n" + "\n".join(f"  {line}" for line in found) if found else "problems: none"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.rstrip().splitlines())
