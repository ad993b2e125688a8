"""What the user's own config classes declare, and small pieces of validation that need no config object."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args, get_origin

from .aliases import RENAMED, canonical, find
from .configfile import parse_scalar
from .keys import ABSENT, KEYS, TOP_LEVEL
from .kinds import convert_annotation

_CONTAINERS = (list, tuple, set, frozenset, Sequence)


def _users(cls: type) -> list[type]:
    """Return the classes of a config that its user wrote, from the base down."""
    ours = (f"{__package__}.config", "RunnerConfig")
    return [
        base
        for base in reversed(cls.__mro__)
        if base.__module__.split(".")[0] not in ("chanfig", "builtins") and (base.__module__, base.__qualname__) != ours
    ]


def hints_of(cls: type) -> dict[str, Any]:
    """Return what a user's config classes annotate: public names that are not `ClassVar`s.

    Annotations whose names exist for a type checker alone count as `Any`.
    """
    hints: dict[str, Any] = {}
    for base in _users(cls):
        own = base.__dict__.get("__annotations__", {})
        try:
            resolved = typing.get_type_hints(base)
        except Exception:
            resolved = {}
        for name in own:
            hint = resolved.get(name, Any)
            is_class_variable = get_origin(hint) is ClassVar or hint is ClassVar or "ClassVar" in str(own[name])
            if not name.startswith("_") and not is_class_variable:
                hints[name] = hint
    return hints


def class_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults that a subclass declares: annotated attributes, and danling keys without annotation too."""
    defaults: dict[str, Any] = {}
    hints = hints_of(cls)
    for base in _users(cls):
        for name, value in base.__dict__.items():
            is_key = (canonical(name) in TOP_LEVEL or name in RENAMED) and not callable(value)
            if name in hints or is_key and not isinstance(value, (property, classmethod, staticmethod)):
                defaults[name] = value
    return defaults


def default_of(cls: type, name: str) -> Any:
    """Return the default of a key for a config class: the subclass's, else danling's."""
    found, value = find(class_defaults(cls), name)
    return value if found else KEYS[name].default


def held(config: Mapping[Any, Any], name: str, default: Any = ABSENT) -> Any:
    """Return what a configuration holds under a dotted name, else `default`."""
    found, value = find(config, name)
    return value if found else default


def joined(problems: list[str]) -> str:
    """Return one message for all problems."""
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems in the configuration:", *problems])


def converter_of(annotation: Any) -> Callable[[Any], Any]:
    """Return the function that gives a value the annotated type."""
    return lambda value: convert_annotation(annotation, value)


def is_untyped(hint: Any) -> bool:
    """Return whether an annotation leaves open what a value, or the items of a list, are.

    Examples:
        >>> is_untyped(list), is_untyped(list | None), is_untyped(list[int]), is_untyped(list | str)
        (True, True, False, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return all(is_untyped(part) for part in arguments if part is not type(None))
    if origin is not None:
        return origin in _CONTAINERS and all(part in (Any, Ellipsis) for part in arguments)
    return hint is Any or hint is object or hint in _CONTAINERS


def is_required(hint: Any) -> bool:
    """Return whether an annotated key without a default must be given: neither optional nor a section."""
    target = get_origin(hint) or hint
    if isinstance(target, type) and issubclass(target, Mapping):
        return False
    try:
        convert_annotation(hint, None)
    except ValueError:
        return True
    return False


def to_number(value: Any) -> Any:
    """Read numeric text, which YAML 1.1 makes of `1e-3`, as the number it is; leave everything else alone."""
    number = parse_scalar(value) if isinstance(value, str) and value[:1] in "+-.0123456789" and value else value
    return number if isinstance(number, (int, float)) else value
