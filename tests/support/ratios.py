"""Times two things side by side, and keeps what came out as one table and one JSON file.

A ratio comes from alternating runs in one process: what else the machine does falls on both sides alike. It is given as the
median over the pairs with a bootstrap 95 % interval; a limit is missed only if that whole interval lies above it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PAIRS = int(os.environ.get("DANLING_BENCH_PAIRS", "30"))
"""How many pairs of runs a ratio is made of."""
SHORTEST = 1e-3
"""Seconds one side of a pair takes at least; shorter calls are repeated."""


@contextmanager
def quiet(threads: int = 1) -> Iterator[None]:
    """Runs with this many threads and without garbage collection."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(before)


@dataclass
class Pairs:
    """Times of two calls in alternation.

    Attributes:
        case: fastest time of the first, in seconds.
        base: fastest time of the second, in seconds.
        value: median over the pairs, of the ratios or of the differences in seconds.
        low, high: its bootstrap 95 % interval.
    """

    case: float
    base: float
    value: float
    low: float
    high: float


def paired(
    case: Callable[[], object],
    base: Callable[[], object],
    *,
    difference: bool = False,
    pairs: int = PAIRS,
    synchronize: Callable[[], object] | None = None,
) -> Pairs:
    """Times `case` and `base` in alternation; `difference` subtracts where the ratio would divide.

    Work on the CPU is timed by what this thread uses of it, so that waiting for other processes does not count; with
    `synchronize`, work on a device is timed by the clock.
    """
    clock = time.thread_time if synchronize is None else time.perf_counter

    def seconds(call: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        if synchronize is not None:
            synchronize()
        return (clock() - start) / calls

    with quiet():
        for _ in range(2):
            first, second = seconds(case, 1), seconds(base, 1)
        calls = max(1, round(SHORTEST / max(1e-7, min(first, second))))
        if calls > 1:  # the first calls are slow ones
            calls = max(1, round(SHORTEST / max(1e-7, min(seconds(case, calls), seconds(base, calls)))))
        times = []
        for pair in range(pairs):
            if pair % 2:
                second = seconds(base, calls)
                first = seconds(case, calls)
            else:
                first = seconds(case, calls)
                second = seconds(base, calls)
            times.append((first, second))
    values = [a - b if difference else a / b for a, b in times]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=pairs)) for _ in range(1000))
    return Pairs(
        min(a for a, _ in times), min(b for _, b in times), statistics.median(values), medians[25], medians[974]
    )


@dataclass
class Row:
    """One line of the table; a row without a limit is there for comparison.

    `fastest` is the ratio (or difference) of the fastest times, which a busy machine disturbs least.
    """

    gate: str
    case: str
    what: str
    against: str
    value: float | None
    unit: str
    low: float | None
    high: float | None
    fastest: float | None
    limit: float | None
    verdict: str
    seconds: float | None
    base_seconds: float | None


def short(error: BaseException) -> str:
    """The first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:80] if lines else ''}"


class Board:
    """Collects rows, fails what misses its limit, and writes everything at the end."""

    def __init__(self, name: str, **about: Any) -> None:
        self.name, self.about, self.rows = name, about, []

    def gate(
        self,
        gate: str,
        case: str,
        what: str,
        against: str,
        limit: float | None,
        first: Callable[[], object],
        second: Callable[[], object],
        *,
        difference: bool = False,
        **settings: Any,
    ) -> Pairs:
        """Times `first` against `second`; a median surely above `limit` fails. Differences are in microseconds.

        Raises:
            AssertionError: The lower end of the interval is above `limit`.
        """
        pairs = paired(first, second, difference=difference, **settings)
        scale = 1e6 if difference else 1.0
        value, low, high = (x * scale for x in (pairs.value, pairs.low, pairs.high))
        verdict = "" if limit is None else "pass" if low <= limit else "MISS"
        unit = "us" if difference else "x"
        fastest = (pairs.case - pairs.base) * scale if difference else pairs.case / pairs.base
        self.rows.append(
            Row(gate, case, what, against, value, unit, low, high, fastest, limit, verdict, pairs.case, pairs.base)
        )
        assert verdict != "MISS", f"{gate} {case}, {what}: {value:.2f} ({low:.2f} to {high:.2f}) is above {limit}"
        return pairs

    def number(self, gate: str, case: str, what: str, against: str, value: float, limit: float | None) -> None:
        """Notes a ratio that is counted rather than timed, and fails above `limit`."""
        verdict = "" if limit is None else "pass" if value <= limit else "MISS"
        self.rows.append(Row(gate, case, what, against, value, "x", None, None, None, limit, verdict, None, None))
        assert verdict != "MISS", f"{gate} {case}, {what}: {value:.2f} is above {limit}"

    def peer(
        self,
        gate: str,
        case: str,
        what: str,
        against: str,
        first: Callable[[], object] | None,
        second: Callable[[], object],
        **settings: Any,
    ) -> None:
        """Another way to the same result, against the same base; absent (`None`) or broken ones are listed as such."""
        try:
            if first is None:
                raise NotImplementedError("absent")
            first()
            self.gate(gate, case, what, against, None, first, second, **settings)
        except Exception as error:
            verdict = "absent" if first is None else short(error)
            unit = "us" if settings.get("difference") else "x"
            self.rows.append(Row(gate, case, what, against, None, unit, None, None, None, None, verdict, None, None))

    def table(self) -> str:
        """All rows as a Markdown table."""
        lines = [
            "| gate | case | what | against | ratio | 95 % interval | of the fastest | limit | verdict |",
            "|---|---|---|---|---:|---:|---:|---:|---|",
        ]
        for row in self.rows:
            unit = " us" if row.unit == "us" else ""
            value = "" if row.value is None else f"{row.value:.2f}{unit}"
            interval = "" if row.low is None else f"{row.low:.2f} to {row.high:.2f}"
            limit = "" if row.limit is None else f"{row.limit:g}{unit}"
            fastest = "" if row.fastest is None else f"{row.fastest:.2f}"
            cells = (row.gate, row.case, row.what, row.against, value, interval, fastest, limit, row.verdict)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def write(self) -> Path:
        """Writes `<name>.json` into the folder `DANLING_BENCH_DIR` (default `build/bench`)."""
        folder = Path(os.environ.get("DANLING_BENCH_DIR", "build/bench"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        about = {"cpu": cpu_name(), "threads": 1, "pairs": PAIRS, "torch": torch.__version__, **self.about}
        path.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")
        return path


def cpu_name() -> str:
    """The CPU in words, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
