"""Scalars for TensorBoard, written without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any


class TensorBoardTracker:
    """Writes TensorBoard event files, from the first value on.

    Args:
        directory: where the event files go.
        make_writer: called as ``make_writer(directory, purge_step=None)`` for an object with ``add_scalar(name, value,
            step)``, ``flush()`` and ``close()``, such as torch's ``SummaryWriter``. The default writes scalars only and
            imports no torch.

    Raises:
        ImportError: when tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, directory: str | os.PathLike[str], make_writer: Callable[..., Any] | None = None) -> None:
        if find_spec("tensorboard") is None:
            raise ImportError('TensorBoard is not installed: pip install "danling-runner-core[tensorboard]"')
        self.directory = os.fspath(directory)
        self._make_writer = make_writer or ScalarWriter
        self._purge_step: int | None = None
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """The writer, opened on first use."""
        if self._writer is None:
            self._writer = self._make_writer(self.directory, purge_step=self._purge_step)
        return self._writer

    def start(self, event: str, global_step: int) -> None:
        """On resume, TensorBoard forgets what an earlier attempt wrote beyond ``global_step``."""
        if event == "resume" and self._writer is None:
            self._purge_step = global_step + 1  # from this step on; the restored step itself was logged and stays

    def log(self, scalars: Mapping[str, float], *, global_step: int, epoch: int) -> None:
        """Write scalars and the epoch at ``global_step``."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, global_step)
        self.writer.add_scalar("epoch", epoch, global_step)

    def flush(self) -> None:
        """Write out what is queued."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write out what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ScalarWriter:
    """The part of torch's ``SummaryWriter`` that a run needs, over tensorboard's own event writer."""

    def __init__(self, directory: str | os.PathLike[str], purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        os.makedirs(directory, exist_ok=True)
        self._file = EventFileWriter(os.fspath(directory))
        if purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._file.add_event(Event(wall_time=time.time(), step=purge_step, session_log=restart))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Queue one value."""
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=float(value))])
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write out what is queued."""
        self._file.flush()

    def close(self) -> None:
        """Write out what is queued and close the file."""
        self._file.close()
