"""``metrics.jsonl``: every number a run ever logged, one JSON object per line, append-only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import dump_json, restore_nonfinite
from ..crash import crash_point
from ..problems import Problems

FILE_NAME = "metrics.jsonl"
_KEPT_BACK = 10_000
_HELD_SECONDS = 0.25
_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class MetricsFile:
    """Appends lines to ``metrics.jsonl``.

    Each line is one ``write``, at once. Only log lines that follow a write within a quarter of a second wait for the
    next line or checkpoint, because a write takes as long as an update of a small model. A line that cannot be written
    (full disk) is counted as a problem, kept, and written before the next one; nothing is ever raised. What a killed
    process left unfinished at the end of the file is cut off first.

    Args:
        file: the path; its directory is created.
        attempt: number of this attempt, from 1.
        problems: where failures are counted.
    """

    def __init__(self, file: str | os.PathLike[str], *, attempt: int = 1, problems: Problems | None = None) -> None:
        self.file = Path(file)
        self.attempt = attempt
        self.problems = Problems() if problems is None else problems
        self._kept: list[bytes] = []
        self._fd: int | None = None
        self._due = 0.0

    def append(
        self,
        event: str,
        *,
        global_step: int,
        epoch: int,
        split: str | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one line: ``time, attempt, event, global_step, epoch, split``, then the values."""
        line = {
            "time": round(time.time(), 3),
            "attempt": self.attempt,
            "event": event,
            "global_step": global_step,
            "epoch": epoch,
            "split": split,
        }
        for name, value in (values or {}).items():
            line[f"value.{name}" if name in line else name] = value
        try:
            self._kept.append(_encoded(line))
        except (TypeError, ValueError) as error:
            self.problems.add(FILE_NAME, error)
            return
        if event != "log" or time.monotonic() >= self._due:
            self._write()

    def sync(self) -> None:
        """fsync what has been appended."""
        try:
            self._write()
            if self._fd is not None:
                os.fsync(self._fd)
        except OSError as error:
            self.problems.add(FILE_NAME, error)

    def close(self) -> None:
        """fsync and close. Idempotent; a later `append` opens the file again."""
        self.sync()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self) -> None:
        if not self._kept:
            return
        try:
            if self._fd is None:
                self._fd = self._open()
            while self._kept:
                line = self._kept[0]
                while line:
                    line = line[os.write(self._fd, line) :]
                self._kept.pop(0)
                crash_point("metrics.append")
            self._due = time.monotonic() + _HELD_SECONDS
        except OSError as error:
            self.problems.add(FILE_NAME, error)
            if self._fd is not None:  # what was written of this line is cut off when the file is opened again
                os.close(self._fd)
                self._fd = None
            del self._kept[:-_KEPT_BACK]

    def _open(self) -> int:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = _end_of_last_line(fd)
            if end < os.fstat(fd).st_size:
                os.ftruncate(fd, end)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        text = _PLAIN(line)
    except (TypeError, ValueError):  # what is not plain, or not finite
        text = dump_json(line)
    return text.encode() + b"\n"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The effective series of a run: what was logged, without what a later start or resume made void.

    Args:
        path: ``metrics.jsonl`` or the run directory that holds it.

    Returns:
        One mapping per line, oldest first, NaN and infinities restored. After a line ``{"event": "start"}`` everything
        before it is void; after ``{"event": "resume", "global_step": k}`` everything before it with a larger step. A
        torn last line and lines that are no JSON objects are passed over.

    Raises:
        FileNotFoundError: when there is no such file.

    Examples:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> metrics = MetricsFile(file)
        >>> metrics.append("start", global_step=0, epoch=0)
        >>> for step in (10, 20, 30):
        ...     metrics.append("log", global_step=step, epoch=0, split="train", values={"loss": 1 / step})
        >>> metrics.append("resume", global_step=20, epoch=0)
        >>> metrics.close()
        >>> [row["global_step"] for row in read_metrics(file) if row["event"] == "log"]
        [10, 20]
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    rows: list[dict[str, Any]] = []
    with open(file, "rb") as lines:
        for line in lines:
            try:
                row = restore_nonfinite(json.loads(line))
            except ValueError:
                continue
            if not isinstance(row, dict) or "event" not in row:
                continue
            if row["event"] == "start":
                rows.clear()
            elif row["event"] == "resume":
                reached = row.get("global_step", 0)
                rows = [kept for kept in rows if kept.get("global_step", 0) <= reached]
            rows.append(row)
    return rows


def _end_of_last_line(fd: int, block: int = 65536) -> int:
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - block)
        os.lseek(fd, start, os.SEEK_SET)
        at = os.read(fd, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
