"""The nested dictionary that containers return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class RoundDict(dict):
    """A nested mapping of results with attribute access, rounding and formatting.

    Leaves are numbers or tensors; mappings given as values become `RoundDict`s.

    Examples:
        >>> result = RoundDict({"acc": 0.91234, "task": {"f1": 0.51239}})
        >>> result.task.f1
        0.51239
        >>> round(result, 2)
        RoundDict({'acc': 0.91, 'task': {'f1': 0.51}})
        >>> f"{result:.3f}"
        'acc: 0.912, task.f1: 0.512'
        >>> print(result.round(3))
        acc     : 0.912
        task.f1 : 0.512
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, Mapping) and not isinstance(value, RoundDict):
            value = RoundDict(value)
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set items from mappings, pairs or keywords, as `dict.update` does."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no key {name!r}; it has {list(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_plain(self, lists=False)!r})"

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)

    def copy(self) -> RoundDict:
        """Return a copy of the mapping; the leaves are shared."""
        return type(self)({k: v.copy() if isinstance(v, RoundDict) else v for k, v in self.items()})

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield `(dotted path, leaf)` pairs in order."""
        for key, value in self.items():
            path = f"{prefix}{key}"
            if isinstance(value, RoundDict):
                yield from value.leaves(f"{path}.")
            else:
                yield path, value

    def round(self, ndigits: int = 4) -> RoundDict:
        """Return a new object with every number and tensor rounded to `ndigits` decimals."""
        return type(self)({key: _round(value, ndigits) for key, value in self.items()})

    def __round__(self, ndigits: int = 4) -> RoundDict:
        return self.round(ndigits)

    def dict(self) -> dict[str, Any]:
        """Return plain dictionaries with tensors as lists or numbers, ready for JSON."""
        return _plain(self, lists=True)

    def __format__(self, spec: str) -> str:
        return ", ".join(f"{path}: {format_leaf(value, spec)}" for path, value in self.leaves())

    def __str__(self) -> str:
        pairs = list(self.leaves())
        width = max((len(path) for path, _ in pairs), default=0)
        return "\n".join(f"{path:<{width}} : {format_leaf(value, '')}" for path, value in pairs)


def format_leaf(value: Any, spec: str) -> str:
    """Format a number, or each number of a tensor, by `spec`."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_leaf(item, spec) for item in value) + "]"
    return format(value, spec) if isinstance(value, (int, float)) else str(value)


def _round(value: Any, ndigits: int) -> Any:
    if isinstance(value, RoundDict):
        return value.round(ndigits)
    if isinstance(value, Tensor):
        return torch.round(value, decimals=ndigits) if value.is_floating_point() else value
    return round(value, ndigits) if isinstance(value, float) else value


def _plain(value: Any, lists: bool) -> Any:
    if isinstance(value, RoundDict):
        return {key: _plain(item, lists) for key, item in value.items()}
    return value.tolist() if lists and isinstance(value, Tensor) else value
