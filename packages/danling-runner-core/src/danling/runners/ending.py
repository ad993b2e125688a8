"""How a run ends: finished, stopped, interrupted or failed; and everything it took is given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .console import format_duration
from .crash import crash_point
from .supervisor import Stop

_Host: Any = object  # part of BaseRunner: what is used here and not defined here is the runner's


class Ending(_Host):
    """The part of a runner that brings it to an end."""

    _outcome: tuple[str, str | None]
    _closed: bool

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever ends training is told to the listeners and stands in `summary.json`."""
        self._outcome = ("finished", None)
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._outcome = ("interrupted" if interrupted else "failed", None)
            self._error = error
            try:
                try:
                    self.emit("exception", error=error)
                finally:
                    self.emit("end", error=error)
            finally:
                self.close()
            raise

    def _judge(self, ending: str | None) -> tuple[str, str | None]:
        if ending != "stop":
            return "finished", ending
        supervisor = self.supervisor
        return ("interrupted" if supervisor.stop > Stop.REQUEST else "stopped"), supervisor.stop_reason

    def _abandon(self, error: BaseException) -> None:
        """Close what a failed construction has opened."""
        if "_closers" in self.__dict__:
            self._outcome = ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", None)
            self._error = error
            self.close()

    def _report_end(self) -> None:
        drained = self._store.drain(self.config.checkpoint.wait_timeout)
        status, reason = self._outcome
        self._write_summary(status)
        if not self.is_main_process:
            return
        newest = (self._store.last_committed or self.last_checkpoint) if drained else None
        best = self.best_result
        self.console.block(
            f"{status}{f' ({reason})' if reason else ''}",
            {
                "duration": format_duration(time.monotonic() - self._started_at),
                "updates": f"{self.global_step} in {self.epoch} epochs",
                "best": best
                and f"{self.score_split}/{self.score_name} {self.best_score:.6g} at "
                f"{self.results.unit} {best['index']}",
                "checkpoint": newest and str(newest),
                "results": str(self.dir / "results.json"),
                "metrics": str(self.dir / "metrics.jsonl"),
                "log": str(self.log_file) if self.config.log else None,
                "problems": len(self.problems) or None,
                "directory": str(self.dir),
            },
        )

    def _write_summary(self, status: str) -> None:
        if not self.is_main_process or "summary" not in self.__dict__:
            return
        _, reason = getattr(self, "_outcome", (status, None))
        error = self.__dict__.get("_error")
        state = self.train_state
        store = self.__dict__.get("_store")
        results = self.__dict__.get("results")
        codes = {"failed": 1, "finished": 0, "stopped": 0, "interrupted": 130}  # 130: as shells tell of Ctrl-C
        stop = self.supervisor.exit_error()
        self.summary.write(
            status,
            reason=reason,
            error=error if isinstance(error, Exception) else None,
            exit_code=stop.code if isinstance(stop, SystemExit) else codes.get(status),  # type: ignore[arg-type]
            counters={
                "updates": state.global_step,
                "micro_steps": state.micro_step,
                "epochs": state.epoch,
                "samples": state.samples,
                "tokens": state.tokens,
                "skipped": state.skipped,
            },
            targets={"epochs": self.config.epochs, "steps": self.config.steps},
            latest=results.latest_result if results else None,
            best=results.best_result if results else None,
            checkpoint=self.last_checkpoint,
            checkpoint_health=dict(store.health) if store is not None else None,
        )

    def _closing(self, name: str, close: Callable[[], Any]) -> None:
        self._closers.append((name, close))

    def close(self, timeout: float | None = None) -> bool:
        """Finish pending saves and give back everything the run has taken. Idempotent.

        Args:
            timeout: seconds to wait for pending saves; None takes `checkpoint.wait_timeout`.

        Returns:
            Whether all saves were finished.
        """
        if self._closed:
            return True
        self._closed = True
        drained = True
        if (store := self.__dict__.get("_store")) is not None:
            timeout = self.config.checkpoint.wait_timeout if timeout is None else timeout
            drained = store.close(timeout, commit=self.__dict__.get("_error") is None)
        crash_point("close")
        self.close_loaders()
        status = getattr(self, "_outcome", ("finished", None))[0]
        closers = dict(self._closers)
        if (trackers := closers.pop("trackers", None)) is not None:
            trackers()
        if (heartbeat := self.__dict__.get("heartbeat")) is not None:
            heartbeat.close(status)
        self._write_summary(status)
        order = ["supervisor", "deterministic", "console", "lock", "group"]
        for name in [*(n for n in closers if n not in order), *(n for n in order if n in closers)]:
            try:
                closers[name]()
            except Exception as error:
                self.problems.add(name, error)
        return drained

    def close_loaders(self) -> None:
        """Stop the workers of the loaders."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
