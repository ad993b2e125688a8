"""The lock that keeps two live processes out of one run directory."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

from .errors import RunBusyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# POSIX record locks belong to the process: they end with it at once, however it ends, and forked loader workers that
# outlive it do not keep them, as they would keep a flock. In return, a second lock in the same process is not noticed
# by the kernel, and closing any other descriptor of the file gives the lock up: hence this table of what is held here.
_held: dict[str, RunLock] = {}
_warned = False


class RunLock:
    """Holds `{directory}/.lock` from `acquire` to `release` or to the end of the process, whichever is first.

    Args:
        directory: the run directory; it is created if need be.

    Examples:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> lock = RunLock(directory)
        >>> lock.acquire()
        >>> is_locked(directory), read_holder(directory)["pid"] == os.getpid()
        (True, True)
        >>> lock.release()
        >>> is_locked(directory)
        False
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._fd: int | None = None
        self._pid: int | None = None
        self._key: str | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock in this process."""
        return self._fd is not None and self._pid == os.getpid()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunBusyError: another runner, of this process or of another, holds it; names host, pid and start time.
            OSError: the directory or file cannot be made.
        """
        if self.held:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        key = _key(self.directory)
        if _holds(key):
            raise RunBusyError(_busy(self.directory, "another runner of this process"))
        deadline = time.monotonic() + 0.3  # somebody who only looks holds it for an instant
        while True:
            fd = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                if not self._lock(fd):
                    if time.monotonic() < deadline:
                        os.close(fd)
                        time.sleep(0.02)
                        continue
                    holder = read_holder(self.directory)
                    raise RunBusyError(_busy(self.directory, _describe(holder)))
                if not self._still_there(fd):  # the directory was set aside between open and lock
                    os.close(fd)
                    self.directory.mkdir(parents=True, exist_ok=True)
                    continue
                self._sign(fd)
            except BaseException:
                os.close(fd)
                raise
            break
        self._fd, self._pid, self._key = fd, os.getpid(), key
        _held[key] = self

    def release(self) -> None:
        """Give the lock up; does nothing when it is not held."""
        if not self.held:
            return
        assert self._fd is not None and self._key is not None
        _held.pop(self._key, None)
        fd, self._fd = self._fd, None
        os.close(fd)

    def _lock(self, fd: int) -> bool:
        if fcntl is None:
            _warn_once("this platform has no file locks")
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno in _NO_LOCKS:
                _warn_once(f"the file system of {self.directory} has no locks ({error.strerror})")
                return True
            raise
        return True

    def _still_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.directory / LOCK_NAME))
        except FileNotFoundError:
            return False

    def _sign(self, fd: int) -> None:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps(holder).encode())


def is_locked(directory: str | os.PathLike[str]) -> bool:
    """Whether a live process holds the lock of a run directory; False without a lock file or without locks."""
    directory = Path(directory)
    if _holds(_key(directory)):
        return True
    if fcntl is None:
        return False
    try:
        with open(directory / LOCK_NAME, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN) and not isinstance(error, PermissionError)
    return False


def read_holder(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Who took the lock last: `host`, `pid`, `start`; empty if nobody or unreadable."""
    directory = Path(directory)
    mine = _held.get(_key(directory))
    try:
        if mine is not None and mine.held:  # opening and closing the file would release the lock
            assert mine._fd is not None
            text = os.pread(mine._fd, 4096, 0)
        else:
            text = (directory / LOCK_NAME).read_bytes()
        holder = json.loads(text)
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _key(directory: Path) -> str:
    return os.path.realpath(directory)


def _holds(key: str) -> bool:
    lock = _held.get(key)
    return lock is not None and lock.held


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('start')}"


def _busy(directory: Path, who: str) -> str:
    return (
        f"{directory} is in use by {who}. Wait for that run to end or stop it; to run beside it, change `name` or "
        "whatever should differ between the two."
    )


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{reason}: nothing stops a second process from using the same run directory", stacklevel=5)
