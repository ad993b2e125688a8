"""Names and places of the arguments of torch functions, for rules that name their own otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MISSING: Any = inspect.Parameter.empty
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_OTHER_NAMES = {"self": "input", **_NUMPY_NAMES}


class Argument(NamedTuple):
    """One argument of a torch function; `default` is `inspect.Parameter.empty` where it has none."""

    name: str
    default: Any
    keyword_only: bool
    tensor: bool | None


@cache
def signatures(func: Any) -> tuple[tuple[Argument, ...], ...]:
    """The overloads of a torch function; empty where torch does not tell."""
    if isinstance(func, torch._ops.OpOverload):
        return (_of_schema(func._schema),)
    if isinstance(func, torch._ops.OpOverloadPacket):
        return tuple(_of_schema(getattr(func, name)._schema) for name in func.overloads())
    if inspect.isfunction(func):
        try:
            parameters = inspect.signature(func).parameters.values()
        except ValueError:  # it wraps a method of C, which does not tell
            return ()
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return ()
        return (tuple(Argument(p.name, p.default, p.kind == p.KEYWORD_ONLY, None) for p in parameters),)
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return ()
    return tuple(map(_of_schema, torch._C._jit_get_schemas_for_operator(f"aten::{name}")))


def _of_schema(schema: Any) -> tuple[Argument, ...]:
    return tuple(
        Argument(
            "input" if a.name == "self" else a.name,
            a.default_value if a.has_default_value() else _MISSING,
            a.kwarg_only,
            "Tensor" in str(a.type),
        )
        for a in schema.arguments
    )


def foreign(func: Any, rule: Callable[..., Any]) -> frozenset[str]:
    """Argument names of a torch function that its rule (called as `rule(func, *args, **kwargs)`) does not know."""
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    own = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    count = None
    if any(p.kind == p.VAR_KEYWORD for p in parameters):  # passes on what it does not name itself
        count = sum(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
    if inspect.isfunction(func):
        others: dict[str, str] = {}
    elif isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        others = {"self": "input"}
    else:
        others = _NUMPY_NAMES
    first = int(isinstance(func, (MethodDescriptorType, WrapperDescriptorType)))  # which no keyword can name
    wanted = {a.name for arguments in signatures(func) for a in arguments[first:count]}
    wanted |= {alias for alias, name in others.items() if name in wanted}
    return frozenset(wanted - own - {"out"})


def by_position(func: Any, unknown: frozenset[str], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same call with the arguments in `unknown` given by position, where torch has a place for them."""
    for arguments in signatures(func):
        names = [a.name for a in arguments]
        given = {name if name in names else _OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}
        places = [a for a in arguments if not a.keyword_only]
        rest = places[len(args) :]
        if len(args) > len(places) or not given.keys() <= {a.name for a in arguments[len(args) :]}:
            continue
        if any(a.default is _MISSING and a.name not in given for a in rest):
            continue
        moved = {_OTHER_NAMES.get(name, name) if name not in names else name for name in unknown & kwargs.keys()}
        count = max((i + 1 for i, a in enumerate(rest) if a.name in moved), default=0)
        lead = [given.pop(a.name, a.default) for a in rest[:count]]
        return (*args, *lead), given
    return args, kwargs


def names_of_places(func: Any, args: Any) -> tuple[str, ...]:
    """Names of the positional arguments of a call, by the first overload that takes such arguments; empty if unknown."""
    for arguments in signatures(func):
        places = [a for a in arguments if not a.keyword_only]
        if len(args) <= len(places) and all(
            a.tensor is None or isinstance(value, Tensor) <= a.tensor and (not a.tensor or not isinstance(value, int))
            for a, value in zip(places, args)
        ):
            return tuple(a.name for a in places)
    return ()
