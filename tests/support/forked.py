"""Running a function in a forked process that may die: as cheap as a thread, as final as a kill."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable


def run_forked(function: Callable[[], object], *, timeout: float = 120.0, kill_after: float | None = None) -> int:
    """Call `function` in a forked child and wait for it.

    Args:
        function: what the child does; its exit status is 0, that of a `SystemExit`, or 1 after another error.
        timeout: seconds until the child is killed and the call fails.
        kill_after: SIGKILL the child after that many seconds.

    Returns:
        The exit status; minus the signal's number if one ended it.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout
    kill_at = time.monotonic() + kill_after if kill_after is not None else None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if kill_at is not None and now >= kill_at:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        if now >= deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"the forked process was still running after {timeout} s")
        time.sleep(0.005)
