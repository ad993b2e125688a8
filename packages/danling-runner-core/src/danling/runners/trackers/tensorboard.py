"""Scalars for TensorBoard, written without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any


class TensorBoard:
    """Writes TensorBoard event files.

    Args:
        directory: where the event files go.
        purge_step: on resume, the restored step: TensorBoard forgets what an earlier attempt wrote beyond it.
        writer: an object with ``add_scalar(name, value, step)``, ``flush()`` and ``close()`` to be used instead, such
            as torch's ``SummaryWriter`` for those who want images and histograms too. It has to purge by itself.

    Raises:
        ImportError: when tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, directory: str | os.PathLike[str], *, purge_step: int | None = None, writer: Any = None) -> None:
        self.writer = ScalarWriter(directory, purge_step=purge_step) if writer is None else writer

    def log(self, scalars: Mapping[str, float], *, global_step: int, epoch: int) -> None:
        """Write scalars and the epoch at ``global_step``."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, global_step)
        self.writer.add_scalar("epoch", epoch, global_step)

    def flush(self) -> None:
        """Write out what is queued."""
        self.writer.flush()

    def close(self) -> None:
        """Write out what is queued and close the file."""
        self.writer.close()


class ScalarWriter:
    """The part of torch's ``SummaryWriter`` that a run needs, over tensorboard's own event writer."""

    def __init__(self, directory: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError('TensorBoard is not installed: pip install "danling-runner-core[tensorboard]"') from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        os.makedirs(directory, exist_ok=True)
        self._file = EventFileWriter(os.fspath(directory))
        if purge_step is not None:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # TensorBoard drops what has this step or a later one; the restored step itself was logged and stays.
            self._file.add_event(self._event(wall_time=time.time(), step=purge_step + 1, session_log=restart))

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
