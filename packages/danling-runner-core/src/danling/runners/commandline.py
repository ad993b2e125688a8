"""The command line of a training script: words into settings, and the text of `--help`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .configfile import parse_scalar
from .keys import ABSENT, KEYS, lookup
from .kinds import split_kind

_OPTION = re.compile(r"--[A-Za-z_]")


class Row(NamedTuple):
    """One line of the table that `RunnerConfig.describe` returns."""

    name: str
    type: str
    default: Any
    identity: bool
    allowed: str
    meaning: str


@dataclass
class Option:
    """One `--key` with the words that followed it; `words` is None for a key without any."""

    key: str
    words: list[str] | None
    written: str


@dataclass
class CommandLine:
    """What a command line asks for."""

    options: list[Option] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    help: bool = False
    problems: list[str] = field(default_factory=list)


def split_arguments(arguments: Iterable[str]) -> CommandLine:
    """Sort the words of a command line into options.

    A word that starts with two dashes and a letter is an option; every other word belongs to the option before it, so
    `-1` is a value. Dashes inside a key stand for underscores.

    Examples:
        >>> line = split_arguments(["--optim.lr=3e-4", "--train-splits", "a", "b", "--log"])
        >>> [(option.key, option.words) for option in line.options]
        [('optim.lr', ['3e-4']), ('train_splits', ['a', 'b']), ('log', None)]
    """
    line = CommandLine()
    current: Option | None = None
    for word in arguments:
        if word in ("-h", "--help"):
            line.help, current = True, None
        elif _OPTION.match(word):
            name, equals, value = word[2:].partition("=")
            current = Option(name.replace("-", "_"), [value] if equals else None, f"--{name}")
            line.options.append(current)
            if equals:  # `--key=value` is complete
                current = None
        elif current is None:
            line.problems.append(f"{word}: unexpected; every setting is given as --key value")
        else:
            current.words = [*(current.words or ()), word]
    files = [option for option in line.options if option.key == "config"]
    line.options = [option for option in line.options if option.key != "config"]
    for option in files:
        if not option.words:
            line.problems.append("--config: needs the path of a YAML or JSON file")
        line.files += option.words or ()
    return line


def read_words(kind: str, words: Sequence[str] | None, key: str) -> Any:
    """Return the value of a kind (see `danling.runners.kinds`) that the words of an option stand for.

    Raises:
        ValueError: when their number or form is wrong; the message says what is needed.
    """
    alternatives, _ = split_kind(kind)
    if words is None:
        if "bool" in alternatives or kind == "any":
            return True
        raise ValueError(f"--{key}: needs a value")
    if "list" in alternatives and not (len(words) == 1 and len(alternatives) > 1 and not words[0].startswith("[")):
        if len(words) == 1 and (words[0].startswith("[") or words[0].lower() in ("none", "null", "")):
            return parse_scalar(words[0])
        return [parse_scalar(word) if alternatives == ["list"] and kind != "list?" else word for word in words]
    if "interval" in alternatives:
        return " ".join(words)
    if len(words) > 1:
        if kind == "any":
            return [parse_scalar(word) for word in words]
        raise ValueError(f"--{key}: takes one value, got {len(words)}: {' '.join(words)}")
    if kind == "any" or "mapping" in alternatives and words[0].lstrip().startswith("{"):
        return parse_scalar(words[0])
    return words[0]


def help_text(prog: str, rows: Sequence[Row], width: int | None = None) -> str:
    """Return the text of `--help`: every key by section with type, default and meaning."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = [
        f"usage: {prog} [--config FILE ...] [--key value ...]",
        "",
        "Keys are given as --key value, --key=value, or --flag and --no-flag; lists take several words.",
        "Files (YAML or JSON) are read first, later ones win, and single keys win over all of them.",
    ]
    heading = ""
    for row in rows:
        head = row.name.split(".")[0] if "." in row.name else "general"
        title = head if row.name in KEYS else "your keys" if head == "general" else f"{head} (yours)"
        if title != heading:
            heading = title
            lines += ["", f"{heading}:"]
        first = f"  --{row.name} {row.type.upper()}"
        default = "" if row.default is ABSENT else f"(default: {_shown(row.default)})"
        indent = " " * 34
        text = textwrap.fill(f"{row.meaning} {default}".strip(), width, initial_indent=indent, subsequent_indent=indent)
        lines.append(f"{first}\n{text}".rstrip() if len(first) > 32 else (first.ljust(34) + text.strip()).rstrip())
    return "\n".join(lines)


def show_help(text: str) -> None:
    """Print a text that whoever reads it (`| head`) need not read to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or "''"


def check_value(
    key: str, words: Sequence[str] | None, annotation: Callable[[Any], Any] | None, untyped: bool = False
) -> Any:
    """Return the typed value of a known key, or of a user's key given the conversion of its annotation.

    Args:
        key: dotted name.
        words: what the command line gives for it.
        annotation: conversion of the user's annotation.
        untyped: the annotation leaves open what the items are, so that they are what they look like.

    Raises:
        ValueError: with the complete line that reports the problem.
    """
    row = lookup(key)
    if row is not None:
        value = read_words(row.kind, words, key)
        try:
            return row.convert(value)
        except ValueError as error:
            raise ValueError(problem(key, value, str(error))) from None
    value = read_words("any", words, key)
    if annotation is None:
        return value
    raw = list(words) if words is not None and len(words) > 1 else words[0] if words else True
    candidates = (raw, [raw], value)  # text as given, a list of one word, what the text looks like
    for candidate in (value, [value], raw) if untyped else candidates:
        try:
            return annotation(candidate)
        except ValueError as error:
            reason = str(error)
    if words is None:
        raise ValueError(f"--{key}: needs a value")
    raise ValueError(problem(key, raw, reason))


def problem(key: str, value: Any, allowed: str) -> str:
    """Return the line that reports a wrong value.

    Examples:
        >>> problem("epochs", "three", "a whole number >= 1 or None")
        "epochs: 'three' (str) is not allowed; give a whole number >= 1 or None"
    """
    kind = "None" if value is None else type(value).__name__
    return f"{key}: {shown(value)}{'' if value is None else f' ({kind})'} is not allowed; give {allowed}"


def shown(value: Any) -> str:
    """Return a value as messages show it: on one line, and not longer than most."""
    text = " ".join(repr(value.dict() if isinstance(value, Mapping) and hasattr(value, "dict") else value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
