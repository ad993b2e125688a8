"""``summary.json``: how the run stands, in one file that is true at every end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .atomic import read_json, write_json
from .problems import Problems

STATUSES = ("running", "finished", "stopped", "interrupted", "failed")


class Summary:
    """Keeps ``summary.json`` of one attempt, after those of the attempts before it.

    Args:
        file: in the run directory.
        timestamp: of this attempt.
        about: what names the run: ``name``, ``id``, ``config_id``, ``stack``; written into the file as it is.
        problems: what went wrong without stopping the run.

    The file of an earlier attempt is read for its list of attempts. One that is still ``running`` there was killed:
    whoever builds a Summary holds the run's lock.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        timestamp: str,
        about: Mapping[str, Any] | None = None,
        problems: Problems | None = None,
    ) -> None:
        self.file = Path(file)
        self.about = dict(about or {})
        self.problems = Problems() if problems is None else problems
        self.status = "running"
        self._start = time.time()
        self._earlier = self._read_attempts()
        self._attempt: dict[str, Any] = {
            "attempt": len(self._earlier) + 1,
            "timestamp": timestamp,
            "status": "running",
            "start": _iso(self._start),
        }

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._attempt["attempt"]

    @property
    def start(self) -> float:
        """When this attempt began, in seconds since the epoch."""
        return self._start

    def write(
        self,
        status: str,
        *,
        reason: str | None = None,
        error: BaseException | None = None,
        exit_code: int | None = None,
        **facts: Any,
    ) -> bool:
        """Write the file; a failure is a problem, not an error.

        Args:
            status: running, finished, stopped, interrupted or failed.
            reason: why, in words.
            error: what ended the run.
            exit_code: of the process, as far as it is known.
            facts: ``counters`` (updates, micro_steps, epochs, samples, skipped), ``targets`` (steps, epochs),
                ``latest`` and ``best`` rows, ``checkpoint``, ``checkpoint_health``, and whatever else belongs in the
                file.

        Returns:
            Whether the file was written.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        now = time.time()
        self.status = status
        ended = status != "running"
        state = {
            "status": status,
            "reason": reason,
            "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
            "exit_code": exit_code,
        }
        times = {"start": _iso(self._start), "end": _iso(now) if ended else None, "duration": now - self._start}
        self._attempt |= {"status": status, "reason": reason} | times
        content = self.about | state | times | facts
        content["attempts"] = [*self._earlier, self._attempt]
        content["problems"] = self.problems.as_list()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, content)
        except (OSError, TypeError, ValueError) as problem:
            self.problems.add("summary.json", problem)
            return False
        return True

    def _read_attempts(self) -> list[dict[str, Any]]:
        try:
            known = read_json(self.file)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as problem:
            self.problems.add("summary.json", problem)
            return []
        attempts = known.get("attempts") if isinstance(known, Mapping) else None
        attempts = [dict(attempt) for attempt in attempts or () if isinstance(attempt, Mapping)]
        for attempt in attempts:
            if attempt.get("status") == "running":
                attempt["status"] = "killed"
        return attempts


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
