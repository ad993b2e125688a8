"""Configuration as text: YAML and JSON in and out, and the plain values both can hold.

YAML 1.1, which PyYAML implements, reads `1e-3` as text, `12:30` as the number 750 and `2026-01-31` as a date object.
The loader here reads the first as a number and the other two as text; the dumper quotes what the loader would read as
something else, so that every configuration comes back as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from enum import Enum
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import yaml

from .errors import ConfigError

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][\d_]*|0x[0-9a-fA-F]+|0o[0-7]+)")
_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}


def _int(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node).replace("_", ""), 0)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the number syntax of YAML 1.2, and no dates."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows what `_Loader` takes for a number, so that such text is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789.")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def plain(value: Any, where: str = "value") -> Any:
    """Return a copy of `value` made of what JSON and YAML can hold: mappings, lists, text, numbers, booleans, None.

    Paths and dates become text, enumerations their value, tuples and sets lists, classes and functions
    `"module:qualified.name"`, 0-dimensional arrays and tensors numbers.

    Raises:
        ConfigError: for any other object, naming `where` it is.

    Examples:
        >>> plain({"size": (3, 4), "root": PurePath("data")})
        {'size': [3, 4], 'root': 'data'}
    """
    if value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum):
        return value if type(value) in (type(None), bool, int, float, str) else _base(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, (str, int)) else str(key): plain(item, f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, where) for item in value), key=lambda item: (type(item).__name__, str(item)))
    if isinstance(value, Enum):
        return plain(value.value, where)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}:{value.__qualname__}"
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), where)
    raise ConfigError(
        f"{where}: {type(value).__module__}.{type(value).__qualname__} cannot be written to a configuration file; "
        "keep numbers, text, lists and mappings in the configuration and build the object from them"
    )


def _base(value: Any) -> Any:
    """Return a subclass instance of a plain type (numpy.float64, a str subclass) as the plain type itself."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise AssertionError(type(value))


def dump_yaml(value: Any) -> str:
    """Return `value` as YAML text that `parse_yaml` reads back as the same value.

    Examples:
        >>> print(dump_yaml({"lr": 0.001, "tag": "1e-3"}), end="")
        lr: 0.001
        tag: '1e-3'
    """
    return yaml.dump(plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str) -> Any:
    """Return the value that YAML text stands for, with YAML 1.2 numbers and without dates.

    Examples:
        >>> parse_yaml("{lr: 1e-3, start: 2026-01-31, at: 12:30}")
        {'lr': 0.001, 'start': '2026-01-31', 'at': '12:30'}
    """
    return yaml.load(text, Loader=_Loader)


def parse_scalar(text: str) -> Any:
    """Return what a word of the command line stands for when no type is declared; text when it is nothing else.

    Examples:
        >>> [parse_scalar(word) for word in ("3", "1e-3", "true", "none", "[1, 2]", "resnet")]
        [3, 0.001, True, None, [1, 2], 'resnet']
    """
    if text.lower() == "none":
        return None
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, Mapping) and not text.lstrip().startswith("{") else value


def read_mapping(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a configuration file, YAML or JSON by its extension.

    Raises:
        ConfigError: when the file is missing, cannot be parsed or does not hold a mapping; the message names the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"configuration file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not valid: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"configuration file {path} holds a {type(value).__name__}; a mapping of keys is needed")
    return value
