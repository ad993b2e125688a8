"""Change the class of a module where it stands, so that names, parameters, hooks and `isinstance` stay what they are."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


@cache
def _combined(mixin: Any, cls: Any) -> Any:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": mixin.__module__})


def become(module: nn.Module, mixin: type) -> None:
    """Give a module the behaviour of `mixin` on top of its own class, once."""
    if not isinstance(module, mixin):
        cls: Any = type(module)
        module.__class__ = _combined(mixin, cls)


def inherits(module: Any, base: type, *methods: str) -> bool:
    """Whether a module is a `base` with that class's own `methods`: what was overridden may compute something else.

    Example:
        >>> inherits(nn.Linear(1, 1), nn.Linear, "forward"), inherits(nn.ReLU(), nn.Linear, "forward")
        (True, False)
    """
    return isinstance(module, base) and all(getattr(type(module), name) is getattr(base, name) for name in methods)
