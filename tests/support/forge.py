"""Runs of `support.tiny.Tiny` in processes of their own that start in milliseconds, to be killed in large numbers.

One helper process imports torch and danling once and forks a child per run. A child is a real process: it can be killed,
and it can be made to die at a crash point.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


class Forge:
    """Starts runs; a context manager.

    Args:
        folder: for outputs and final states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        env = {key: value for key, value in os.environ.items() if key != "DANLING_CRASH_AT"}
        path = os.pathsep.join([str(Path(__file__).parent.parent), env.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.forge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)

    def start(self, config: dict[str, Any], crash: str | None = None) -> Child:
        """Start a run with a configuration, to die at a crash point if one is given."""
        self.count += 1
        child = Child(self, self.folder / f"{self.count}")
        child.pid = int(self.ask({"do": "start", "config": config, "crash": crash, "out": str(child.out)}))
        return child

    def run(self, config: dict[str, Any], crash: str | None = None) -> Child:
        """Start a run and wait for its end."""
        child = self.start(config, crash)
        child.wait()
        return child

    def ask(self, request: dict[str, Any]) -> str:
        """Send a request to the helper process and return its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


class Child:
    """One run in a process of its own."""

    def __init__(self, forge: Forge, out: Path) -> None:
        self.forge, self.out = forge, out
        self.pid = 0
        self.code: int | None = None

    def kill(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self.forge.ask({"do": "kill", "pid": self.pid, "signal": number})

    def wait(self) -> int:
        """Wait for the end; the exit status, negative for a signal."""
        if self.code is None:
            self.code = int(self.forge.ask({"do": "wait", "pid": self.pid}))
        return self.code

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return self.out.with_suffix(".log").read_text()

    @property
    def result(self) -> dict[str, Any]:
        """`state` (see `support.tiny.final_state`), `losses` and `seen`, of a run that came to its end."""
        assert self.code == 0, (self.code, self.log)
        return pickle.loads(self.out.with_suffix(".pkl").read_bytes())


def _child(request: dict[str, Any]) -> None:
    out = Path(request["out"])
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        from danling.runners import crash
        from support.tiny import Tiny, final_state

        crash.arm(request["crash"])
        with Tiny(request["config"]) as runner:
            runner.train()
        result = {"state": final_state(runner), "losses": runner.losses, "seen": runner.seen, "dir": str(runner.dir)}
        out.with_suffix(".pkl").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm_up() -> None:
    """Import, here and once for all children, what a run imports; much of torch is imported by the first update."""
    from support.tiny import Tiny, tiny_config

    with tempfile.TemporaryDirectory() as root, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        options = {"ema__enabled": True, "scheduler__type": "cosine", "auto_resume": True}
        for epochs in (1, 2):
            with Tiny(tiny_config(root, epochs=epochs, **options)) as runner:
                runner.train()


def _serve() -> None:
    _warm_up()
    waited: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = 0
        if request["do"] == "start":
            answer = os.fork()
            if answer == 0:
                _child(request)
        elif request["do"] == "wait":
            pid = request["pid"]
            if pid not in waited:
                waited[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = waited[pid]
        elif request["pid"] not in waited:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            if pid:
                waited[pid] = os.waitstatus_to_exitcode(status)
            else:
                os.kill(request["pid"], request["signal"])
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
