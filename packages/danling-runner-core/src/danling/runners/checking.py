"""Names, types and ranges of a configuration: every value gets its type in place, and every problem a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chanfig import Config, Variable

from .aliases import SYNONYMS
from .commandline import problem, shown
from .configfile import plain
from .declared import converter_of, hints_of, is_required, to_number
from .errors import ConfigError
from .keys import (
    CONSTRUCTOR_SECTIONS,
    ENVIRONMENT,
    KEYS,
    SECTIONS,
    SPLIT_SECTIONS,
    TOP_LEVEL,
    lookup,
    nearest,
    one_edit_away,
)
from .kinds import annotation_name


def check(config: Config) -> list[str]:
    """Convert every value to its type in place; return a line for each that cannot be."""
    _drop_empty(config)
    _unwrap_variables(config)
    problems: list[str] = []
    hints, own = hints_of(type(config)), config.__dict__.get("_own", ())
    for name, value in list(config.items()):
        if name in SECTIONS:
            problems += _check_section(config, name, value)
        elif name in KEYS:
            problems += _convert_in(config, name, name, KEYS[name].convert)
        elif name in hints:
            problems += _convert_in(config, name, name, converter_of(hints[name]))
            section = dict.get(config, name)
            if isinstance(section, Config):
                problems += _check_user(name, section)
        elif name in own:
            continue
        elif isinstance(value, Mapping) and name not in ENVIRONMENT:
            near = next(
                (key for key in sorted(TOP_LEVEL | SYNONYMS.keys()) if len(key) >= 5 and one_edit_away(str(name), key)),
                None,
            )
            if near:
                problems.append(f"{name}: unknown section, one letter away from {near!r}; did you mean {near!r}?")
            else:
                problems += _check_user(str(name), value)
        else:
            problems.append(unknown(config, str(name), value))
    for name, hint in hints.items():
        if name not in config and name not in TOP_LEVEL and is_required(hint):
            problems.append(
                f"{name}: missing; {type(config).__name__} declares it as {annotation_name(hint)} without a default"
            )
    return problems


def _check_section(config: Config, path: str, value: Any) -> list[str]:
    if value is None:
        dict.pop(config, path, None) if "." not in path else None
        config.__dict__.pop(path, None)
        return []
    if not isinstance(value, Config):
        hint = "; a checkpoint to continue from is now given as 'resume'" if path == "checkpoint" else ""
        example = next(key for key in KEYS if key.startswith(f"{path}."))
        return [problem(path, value, f"a section with keys such as {example!r}") + hint]
    problems: list[str] = []
    for name, item in list(value.items()):
        full = f"{path}.{name}"
        key = lookup(full)
        if full in SECTIONS:
            if item is None:
                value.pop(name)
            elif isinstance(item, Config):
                problems += _check_section(config, full, item)
            else:
                problems.append(problem(full, item, "a section"))
        elif key is not None:
            problems += _convert_in(value, name, full, key.convert)
        elif path in CONSTRUCTOR_SECTIONS:
            value.set(name, to_number(item), convert_mapping=False)
        elif path in SPLIT_SECTIONS and isinstance(item, Config):
            problems += _check_section(config, full, item)
        else:
            leaves = [k for k in KEYS if k.startswith(f"{path.split('.')[0]}.")]
            problems.append(f"{full}: unknown key (value {shown(item)}); did you mean {nearest(full, leaves)!r}?")
    return problems


def unknown(config: Config, name: str, value: Any) -> str:
    """Return the line about a name that is neither danling's nor declared."""
    if name in ENVIRONMENT:
        return f"{name}: {shown(value)} is no configuration key; the environment variable {name.upper()} says it"
    names = KEYS.keys() | TOP_LEVEL | hints_of(type(config)).keys() | {key for key in config if key != name}
    return (
        f"{name}: unknown key (value {shown(value)}); did you mean {nearest(name, names)!r}? A key of your own "
        f"goes into a section of your own (model.{name}), or is annotated on a subclass of RunnerConfig "
        f"({name}: {type(value).__name__})"
    )


def _convert_in(section: Config, name: Any, path: str, convert: Callable[[Any], Any]) -> list[str]:
    value = dict.get(section, name)
    try:
        typed = convert(value)
    except ValueError as error:
        return [problem(path, value, str(error))]
    if typed is not value:
        dict.__setitem__(section, name, typed)
        section.set(name, typed, convert_mapping=False)
    return []


def _check_user(path: str, section: Mapping[Any, Any]) -> list[str]:
    """Type a section of the user's own by its annotations; anything else in it must be a value files can hold."""
    problems: list[str] = []
    hints = hints_of(type(section)) if isinstance(section, Config) else {}
    for name, value in list(section.items()):
        full = f"{path}.{name}"
        if name in hints:
            problems += _convert_in(section, name, full, converter_of(hints[name]))  # type: ignore[arg-type]
            value = section[name]
        if isinstance(value, Mapping):
            problems += _check_user(full, value)
        else:
            try:
                plain(value, full)
            except ConfigError as error:
                problems.append(str(error))
    return problems


def _drop_empty(section: Config) -> None:
    """Remove sections that only a read has made."""
    for name, value in list(section.items()):
        if isinstance(value, Config):
            _drop_empty(value)
            if not value and value.getattr("made_by_a_read", False):
                dict.pop(section, name)
                section.__dict__.pop(name, None)


def _unwrap_variables(section: Config) -> None:
    """Put the plain value in place of each of chanfig's interpolated variables."""
    for name, value in list(section.items()):
        if isinstance(value, Config):
            _unwrap_variables(value)
        elif issubclass(type(value), Variable):
            dict.__setitem__(section, name, value.value)
            section.set(name, value.value, convert_mapping=False)
        elif type(value) is list and any(issubclass(type(item), Variable) for item in value):
            value[:] = [item.value if issubclass(type(item), Variable) else item for item in value]
