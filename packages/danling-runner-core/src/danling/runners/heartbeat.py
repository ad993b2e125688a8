"""A file per rank that says the process lives, and since when it makes no progress."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .atomic import write_json
from .problems import Problems


class Heartbeat:
    """Writes ``rank-NNNNN.json`` from a daemon thread, atomically, once per interval and whenever `beat` is called.

    Args:
        directory: created if it is missing.
        read: what to write, called on the heartbeat's thread: ``mode``, ``split``, ``counters``, ... . It must only
            read attributes.
        rank, world_size: of this process.
        interval: seconds between two beats.
        problems: where failing writes are counted; they are never an error.

    ``last_progress`` is the time at which a beat last saw ``counters`` differ from the beat before: a process that
    lives but hangs keeps ``time`` moving and leaves ``last_progress`` behind.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        read: Callable[[], Mapping[str, Any]],
        *,
        rank: int = 0,
        world_size: int = 1,
        interval: float = 60.0,
        restarts: int = 0,
        problems: Problems | None = None,
    ) -> None:
        if interval <= 0:
            raise ValueError(f"heartbeat.interval_seconds must be > 0, got {interval}")
        self.file = Path(directory) / f"rank-{rank:05d}.json"
        self.interval = interval
        self.problems = Problems() if problems is None else problems
        self._read = read
        self._fixed = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "rank": rank,
            "world_size": world_size,
            "restarts": restarts,
        }
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._status = "running"
        self._event = "start"
        self._counters: Any = None
        self._last_progress = time.time()

    def start(self) -> None:
        """Write the first beat and go on from a daemon thread."""
        if self._thread is None:
            self.beat("start")
            self._thread = threading.Thread(target=self._run, name="danling-heartbeat", daemon=True)
            self._thread.start()

    def beat(self, event: str | None = None, status: str | None = None) -> None:
        """Write now. ``event`` and ``status`` stand until the next call that names others."""
        with self._lock:
            self._event = event or self._event
            self._status = status or self._status
            try:
                self._write()
            except Exception as error:  # a lost beat must not cost the run
                self.problems.add("heartbeat", error)

    def close(self, status: str = "finished") -> None:
        """Stop the thread and write the last beat. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self.beat("end", status)

    def _run(self) -> None:
        while not self._closed.wait(self.interval):
            self.beat()

    def _write(self) -> None:
        now = time.time()
        state = dict(self._read())
        counters = state.get("counters")
        if counters != self._counters:
            self._counters, self._last_progress = counters, now
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beat = {"status": self._status, "event": self._event, "time": now, "last_progress": self._last_progress}
        write_json(self.file, beat | self._fixed | state, durable=False)
