"""`RunnerConfig`: the typed, closed configuration of a run.

Only this module and `checking`, which it alone uses, import chanfig, which imports torch when torch is installed. chanfig
supplies attribute access, sections made on first touch, interpolation and files; types, closedness, identity and the
command line are danling's, because chanfig converts by calling the annotated type (`bool("false")` is True, `int(1.5)` is
1), takes unknown arguments with a warning at most, and ignores the file a command line names.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from os import PathLike
from typing import Any, ClassVar, Self

from chanfig import Config
from chanfig.utils import Null

from .aliases import RENAMED, canonical, conflict, place, translate, warn_renamed
from .checking import check, unknown
from .commandline import CommandLine, Row, check_value, help_text, show_help, split_arguments
from .configfile import dump_yaml, parse_yaml, plain, read_mapping
from .contradictions import contradictions, misgivings
from .declared import (
    class_defaults,
    converter_of,
    default_of,
    held,
    hints_of,
    is_untyped,
    joined,
)
from .errors import ConfigError, UsageError
from .identity import differences, identity_view
from .keys import (
    ABSENT,
    KEYS,
    TOP_LEVEL,
    lookup,
)
from .kinds import annotation_name, split_kind


def _made_by_a_read(*args: Any, **kwargs: Any) -> Config:
    """Return the section that reading a missing name creates; it disappears again if nothing is put into it.

    chanfig calls the same factory with a mapping, to make a section of it.
    """
    if args or kwargs:
        return _tree(dict(*args, **kwargs))
    section = Config(default_factory=_made_by_a_read)
    section.setattr("made_by_a_read", True)
    return section


def _tree(mapping: Mapping[Any, Any]) -> Config:
    """Return a mapping as a section; sections that are already chanfig configs keep their class."""
    section = Config(default_factory=_made_by_a_read)
    for key, value in mapping.items():
        name = str(key)
        if isinstance(value, Mapping) and not isinstance(value, Config):
            value = _tree(value)
        if "." in name:  # a dotted name inside a section nests as it does at the top
            head, _, rest = name.partition(".")
            if not isinstance(dict.get(section, head), Config):
                section.set(head, _tree({}), convert_mapping=False)
            section[head].merge(_tree({rest: value}))
        elif isinstance(value, Config) and isinstance(dict.get(section, name), Config):
            section[name].merge(value)
        else:
            section.set(name, value, convert_mapping=False)
    return section


class _Meta(type(Config)):  # type: ignore[misc]
    """Makes instances whose arguments win over what a subclass sets in `__init__`.

    chanfig's own check at construction is left out: a configuration is complete once it is parsed.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = type.__call__(cls, *args, **kwargs)
        for name, value in instance.__dict__.pop("_given", ()):
            instance._put(name, value)
        instance.__post_init__()
        return instance


