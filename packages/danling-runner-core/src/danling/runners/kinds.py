"""The types of configuration values: how a value given in Python, a file or on the command line becomes a typed one.

A kind is written as it appears in the documentation: alternatives joined by `|`, a trailing `?` when None is allowed,
for example `int?` or `bool|mapping?`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

from .interval import Interval

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NONE = {"null", "none", ""}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|inf|nan)", re.IGNORECASE)

NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "mapping": "a mapping",
    "interval": "a whole number, '500 steps' or '2 epochs', or 0 for never",
    "any": "anything",
}
_EXACT: dict[str, type | tuple[type, ...]] = {
    "bool": bool, "int": int, "float": float, "str": str, "list": list, "mapping": Mapping
}  # fmt: skip


def to_bool(value: Any) -> bool:
    """Accept true/false, yes/no, on/off and 1/0 in any case."""
    text = str(value).strip().lower()
    if isinstance(value, (bool, int, str)):
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
    raise ValueError(NAMES["bool"])


def to_float(value: Any) -> float:
    """Accept numbers and numeric text; a bool is not a number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(NAMES["float"])


def to_int(value: Any) -> int:
    """Accept whole numbers, also written as `1e3` or as text; a bool is not an int."""
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+\s*", value):
        return int(value)
    try:
        number = to_float(value)
    except ValueError:
        raise ValueError(NAMES["int"]) from None
    if not number.is_integer():
        raise ValueError(NAMES["int"])
    return int(number)


def to_str(value: Any) -> str:
    """Accept text and paths; enumerations with a text value give it."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum) and isinstance(value.value, str):
        return value.value
    if isinstance(value, str):
        return value
    raise ValueError(NAMES["str"])


def to_list(value: Any) -> list[Any]:
    """Accept lists and tuples."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    raise ValueError(NAMES["list"])


def to_mapping(value: Any) -> Mapping[str, Any]:
    """Accept mappings."""
    if isinstance(value, Mapping):
        return value
    raise ValueError(NAMES["mapping"])


def to_interval(value: Any) -> int | str:
    """Accept what `Interval.parse` accepts; a count without a unit stays a number."""
    try:
        interval = Interval.parse(value, "epochs")
    except ValueError:
        raise ValueError(NAMES["interval"]) from None
    has_unit = isinstance(value, Interval) or isinstance(value, str) and value.strip()[-1].isalpha()
    return f"{interval.count} {interval.unit}" if has_unit else interval.count


CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "bool": to_bool,
    "int": to_int,
    "float": to_float,
    "str": to_str,
    "list": to_list,
    "mapping": to_mapping,
    "interval": to_interval,
    "any": lambda value: value,
}


def split_kind(kind: str) -> tuple[list[str], bool]:
    """Return the alternatives of a kind, and whether None is one of them."""
    return kind.rstrip("?").split("|"), kind.endswith("?")


def allowed(kind: str) -> str:
    """Return in words what a kind allows.

    Examples:
        >>> allowed("int?")
        'a whole number or None'
    """
    alternatives, optional = split_kind(kind)
    return " or ".join([NAMES[name] for name in alternatives] + ["None"] * optional)


def convert(kind: str, value: Any) -> Any:
    """Return `value` as the kind it should have.

    Raises:
        ValueError: when it is none of the alternatives; the message says what is allowed.

    Examples:
        >>> convert("int?", 1e3), convert("int?", "none"), convert("float", "3e-4"), convert("bool", "Off")
        (1000, None, 0.0003, False)
    """
    alternatives, optional = split_kind(kind)
    if optional and (value is None or isinstance(value, str) and value.strip().lower() in _NONE):
        return None
    if len(alternatives) > 1:  # the type it already has wins over one it could be read as: 1 is an int before a bool
        for name in alternatives:
            if type(value) is _EXACT.get(name):
                return value
    for name in alternatives:
        try:
            return CONVERTERS[name](value)
        except ValueError:
            continue
    raise ValueError(allowed(kind))


def annotation_name(annotation: Any) -> str:
    """Return an annotation as it is shown to a user.

    Examples:
        >>> annotation_name(int), annotation_name(float | None), annotation_name(list[int])
        ('int', 'float?', 'list[int]')
    """
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return "|".join(map(annotation_name, parts)) + "?" * (len(parts) < len(get_args(annotation)))
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return (
        annotation.__name__
        if isinstance(annotation, type) and not get_args(annotation)
        else str(annotation).replace("typing.", "")
    )


def convert_annotation(annotation: Any, value: Any) -> Any:
    """Return `value` as the type a class attribute was annotated with.

    Understands the plain types, None, unions, `Literal`, `Enum`, paths, and lists, tuples, sets and mappings of these.
    A type it does not know must be an instance's own.

    Raises:
        ValueError: when the value does not fit; the message says what is allowed.

    Examples:
        >>> convert_annotation(list[float], ["1e-3", 2])
        [0.001, 2.0]
        >>> convert_annotation(int | None, "none") is None
        True
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object:
        return value
    if annotation is None or annotation is type(None):
        return (
            convert("str?", value) if value is None or value == "" or str(value).lower() in _NONE else _reject("None")
        )
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or isinstance(value, str) and value.strip().lower() in _NONE):
            return None
        for part in arguments:
            if isinstance(part, type) and type(value) is part:
                return value
        for part in arguments:
            if part is not type(None):
                try:
                    return convert_annotation(part, value)
                except ValueError:
                    continue
        _reject(annotation_name(annotation))
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value or isinstance(value, str) and str(choice) == value:
                return choice
        _reject(f"one of {', '.join(map(str, arguments))}")
    target = origin or annotation
    if not isinstance(target, type):  # a TypeVar, NewType or string that cannot be resolved: nothing to hold it to
        return value
    if target in (bool, int, float, str):
        return convert(target.__name__, value)
    if issubclass(target, Enum):
        for member in target:
            if (
                value is member
                or value == member.value
                or isinstance(value, str)
                and value.lower() == member.name.lower()
            ):
                return member
        _reject(f"one of {', '.join(str(member.value) for member in target)}")
    if issubclass(target, PurePath):
        return target(to_str(value))
    if issubclass(target, Mapping):
        if isinstance(value, Mapping) and len(arguments) == 2:
            for key in list(value):
                value[key] = convert_annotation(arguments[1], value[key])  # type: ignore[index]
        return to_mapping(value)
    if target in (list, tuple, set, frozenset, Sequence):
        items = value if isinstance(value, (set, frozenset)) else to_list(value)
        make: Any = list if target is Sequence else target
        if target is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(items) != len(arguments):
                _reject(f"{len(arguments)} values")
            return tuple(convert_annotation(part, item) for part, item in zip(arguments, items, strict=True))
        return make(convert_annotation(arguments[0], item) for item in items) if arguments else make(items)
    if isinstance(value, target):
        return value
    return _reject(annotation_name(annotation))


def _reject(allowed: str) -> Any:
    raise ValueError(allowed)
