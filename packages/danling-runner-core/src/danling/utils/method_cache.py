"""A least-recently-used cache for methods that leaves the instances alone."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from .decorators import flexible_decorator


@flexible_decorator
def method_cache(maxsize: int | None = 128, typed: bool = False) -> Callable[[Callable], Any]:
    """Cache the results of a method, for each instance on its own.

    Instances are told apart by identity and held weakly: they may be unhashable, are collected, copied and pickled as
    without the cache, and a copy starts with an empty one. `instance.method.cache_info()` and `.cache_clear()` are
    those of `functools.lru_cache`. A cached result that refers to its instance keeps it alive.

    Args:
        maxsize: number of results kept per instance; `None` keeps all.
        typed: whether arguments of different types are different, such as 1 and 1.0.

    Raises:
        TypeError: the method is a coroutine function, whose result can be awaited only once; or, when it is called, its
            instance cannot be referred to weakly.

    Examples:
        >>> class Vocabulary:
        ...     @method_cache
        ...     def look_up(self, token):
        ...         print("looking up", token)
        ...         return len(token)
        >>> vocabulary = Vocabulary()
        >>> vocabulary.look_up("word"), vocabulary.look_up("word")
        looking up word
        (4, 4)
        >>> vocabulary.look_up.cache_info().hits
        1
    """
    return functools.partial(_CachedMethod, maxsize=maxsize, typed=typed)


class _CachedMethod:
    """The descriptor in the class. It keeps one `lru_cache` per living instance, found by the instance's id.

    There is no lock: single operations on a dict are atomic, and so is `lru_cache`.
    """

    def __init__(self, function: Callable, maxsize: int | None, typed: bool) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__qualname__} is a coroutine function: its result can be awaited only once")
        functools.update_wrapper(self, function)
        self.function = function
        self.maxsize = maxsize
        self.typed = typed
        self.caches: dict[int, tuple[weakref.ref, Any]] = {}

    def __call__(self, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.cache_of(instance)(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _BoundCache(self, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.maxsize, self.typed)

    def cache_of(self, instance: Any) -> Any:
        """Return the cached function that belongs to an instance."""
        key = id(instance)
        entry = self.caches.get(key)
        if entry is None or entry[0]() is not instance:
            if entry is not None:
                self.forget(key, entry[0])
            entry = self.caches.setdefault(key, self.make(instance))
        return entry[1]

    def make(self, instance: Any) -> tuple[weakref.ref, Any]:
        """Return a weak reference to the instance and a cached function that holds no other."""
        key = id(instance)
        try:
            reference = weakref.ref(instance, lambda gone: self.forget(key, gone))
        except TypeError as error:
            raise TypeError(
                f"method_cache refers to {type(instance).__name__} weakly: add '__weakref__' to its __slots__"
            ) from error

        @functools.wraps(self.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.function(reference(), *args, **kwargs)

        return reference, functools.lru_cache(self.maxsize, self.typed)(call)

    def forget(self, key: int, reference: weakref.ref) -> None:
        """Drop the cache of an instance that is gone, unless the id belongs to another one by now."""
        entry = self.caches.get(key)
        if entry is not None and entry[0] is reference:
            self.caches.pop(key, None)


class _BoundCache:
    """What reading the method from an instance gives: like a bound method, it keeps the instance alive."""

    __slots__ = ("__self__", "__weakref__", "_method")

    def __init__(self, method: _CachedMethod, instance: Any) -> None:
        self._method = method
        self.__self__ = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method.cache_of(self.__self__)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Names, docstrings and `cache_info`, `cache_clear`, `cache_parameters` are those of the cached function.
        return getattr(self._method.cache_of(self.__self__), name)

    def __repr__(self) -> str:
        return f"<cached method {self._method.function.__qualname__} of {self.__self__!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BoundCache) and other._method is self._method and other.__self__ is self.__self__

    def __hash__(self) -> int:
        return hash((id(self._method), id(self.__self__)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, self._method.function.__name__)
