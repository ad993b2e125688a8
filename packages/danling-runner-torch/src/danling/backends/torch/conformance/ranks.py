"""Runs a Python script in several real processes that form a gloo world."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launch.py")
_PORTS = range(20000, 32000)
_SYSTEM_RANDOM = random.SystemRandom()  # nobody's seed moves it, and it moves nobody's numbers


@dataclass
class RankResult:
    """What one rank left behind: exit status and everything it printed."""

    rank: int
    returncode: int
    output: str


def free_port() -> int:
    """Return a TCP port that was free a moment ago; none of those that systems by default hand out to connections.

    Raises:
        OSError: a hundred ports are taken.
    """
    for port in _SYSTEM_RANDOM.sample(_PORTS, 100):
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port among a hundred from {_PORTS.start} to {_PORTS.stop - 1}")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for this rank, with one thread per process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    script: str | Path,
    nproc: int,
    args: Sequence[str] = (),
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> list[RankResult]:
    """Run `script` (a path, or source code) once per rank and wait for all of them.

    Args:
        script: a file, or the source of one (any string with a newline).
        nproc: number of processes.
        args: command line arguments, the same for every rank.
        timeout: seconds until everything still running is killed and the test fails.
        env: further environment variables.
        check: raise `AssertionError` with all outputs when a rank exits non-zero.

    Raises:
        AssertionError: a rank failed (with `check`), or one was still running at the time-out.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(script, str) and "\n" in script:
            path = Path(folder) / "script.py"
            path.write_text(script)
        else:
            path = Path(script)
        port = free_port()
        logs = [open(Path(folder) / f"rank{rank}.log", "w+") for rank in range(nproc)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(LAUNCHER), str(path), *args],
                stdout=logs[rank],
                stderr=subprocess.STDOUT,
                env={**os.environ, **rank_environment(rank, nproc, port), **(env or {})},
                start_new_session=True,
            )
            for rank in range(nproc)
        ]
        deadline = time.monotonic() + timeout
        late = []
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        results = []
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            log.seek(0)
            results.append(RankResult(rank, process.returncode, log.read()))
            log.close()
    check_ranks(results, late, timeout, check)
    return results


def check_ranks(results: Sequence[RankResult], late: Sequence[int], timeout: float, check: bool) -> None:
    """Raise `AssertionError`, with all outputs, when ranks were late or, with `check`, ended badly."""
    report = "\n".join(f"--- rank {r.rank}: exit {r.returncode}\n{r.output}" for r in results)
    assert not late, f"ranks {list(late)} still running after {timeout} s\n{report}"
    if check:
        assert all(r.returncode == 0 for r in results), report
