"""Named points at which a process can be made to die, so that tests can kill a run at every step of a commit.

`DANLING_CRASH_AT=<point>[@rank][:n]` ends the process with `os._exit(137)`, as SIGKILL would, at the n-th passage of
that point (the first by default), on one rank or on every rank that comes there. A point is the instant *after* the
step it is named for; `save.begin` is before anything is done.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from dataclasses import dataclass, field

POINTS: tuple[str, ...] = (
    "save.begin",
    "save.staged",
    "save.file",
    "save.file_fsync",
    "save.barrier",
    "save.manifest_tmp",
    "save.manifest",
    "save.rename",
    "save.parent_fsync",
    "alias.latest",
    "alias.best",
    "retain.trash",
    "retain.remove",
    "results.write",
    "metrics.append",
    "step.end",
    "epoch.end",
    "evaluate.batch",
    "evaluate.end",
    "loader.start",
    "close",
)

VARIABLE = "DANLING_CRASH_AT"
EXIT_CODE = 137


@dataclass
class _Plan:
    point: str
    rank: int | None
    remaining: int
    lock: threading.Lock = field(default_factory=threading.Lock)


_plan: _Plan | None = None


def crash_point(name: str) -> None:
    """Die here if the environment asks for it; otherwise one comparison.

    Args:
        name: one of `POINTS`.
    """
    if _plan is not None and _plan.point == name:
        _pass(_plan)


def is_armed(name: str) -> bool:
    """Whether this process is to die at that point: lets a loop leave out the call."""
    return _plan is not None and _plan.point == name


def _pass(plan: _Plan) -> None:
    if plan.rank is not None and plan.rank != int(os.environ.get("RANK", "0")):
        return
    with plan.lock:
        plan.remaining -= 1
        if plan.remaining == 0:
            os._exit(EXIT_CODE)


def arm(text: str | None) -> None:
    """Choose the point at which this process dies; None or the empty text disarms.

    Called with the variable's value when this module is imported, so that a mistyped point fails at the start of a run.

    Args:
        text: `<point>[@rank][:n]`.

    Raises:
        ValueError: the text has another form, or names no point.

    Examples:
        >>> arm("save.rename@1:3")
        >>> arm(None)
        >>> arm("save.renmae")
        Traceback (most recent call last):
        ...
        ValueError: DANLING_CRASH_AT: no crash point 'save.renmae'; did you mean 'save.rename'?
    """
    global _plan
    if not text:
        _plan = None
        return
    match = re.fullmatch(r"([^@:]+)(?:@(\d+))?(?::([1-9]\d*))?", text)
    if match is None:
        raise ValueError(f"{VARIABLE}: expected <point>[@rank][:n] with n >= 1, got {text!r}")
    point, rank, count = match.groups()
    if point not in POINTS:
        near = difflib.get_close_matches(point, POINTS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the points are {', '.join(POINTS)}"
        raise ValueError(f"{VARIABLE}: no crash point {point!r}; {hint}")
    _plan = _Plan(point, None if rank is None else int(rank), int(count or 1))


arm(os.environ.get(VARIABLE))
