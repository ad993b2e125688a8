"""Signals, requests to stop or save, and the pace of the garbage collector."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from enum import IntEnum
from types import FrameType
from typing import Any, ClassVar
from weakref import WeakSet

from .problems import Problems

_log = logging.getLogger(__name__)


class Stop(IntEnum):
    """Why a run is asked to stop, weakest first: ranks agree on the largest."""

    NONE = 0
    REQUEST = 1
    SIGINT = 2
    SIGTERM = 3


class Supervisor:
    """What may interrupt a run between two updates.

    A signal handler only sets a flag. The loop reads `pending` at each boundary, brings the flags of all ranks
    together, and acts on what they agree on:

    - SIGTERM and SIGINT ask for a stop; a second one of either ends the process at once, without a save.
    - SIGUSR1 asks for a save.
    - `request_stop` and `request_save` do the same from a callback or another thread.

    Attributes:
        stop: the strongest reason to stop so far.
        stop_reason: in words, for ``summary.json``.
        save_requested: a save is asked for.
        manages_gc: `take_over_gc` is in force.
        pending: something is asked for on this rank; read after every update, so it is kept rather than worked out.
        problems: what went wrong without stopping the run.
    """

    def __init__(self, *, problems: Problems | None = None, logger: logging.Logger | None = None) -> None:
        self.logger = logger or _log
        self.problems = Problems(self.logger) if problems is None else problems
        self.stop = Stop.NONE
        self.stop_reason: str | None = None
        self.save_requested = False
        self.pending = False
        self._pid: int | None = None
        self._previous: dict[int, Any] = {}
        self._gc: _GarbageCollection | None = None
        self.manages_gc = False

    # Requests

    @property
    def stop_requested(self) -> bool:
        """A stop is asked for."""
        return self.stop is not Stop.NONE

    def request_stop(self, reason: str = "requested") -> None:
        """Ask for a stop at the next boundary, on all ranks."""
        self._ask_stop(Stop.REQUEST, reason)

    def request_save(self) -> None:
        """Ask for a save at the next boundary, on all ranks."""
        self.save_requested = self.pending = True

    def agree(self, stop: int, save: bool, reason: str | None = None) -> None:
        """Take over what all ranks together decided; the strongest reason wins."""
        if stop:
            self._ask_stop(
                Stop(stop), reason or (Stop(stop).name if stop > Stop.REQUEST else "requested by another rank")
            )
        if save:
            self.request_save()

    def save_done(self) -> None:
        """A save has been committed: the request is served."""
        self.save_requested = False
        self.pending = self.stop_requested

    def clear_stop(self) -> None:
        """Forget a request to stop, when a run that was stopped is trained further in the same process."""
        self.stop = Stop.NONE
        self.stop_reason = None
        self.pending = self.save_requested

    def exit_error(self) -> BaseException | None:
        """What the run raises once it has saved and closed: ``SystemExit(143)``, ``KeyboardInterrupt`` or None."""
        if self.stop is Stop.SIGTERM:
            return SystemExit(128 + signal.SIGTERM)
        if self.stop is Stop.SIGINT:
            return KeyboardInterrupt()
        return None

    def _ask_stop(self, stop: Stop, reason: str) -> None:
        if stop > self.stop:
            self.stop, self.stop_reason, self.pending = stop, reason, True

    # Signals

    def install_signal_handlers(self) -> bool:
        """Take over SIGTERM, SIGINT and SIGUSR1 until `restore_signal_handlers`.

        Returns:
            False outside the main thread, where Python allows no handlers; this is warned about.
        """
        if self._previous:
            return True
        if threading.current_thread() is not threading.main_thread():
            self.logger.warning("signals are not handled: the runner was built outside the main thread")
            return False
        self._pid = os.getpid()
        _installed.add(self)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return True

    def restore_signal_handlers(self) -> None:
        """Give the signals back to whoever had them; a handler that somebody else installed since then stays."""
        if threading.current_thread() is not threading.main_thread() or os.getpid() != self._pid:
            return
        while self._previous:
            number, previous = self._previous.popitem()
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
            for other in _installed:  # a run begun later that ends later gives back what was there before this one
                if other._previous.get(number) == self._handle:
                    other._previous[number] = previous
        _installed.discard(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child inherited the handler: behave as if it had not
            previous = self._previous.get(number)
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == _SIGUSR1:
            self.request_save()
            return
        if self.stop >= Stop.SIGINT:  # the second one: at once
            if number == signal.SIGTERM:
                os._exit(128 + signal.SIGTERM)
            raise KeyboardInterrupt
        self._ask_stop(Stop.SIGTERM if number == signal.SIGTERM else Stop.SIGINT, signal.Signals(number).name)

    # Garbage collection

    def take_over_gc(self, interval: int, generation: int = 1, disable_automatic: bool = True) -> None:
        """Collect every ``interval`` updates on all ranks at the same update, instead of whenever Python likes.

        A collection that one rank starts alone makes all the others wait for it.
        """
        self.hand_back_gc()
        self._gc, self.manages_gc = _GarbageCollection(interval, generation, disable_automatic), True

    def collect(self, global_step: int) -> None:
        """Collect if it is due after this update."""
        if self._gc is not None and global_step % self._gc.interval == 0:
            gc.collect(self._gc.generation)

    def hand_back_gc(self) -> None:
        """Let Python collect as it did before."""
        if self._gc is not None:
            self._gc.hand_back()
            self._gc, self.manages_gc = None, False

    def close(self) -> None:
        """Give back signals and garbage collection. Idempotent."""
        self.restore_signal_handlers()
        self.hand_back_gc()


class _GarbageCollection:
    _disabled: ClassVar[int] = 0  # runs that have switched the automatic one off
    _was_enabled: ClassVar[bool] = True

    def __init__(self, interval: int, generation: int, disable_automatic: bool) -> None:
        if interval < 1 or generation not in (0, 1, 2):
            raise ValueError(f"gc.interval must be >= 1 and gc.generation 0, 1 or 2; got {interval} and {generation}")
        self.interval, self.generation = interval, generation
        self.disables = disable_automatic
        if disable_automatic:
            cls = _GarbageCollection
            if not cls._disabled:
                cls._was_enabled = gc.isenabled()
            cls._disabled += 1
            gc.collect()
            gc.disable()

    def hand_back(self) -> None:
        if self.disables:
            cls = _GarbageCollection
            cls._disabled -= 1
            if not cls._disabled and cls._was_enabled:
                gc.enable()


_installed: WeakSet[Supervisor] = WeakSet()  # whose handlers are in place, or will be put back by others
_SIGUSR1 = getattr(signal, "SIGUSR1", None)
_SIGNALS = tuple(number for number in (signal.SIGTERM, signal.SIGINT, _SIGUSR1) if number is not None)
