"""Decorators: optional parentheses, contained failures, and properties that create their directory."""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

Errors = type[BaseException] | tuple[type[BaseException], ...]

_short = reprlib.Repr()
_short.maxother = _short.maxstring = _short.maxlong = 200


def flexible_decorator(factory: Callable[..., Callable]) -> Callable[..., Any]:
    """Let a decorator factory be used without parentheses as well: `@deco`, `@deco()` and `@deco(x=1)`.

    A single positional argument that can be called is what is decorated, except for types of exceptions; other
    callables are handed to the factory by keyword.

    Args:
        factory: function of optional arguments that returns a decorator. Its name, docstring and signature are kept.

    Raises:
        TypeError: an argument of the factory is not optional.

    Examples:
        >>> @flexible_decorator
        ... def scaled(by=2):
        ...     return lambda function: lambda x: by * function(x)
        >>> @scaled
        ... def double(x):
        ...     return x
        >>> @scaled(by=3)
        ... def triple(x):
        ...     return x
        >>> double(1), triple(1)
        (2, 3)
    """
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise TypeError(f"{factory.__qualname__} needs {parameter.name!r}: give it a default")

    @functools.wraps(factory)
    def decorator(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]) and not _is_error(args[0]):
            return factory()(args[0])
        return factory(*args, **kwargs)

    return decorator


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def print_exc(error: BaseException, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Print the traceback of an error and the call that raised it to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    shown = [_show(value) for value in args] + [f"{name}={_show(value)}" for name, value in kwargs.items()]
    name = getattr(function, "__qualname__", None) or _show(function)
    print(f"raised by {name}({', '.join(shown)})", file=sys.stderr)


def _show(value: Any) -> str:
    try:
        return _short.repr(value)
    except Exception:  # an object in a bad state must not hide the error that is being reported
        return f"<{type(value).__name__}>"


@flexible_decorator
def catch(
    error: Errors = Exception,
    exclude: Errors | None = None,
    callback: Callable[..., Any] = print_exc,
    *callback_args: Any,
    **callback_kwargs: Any,
) -> Callable[[Callable], Callable]:
    """Contain the failures of a function: report the error and return `None`.

    For optional work, whose failure must not stop what is important. `KeyboardInterrupt` and `SystemExit` pass unless
    they are named. Coroutine functions stay coroutine functions.

    Args:
        error: type of error, or tuple of types, to contain.
        exclude: types among these that pass.
        callback: called as `callback(error, function, args, kwargs, *callback_args, **callback_kwargs)`. The default
            prints the traceback and the call to stderr.
        *callback_args: further arguments of the callback.
        **callback_kwargs: further keyword arguments of the callback.

    Examples:
        >>> @catch(ZeroDivisionError, callback=lambda error, function, args, kwargs: print(f"{error}: {args}"))
        ... def inverse(x):
        ...     return 1 / x
        >>> inverse(0)
        division by zero: (0,)
        >>> inverse(4)
        0.25
    """

    def decorate(function: Callable) -> Callable:
        def contain(caught: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            callback(caught, function, args, kwargs, *callback_args, **callback_kwargs)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                try:
                    return await function(*args, **kwargs)
                except BaseException as caught:
                    if not matches(caught, error, exclude):
                        raise
                    contain(caught, args, kwargs)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                try:
                    return function(*args, **kwargs)
                except BaseException as caught:
                    if not matches(caught, error, exclude):
                        raise
                    contain(caught, args, kwargs)

        return wrapper

    return decorate


def matches(caught: BaseException, error: Errors, exclude: Errors | None) -> bool:
    """Return whether an error is of a type in `error` and of none in `exclude`; a request to leave must be named."""
    if not isinstance(caught, error) or (exclude is not None and isinstance(caught, exclude)):
        return False
    leaving = (KeyboardInterrupt, SystemExit)
    if not isinstance(caught, leaving):
        return True
    named = error if isinstance(error, tuple) else (error,)
    return isinstance(caught, tuple(kind for kind in named if issubclass(kind, leaving)))


class ensure_dir(property):
    """A property that creates the directory it returns, with parents, whenever it is read; `None` passes through.

    Examples:
        >>> import tempfile
        >>> class Run:
        ...     def __init__(self, root):
        ...         self.root = root
        ...     @ensure_dir
        ...     def logs(self):
        ...         return os.path.join(self.root, "a", "logs")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.path.isdir(Run(folder).logs)
        True
    """

    def __init__(self, fget: Any = None, fset: Any = None, fdel: Any = None, doc: str | None = None) -> None:
        if isinstance(fget, property):
            fget, fset, fdel, doc = fget.fget, fset or fget.fset, fdel or fget.fdel, doc or fget.__doc__
        super().__init__(fget, fset, fdel, doc)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = super().__get__(instance, owner)
        if instance is not None and value is not None:
            os.makedirs(value, exist_ok=True)
        return value
