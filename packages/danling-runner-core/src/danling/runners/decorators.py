"""Methods that run on one process only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def _only_where(flag: str) -> Callable[[F], F]:
    def decorate(method: F) -> F:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(self, *args, **kwargs) if getattr(self, flag) else None

        return run  # type: ignore[return-value]

    return decorate


def on_main_process(method: F) -> F:
    """Run a runner's method on the main process (rank 0) only; elsewhere it returns None.

    The other ranks do not wait. What is decorated must therefore hold no collective.

    Examples:
        >>> class Example:
        ...     is_main_process = True
        ...     @on_main_process
        ...     def report(self):
        ...         return "written"
        >>> example = Example()
        >>> example.report()
        'written'
        >>> example.is_main_process = False
        >>> example.report() is None
        True
    """
    return _only_where("is_main_process")(method)


def on_local_main_process(method: F) -> F:
    """Run a runner's method on the first process of each machine only; elsewhere it returns None.

    Examples:
        >>> class Example:
        ...     is_local_main_process = False
        ...     @on_local_main_process
        ...     def download(self):
        ...         return "done"
        >>> Example().download() is None
        True
    """
    return _only_where("is_local_main_process")(method)
