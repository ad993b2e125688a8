"""The logger of a run and what it prints."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..problems import Problems
from ..text import block, evaluation_table, values_line
from .progress import Progress

_FILE_ONLY = "danling_file_only"


class Console:
    """Logs, blocks, tables and the progress bar of one run.

    Its logger is ``danling.run.{run}``; it does not propagate, and the root logger is left alone. The main process
    writes what is below WARNING to stdout and the rest to stderr; other ranks write WARNING and above, with their rank
    and host.

    Args:
        run: names the logger; the run's ``config_id``.
        rank: of this process.
        progress: True forces the bar, False removes it, None shows it when stdout is a terminal.
        problems: where failing writes of the log file are counted.
    """

    def __init__(
        self, run: str, *, rank: int = 0, progress: bool | None = None, problems: Problems | None = None
    ) -> None:
        self.logger = logging.getLogger(f"danling.run.{run}")
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        self.is_main_process = rank == 0
        self.problems = Problems(self.logger) if problems is None else problems
        self.bar = Progress()
        self._shows_bar = self.is_main_process and (_is_terminal(sys.stdout) if progress is None else progress)
        where = "" if self.is_main_process else f"[rank {rank} on {socket.gethostname()}] "
        self._handlers: list[logging.Handler] = []
        if self.is_main_process:
            low = _TerminalHandler(self, "stdout")
            low.addFilter(lambda record: record.levelno < logging.WARNING)
            low.setFormatter(logging.Formatter("%(message)s"))
            self._add(low)
        high = _TerminalHandler(self, "stderr", level=logging.WARNING)
        high.setFormatter(logging.Formatter(f"{where}%(levelname)s: %(message)s"))
        self._add(high)

    def log_to(self, file: str | os.PathLike[str]) -> None:
        """Write everything to this file too. Failing writes are problems; each later line tries again."""
        path = Path(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = _FileHandler(path, self.problems)
        except OSError as error:
            self.problems.add("log file", error)
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._add(handler)

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where there is none, so that nothing is folded."""
        return shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None

    def block(self, title: str, facts: Mapping[str, Any]) -> None:
        """Print the block at the start or end of a run."""
        self.logger.info("%s", block(title, facts))

    def start_progress(self, *, total: int | None, completed: int = 0, epochs: int | None = None) -> Progress:
        """Begin to show progress; the bar stays a no-op where none is wanted."""
        self.bar.close()
        self.bar = Progress(
            _rich_console() if self._shows_bar else None, total=total, completed=completed, epochs=epochs
        )
        return self.bar

    def log(self, phase: str, step: int, total: int | None, values: Mapping[str, Any]) -> None:
        """Show the values of a log point: on the bar, or as a line ``phase [i/N] values`` where there is none.

        Args:
            phase: such as ``train`` or ``epoch 2/5 train``.
            step: counted from 1.
            total: None if unknown.
            values: numbers by name.
        """
        if self.bar.live:
            self.bar.log(values)
        extra = {_FILE_ONLY: self.bar.live}
        self.logger.info(
            "%s [%d/%s] %s", phase, step, "?" if total is None else total, values_line(values), extra=extra
        )

    def evaluation(
        self,
        title: str,
        row: Mapping[str, Mapping[str, Any]],
        best: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        mark: tuple[str, str] | None = None,
    ) -> None:
        """Print the table after an evaluation; see `evaluation_table`."""
        self.logger.info("%s\n%s", title, evaluation_table(row, best, mark=mark, width=self.width))

    def close(self) -> None:
        """Close the bar, take the handlers off and close the file. Idempotent."""
        self.bar.close()
        while self._handlers:
            handler = self._handlers.pop()
            self.logger.removeHandler(handler)
            handler.close()

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        self.logger.addHandler(handler)


class _TerminalHandler(logging.Handler):
    """Writes to what ``sys.stdout`` or ``sys.stderr`` is at that moment; above the progress bar while there is one."""

    def __init__(self, owner: Console, stream: str, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._owner, self._stream = owner, stream
        self.addFilter(lambda record: not getattr(record, _FILE_ONLY, False))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            stream: TextIO = getattr(sys, self._stream)
            bar = self._owner.bar
            if bar.live and (_is_terminal(stream) or stream is bar.console.file):
                bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            else:
                stream.write(text + "\n")
                stream.flush()
        except Exception:
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    def __init__(self, path: Path, problems: Problems) -> None:
        super().__init__(path, encoding="utf-8")
        self._problems = problems

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self._problems.add("log file", error)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what was still buffered did not fit on the disk
            self._problems.add("log file", error)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def _rich_console() -> Any:
    from rich.console import Console as RichConsole

    return RichConsole(file=sys.stdout, force_terminal=True)
