"""The errors of danling's runner: one name for each kind of trouble a caller may want to tell apart."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used: unknown keys, wrong values, contradictions; the message lists them all."""


class UsageError(ConfigError, SystemExit):
    """A command line that cannot be used.

    It is a `ConfigError` for whoever catches one, and a `SystemExit` with status 2 for the interpreter, so that a
    script started with a misspelt option ends with the message alone and no traceback. The message has been written
    to standard error by the time this is raised.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


class ResumeError(ValueError):
    """A checkpoint that this run cannot continue from, because configuration, components or layout differ."""


class StackError(ValueError):
    """No runner can be chosen for the requested stack."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged, incomplete or unreadable."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class RunBusyError(RuntimeError):
    """Another live process holds the run directory."""
