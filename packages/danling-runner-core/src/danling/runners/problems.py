"""What went wrong without stopping the run, counted so that nobody has to read the log to know."""

from __future__ import annotations

import logging
import threading
from typing import Any

_log = logging.getLogger(__name__)


class Problems:
    """Failures of services a run can live without: trackers, heartbeat, metadata, log files.

    Safe to call from writer threads. The first failure of a service is logged as a warning, the later ones are counted.

    Examples:
        >>> problems = Problems(logger=logging.getLogger("quiet"))
        >>> problems.add("tensorboard", OSError("disk full"))
        >>> problems.add("tensorboard", OSError("still full"))
        >>> problems.as_list()
        [{'service': 'tensorboard', 'count': 2, 'first': 'OSError: disk full', 'last': 'OSError: still full'}]
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self.logger = logger or _log
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}

    def add(self, service: str, error: BaseException | str) -> None:
        """Count one failure of a service."""
        text = describe_error(error) if isinstance(error, BaseException) else str(error)
        with self._lock:
            known = self._found.get(service)
            if known is None:
                self._found[service] = {"service": service, "count": 1, "first": text, "last": text}
            else:
                known["count"] += 1
                known["last"] = text
        if known is None:
            self.logger.warning("%s failed: %s (counted in summary.json from now on)", service, text)

    def as_list(self) -> list[dict[str, Any]]:
        """A copy for ``summary.json``, in order of first appearance."""
        with self._lock:
            return [dict(entry) for entry in self._found.values()]

    def __len__(self) -> int:
        return len(self._found)


def describe_error(error: BaseException) -> str:
    """``Type: message`` on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
