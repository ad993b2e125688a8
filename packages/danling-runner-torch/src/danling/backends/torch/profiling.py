"""Profiler traces of a run, one file per rank and cycle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class StepProfiler:
    """torch's profiler on the schedule of the `profiling` section; `step()` after every update.

    Traces (Chrome format) go to ``{trace_dir}/{timestamp}/rank-N.json``; later cycles of `repeat` put ``.1``, ``.2``
    before the extension.

    Args:
        settings: the `profiling` section of the configuration.
        root: the run directory, for a relative `trace_dir`.
        timestamp: of the attempt.
        rank: whose trace this is.
    """

    def __init__(self, settings: Mapping[str, Any], root: str | os.PathLike, timestamp: str, rank: int) -> None:
        self.folder = Path(root) / settings["trace_dir"] / timestamp
        self.rank = rank
        self.traces: list[Path] = []
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=settings["wait"],
                warmup=settings["warmup"],
                active=settings["active"],
                repeat=settings["repeat"] or 0,
            ),
            on_trace_ready=self._write,
            record_shapes=settings["record_shapes"],
            profile_memory=settings["profile_memory"],
            with_stack=settings["with_stack"],
            with_flops=settings["with_flops"],
        )
        self._profiler.start()
        self._open = True

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{len(self.traces)}" if self.traces else ""
        path = self.folder / f"rank-{self.rank}{suffix}.json"
        profiler.export_chrome_trace(str(path))
        self.traces.append(path)

    def step(self) -> None:
        """Tell the profiler that an update is done."""
        with warnings.catch_warnings():
            # Each cycle is written to a file of its own, so that it is cleared afterwards is what is wanted.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events", UserWarning)
            self._profiler.step()

    def close(self) -> None:
        """Stop profiling and write what an unfinished cycle has recorded. Idempotent."""
        if self._open:
            self._open = False
            self._profiler.stop()
