"""Ranks that start in milliseconds: one process imports everything once and forks the ranks of each job.

A fork is a process as real as any other: it makes a gloo world with the others, and it can be killed. A process that has
touched an accelerator cannot be forked, so where there is one ranks are started the slow way (`ranks.run_ranks`).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .ranks import RankResult, check_ranks, free_port, rank_environment


class Forks:
    """Starts jobs of several ranks; a context manager.

    Args:
        stack: the engine to import before forking.
        main: what a rank calls with its arguments, as `module:function`.
    """

    def __init__(self, stack: str, main: str = f"{__package__}.worker:main") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({stack!r}, {main!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def run(
        self,
        nproc: int,
        args: Sequence[str],
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> list[RankResult]:
        """Run `main` once per rank and wait for all of them.

        Args:
            nproc: number of processes.
            args: arguments of `main`.
            timeout: seconds until everything still running is killed.
            env: further environment variables.
            check: an `AssertionError` with all outputs when a rank ends badly.

        Raises:
            AssertionError: a rank failed (with `check`), or one was still running at the time-out.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            logs = [str(Path(folder) / f"rank{rank}.log") for rank in range(nproc)]
            request = {
                "args": list(args),
                "timeout": timeout,
                "logs": logs,
                "env": dict(env or {}),
                "port": free_port(),
            }
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, f"the process that forks ranks has ended with status {self.process.wait(10)}"
            ended = json.loads(answer)
            results = [RankResult(rank, code, Path(logs[rank]).read_text()) for rank, code in enumerate(ended["codes"])]
        check_ranks(results, ended["late"], timeout, check)
        return results


def serve(stack: str, main: str) -> None:
    """Fork ranks for each request on standard input until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print when they are imported is no answer
    from danling.runners.discovery import load_engine

    load_engine(stack)
    importlib.import_module("torch._dynamo")  # the first update needs it
    module, _, function = main.partition(":")
    call = getattr(importlib.import_module(module), function)
    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(rank, request, call) for rank in range(len(request["logs"]))]
        codes, late = _wait(pids, request["timeout"])
        print(json.dumps({"codes": codes, "late": late}), file=answers, flush=True)


def _wait(pids: Sequence[int], timeout: float) -> tuple[list[int], list[int]]:
    """Wait for processes; kill what is left at the time-out, and what they have started."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    late = [rank for rank in range(len(pids)) if rank not in codes]
    for rank, pid in enumerate(pids):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if rank in late:
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[rank] for rank in range(len(pids))], late


def _fork(rank: int, request: Mapping[str, Any], call: Callable[[list[str]], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(rank_environment(rank, len(request["logs"]), request["port"]) | request["env"])
        from danling.runners import crash

        crash.arm(os.environ.get(crash.VARIABLE))
        call(request["args"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # never back into the code of the parent