class RunnerConfig(Config, metaclass=_Meta):
    """The configuration of a run: typed, closed, and readable by attribute or dotted name.

    Every key of danling is there with its default from the start; sections of your own (`model`, `data`, ...) appear on
    first touch and hold what you put into them. Keys of your own at the top level are annotated on a subclass.

    Args:
        *args: at most one mapping, or the path of a YAML or JSON file.
        **kwargs: keys; dotted names need a mapping.

    Attributes:
        identity_exclude: names of your own keys or sections that do not identify a run, such as the place of the data.

    Examples:
        >>> class Config(RunnerConfig):
        ...     epochs: int = 3
        ...     width: int = 64
        >>> config = Config({"optim.type": "adamw"}).parse(["--optim.lr", "3e-4", "--width=32", "--no-log"])
        >>> config.epochs, config.optim.lr, config["optim.type"], config.width, config.log
        (3, 0.0003, 'adamw', 32, False)
        >>> config.identity()
        {'optim.lr': 0.0003, 'optim.type': 'adamw', 'width': 32}
        >>> RunnerConfig(epochs="three").validate()
        Traceback (most recent call last):
        danling.runners.errors.ConfigError: epochs: 'three' (str) is not allowed; give a whole number >= 1 or None
    """

    identity_exclude: ClassVar[Iterable[str]] = ()

    # chanfig caches here whether it converts by annotation; danling converts itself
    _has_annotations_ = False
    class_defaults_: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._has_annotations_ = False
        cls.class_defaults_ = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1:
            raise TypeError(f"{type(self).__name__} takes one mapping or path, got {len(args)} positional arguments")
        super().__init__(default_factory=_made_by_a_read)
        self.__dict__["_conflicts"] = []
        self.__dict__["_given"] = []
        defaults, _ = translate(class_defaults(type(self)))
        self._fill(deepcopy(defaults))
        self._fill({name: deepcopy(key.default) for name, key in KEYS.items() if _present(name)})
        for layer in (*args, kwargs):
            if layer:
                self.__dict__["_given"] += self._take(layer).items()

    # -- storage: synonyms and older names reach the one key they stand for

    def _take(self, layer: Any) -> dict[Any, Any]:
        """Merge what somebody gave over what is there, and return it; contradictions wait for `validate`."""
        if isinstance(layer, (str, PathLike)):
            layer = read_mapping(layer)
        if not isinstance(layer, Mapping):
            layer = vars(layer) if hasattr(layer, "__dict__") else dict(layer)
        translated, problems = translate(layer)
        self.__dict__.setdefault("_conflicts", []).extend((line, None, None) for line in problems)
        for name, value in translated.items():
            self._put(name, value)
        return translated

    def _put(self, name: Any, value: Any) -> None:
        current = self.get(name, None) if name in self else None
        if isinstance(current, Config) and isinstance(value, Mapping):
            for key, item in value.items():
                self._put(f"{name}.{key}", item)
        else:
            self.set(name, value)

    def _fill(self, defaults: Mapping[str, Any]) -> None:
        """Give names that are not there yet their defaults."""
        for name, value in defaults.items():
            head = self.get(str(name).split(".")[0], None) if str(name).split(".")[0] in self else None
            if isinstance(value, Mapping) and isinstance(head, Config):
                self._fill({f"{name}.{key}": item for key, item in value.items()})
            elif name not in self and (head is None or isinstance(head, Config) or "." not in name):
                self.set(name, value)

    def merge(self, *args: Any, overwrite: bool = True, **kwargs: Any) -> Self:
        """Merge mappings (or a file) into this configuration, nested and dotted names alike."""
        for layer in (*args, kwargs):
            if layer and overwrite:
                self._take(layer)
            elif layer:
                self._fill(translate(layer)[0])
        return self

    def get(self, name: Any, default: Any = None, fallback: bool | None = None) -> Any:
        """Return the value of a dotted name, or `default`."""
        return super().get(canonical(name), default, fallback)

    def set(self, name: Any, value: Any, convert_mapping: bool | None = None) -> None:
        """Set a dotted name; sections on the way are made.

        Raises:
            ConfigError: when a plain value stands where a section would have to be.
        """
        if name in RENAMED:
            warn_renamed(name)
            new = RENAMED[name]
            current = self.get(new, None) if new in self else None
            if new in self and current != value and current != default_of(type(self), new):
                self.__dict__.setdefault("_conflicts", []).append((conflict(name, value, new, current), new, value))
                return
            name = new
        name = canonical(name)
        if isinstance(value, Mapping) and not isinstance(value, Config):
            value = _tree(value)
        head, dot, rest = name.partition(".") if isinstance(name, str) else (name, "", "")
        if not dot:
            super().set(name, value, convert_mapping=False)
            return
        section = dict.get(self, head)
        if section is None:
            super().set(head, _tree({}), convert_mapping=False)
            section = dict.get(self, head)
        place_in = section
        parts = rest.split(".")
        for part in parts[:-1]:
            if not isinstance(place_in, Config):
                break
            if dict.get(place_in, part) is None:
                place_in.set(part, _tree({}), convert_mapping=False)
            place_in = dict.get(place_in, part)
        if not isinstance(place_in, Config):
            raise ConfigError(f"cannot set {name!r}: {place_in!r} stands where a section would have to be")
        place_in.set(parts[-1], value, convert_mapping=False)

    def __missing__(self, name: Any, default: Any = Null) -> Any:
        factory = self.getattr("default_factory", None)
        if default is not Null or not factory or isinstance(name, str) and name.startswith("__"):
            return super().__missing__(name, default)
        self.set(name, factory())
        return dict.__getitem__(self, canonical(name))

    def delete(self, name: Any) -> None:
        """Delete a dotted name."""
        super().delete(canonical(name))

    def pop(self, name: Any, default: Any = Null) -> Any:
        """Remove a dotted name and return its value."""
        return super().pop(canonical(name), default)

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(canonical(name))

    # -- from construction to a configuration that can be used

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RunnerConfig:
        """Return a validated copy of a configuration or mapping; the original is not touched.

        Raises:
            ConfigError: see `validate`.
            TypeError: it is neither.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"a configuration is a RunnerConfig or a mapping, got {config!r}; RunnerConfig.from_yaml reads a file"
            )
        if isinstance(config, RunnerConfig):
            with config.unlocked():  # chanfig cannot copy a frozen config
                copied = config.deepcopy()
            config.__dict__["_told"] = True
        else:
            copied = cls(deepcopy(dict(config)))
        copied.validate()
        copied._seal()
        return copied

    @classmethod
    def stored(cls, content: Mapping[str, Any], identity_exclude: Iterable[str] = ()) -> Self:
        """Return the configuration that a run has stored, for use without the class it was declared on.

        Args:
            content: the keys; values of the user's own at the top level count as declared.
            identity_exclude: what the class of the run left out of the identity.
        """
        config = cls(content)
        config.__dict__["_own"] = frozenset(name for name, value in content.items() if not isinstance(value, Mapping))
        config.__dict__["_excluded"] = frozenset(identity_exclude)
        return config

    def excluded(self) -> frozenset[str]:
        """Return the user's keys and sections that `identity_exclude` leaves out of the identity."""
        declared = {name for base in type(self).__mro__ for name in base.__dict__.get("identity_exclude", ())}
        return frozenset(declared) | self.__dict__.get("_excluded", frozenset())

    def parse(self, args: Iterable[str] | None = None) -> Self:  # type: ignore[override]
        """Read configuration files and single keys from the command line, then `boot`.

        Args:
            args: the words of the command line; None takes `sys.argv`.

        Raises:
            UsageError: for words and values that cannot be used, after writing the message to standard error. It is
                both a `ConfigError` and a `SystemExit` with status 2.
        """
        line = split_arguments(sys.argv[1:] if args is None else args)
        prog = sys.argv[0].rsplit("/", 1)[-1] or "python"
        if line.help:
            show_help(help_text(prog, self.describe()))
            raise SystemExit(0)
        try:
            for file in line.files:
                self._take(read_mapping(file))
            problems = line.problems + self._apply(line)
            if problems:
                raise ConfigError(joined([*dict.fromkeys(problems + check(self))]))
            return self.boot()
        except UsageError:
            raise
        except ConfigError as error:
            print(f"{prog}: {error}\n{prog}: --help lists every key", file=sys.stderr)
            raise UsageError(str(error)) from None

    def _apply(self, line: CommandLine) -> list[str]:
        """Set the keys a command line gives; return a line for each that cannot be set."""
        layer: dict[str, Any] = {}
        problems: list[str] = []
        for option in line.options:
            key, words = option.key, option.words
            if not self._knows(key) and key.startswith("no_") and words is None and self._knows(key[3:]):
                key, words = key[3:], ["false"]
            new = canonical(RENAMED.get(key, key))
            annotation = self._annotation(key)
            converter: Callable[[Any], Any] | None = None
            untyped = annotation is not None and is_untyped(annotation)
            if annotation is not None and lookup(new) is None:
                converter = converter_of(annotation)
            try:
                value = check_value(new, words, converter, untyped)
                if "." not in new and new not in TOP_LEVEL and annotation is None:
                    raise ValueError(unknown(self, new, value))
            except ValueError as error:
                problems.append(str(error))
                continue
            layer.pop(key, None)  # the last one given wins
            layer[key] = value
        nested: dict[str, Any] = {}
        for key, value in layer.items():
            place(nested, key, value) if key in RENAMED else nested.__setitem__(key, value)
        translated, clashes = translate(nested)
        for key, value in translated.items():
            try:
                self.set(key, value)
            except ConfigError as error:
                problems.append(str(error))
        return problems + clashes

    def _knows(self, key: str) -> bool:
        head = canonical(RENAMED.get(key, key)).split(".")[0]
        return head in TOP_LEVEL or head in self or head in hints_of(type(self))

    def _annotation(self, key: str) -> Any:
        section: Any = self
        *path, leaf = canonical(key).split(".")
        for part in path:
            section = dict.get(section, part) if isinstance(section, Config) else None
        return hints_of(type(section)).get(leaf) if isinstance(section, Config) else None

    def boot(self) -> Self:
        """Run `post` of every section and of the configuration, interpolate `${key}`, and validate.

        What `parse` does, without a command line.

        Raises:
            ConfigError: as `validate`.
        """
        check(self)  # `post` sees typed values
        _run_posts(self)
        try:
            self.interpolate()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.validate()
        self._seal()
        return self

    def _seal(self) -> None:
        """Stop making sections on reads: from here on a missing name is an `AttributeError`."""
        self.apply_(lambda item: item.setattr("default_factory", Null) if isinstance(item, Config) else None)

    def validate(self) -> None:
        """Check names, types, ranges and contradictions, and give every key its typed value or default.

        Raises:
            ConfigError: listing every problem: the key, its value, what is allowed, the nearest valid key.
        """
        frozen = self.getattr("frozen", False)
        self.defrost()
        try:
            problems = check(self)
            for text, name, value in self.__dict__.get("_conflicts", []):
                if name is None or self.get(name, None) != value:
                    problems.append(text)
            if not problems:
                self._fill({name: deepcopy(key.default) for name, key in KEYS.items() if key.default is not ABSENT})
                problems = contradictions(self)
            if problems:
                raise ConfigError(joined(problems))
            if not self.__dict__.get("_told"):  # copies do not tell again
                self.__dict__["_told"] = True
                for text in misgivings(self):
                    warnings.warn(text, UserWarning, stacklevel=2)
        finally:
            if frozen:
                self.freeze()

    # -- views

    def identity(self) -> dict[str, Any]:
        """Return what identifies the run: dotted names and values, without budget, resources and danling's defaults."""
        return identity_view(self.of(self), self.excluded())

    def diff(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:  # type: ignore[override]
        """Return the dotted keys whose values differ, with both values.

        Examples:
            >>> RunnerConfig(seed=1).diff(RunnerConfig(seed=2))
            {'seed': (1, 2)}
        """
        return differences(self.of(self), self.of(other))

    def describe(self) -> list[Row]:
        """Return the table of all keys: your own first, then danling's; the default is what this object holds."""
        hints = hints_of(type(self))
        rows = [
            Row(name, annotation_name(hint), held(self, name), True, annotation_name(hint), "")
            for name, hint in hints.items()
            if name not in TOP_LEVEL and not isinstance(dict.get(self, name), Mapping)
        ]
        for name, value in self.items():
            if name not in TOP_LEVEL and isinstance(value, Config):
                nested = hints_of(type(value))
                for key, item in value.all_items():
                    kind = (
                        annotation_name(nested[key])
                        if key in nested
                        else "any"
                        if item is None
                        else type(item).__name__
                    )
                    rows.append(Row(f"{name}.{key}", kind, item, True, kind, ""))
        for name, key in KEYS.items():
            rows.append(Row(name, key.kind, held(self, name, key.default), key.identity, key.allowed, key.meaning))
        return rows

    # -- text

    def yamls(self, stream: Any = None) -> str:  # type: ignore[override]
        """Return the configuration as YAML; written to `stream` too, if given."""
        text = dump_yaml(self.dict())
        if stream is not None:
            stream.write(text)
        return text

    def jsons(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Return the configuration as JSON; arguments are those of `json.dumps`."""
        return json.dumps(plain(self.dict()), **{"indent": 2, **kwargs})

    @classmethod
    def from_jsons(cls, string: str) -> Self:  # type: ignore[override]
        """Build a configuration from JSON text."""
        return cls(json.loads(string))

    @classmethod
    def from_dict(cls, obj: Any) -> Self:
        """Build a configuration from a mapping."""
        return cls(obj)

    @classmethod
    def from_yamls(cls, string: str) -> Self:  # type: ignore[override]
        """Build a configuration from YAML text."""
        return cls(parse_yaml(string) or {})

    @classmethod
    def from_yaml(cls, file: Any) -> Self:  # type: ignore[override]
        """Build a configuration from a YAML file or stream."""
        return cls.from_yamls(file.read()) if hasattr(file, "read") else cls(read_mapping(file))


def _present(name: str) -> bool:
    """Whether a key is there from construction on; open mappings are left out so that a touch makes a section."""
    key = KEYS[name]
    return key.default is not ABSENT and "mapping" not in split_kind(key.kind)[0]


def _run_posts(section: Config) -> None:
    for value in list(section.values()):
        if isinstance(value, Config):
            _run_posts(value)
    section.post()
