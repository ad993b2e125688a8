"""Registries that build components by name and refuse what the component would not understand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from chanfig import Registry

from .names import nearest, normalize

_MISSING: Any = object()


class Lazy(NamedTuple):
    """A component of a library that is imported when the component is first wanted.

    Attributes:
        load: imports the library and returns the component.
        install: the command that installs the library.
    """

    load: Callable[[], Any]
    install: str


class Component(NamedTuple):
    """What a registry knows about one of the components that ship with it.

    Attributes:
        target: class or function, or `Lazy`.
        subject: name of the parameter that takes what the component works on; `None`: found by the registry.
        fixed: arguments that the name stands for.
        accepts: accepted keywords, where the signature of the target does not tell.
        namesake: another name that a keyword error should mention if it accepts the keyword.
    """

    target: Any
    subject: str | None = None
    fixed: Mapping[str, Any] = {}
    accepts: tuple[str, ...] | None = None
    namesake: str | None = None


class ComponentRegistry(Registry):
    """A chanfig registry whose names are forgiving and whose keywords are not.

    Names compare without case, `_`, `-` and spaces. `register` works as a decorator or as a function.
    """

    def __init__(self, what: str, subject: str, positions: Iterable[str] = (), hints: Mapping[str, str] | None = None):
        super().__init__()
        self.setattr("what", what)
        self.setattr("subject", subject)
        self.setattr("subjects", (subject, *positions))
        self.setattr("names", {})
        self.setattr("hints", dict(hints or {}))

    # chanfig calls these two when it registers.

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and normalize(name) in self.getattr("names", {})

    def set(self, name: Any, component: Any) -> None:  # type: ignore[override]
        if not isinstance(name, str) or not normalize(name):
            raise ValueError(f"a name of {self.getattr('what')} is a string with letters, not {name!r}")
        names = self.getattr("names")
        key = names.setdefault(normalize(name), name)
        dict.__setitem__(self, key, component)

    def alias(self, name: str, of: str) -> None:
        """Let `name` stand for the component registered as `of`."""
        self.set(name, self._entry(of))

    def _entry(self, name: Any) -> Any:
        if name not in self:
            raise ValueError(self._unknown(name))
        return dict.__getitem__(self, self.getattr("names")[normalize(name)])

    def _unknown(self, name: Any) -> str:
        what = self.getattr("what")
        if not isinstance(name, str):
            return f"a name of {what} is a string, not {name!r}"
        message = f"unknown {what} {name!r}; the nearest names are {', '.join(nearest(name, self.keys())[:3])}"
        hint = self.getattr("hints").get(normalize(name))
        return f"{message}. {hint}" if hint else message

    def _component(self, name: Any) -> tuple[Component, bool]:
        """Return the loaded component and whether it ships with the registry."""
        entry = self._entry(name)
        if not isinstance(entry, Component):
            return Component(entry), False
        if not isinstance(entry.target, Lazy):
            return entry, True
        try:
            target = entry.target.load()
        except ImportError as error:
            raise ImportError(
                f"{self.getattr('what')} {name!r} needs a library that is not usable here ({error}): "
                f"{entry.target.install}"
            ) from error
        return entry._replace(target=target), True

    def lookup(self, name: Any, default: Any = None) -> Any:
        """Return the class or function behind a name; loads the library of a lazy one.

        Raises:
            ValueError: the name is unknown.
            ImportError: its library is missing.
        """
        return self._component(name)[0].target

    def accepts(self, name: str) -> tuple[str, ...]:
        """Return the keywords that `build` accepts for a name.

        Raises:
            ValueError: the name is unknown.
            ImportError: its library is missing.
        """
        component, shipped = self._component(name)
        own, _ = self._keywords(component, shipped)
        return tuple(dict.fromkeys((self.getattr("subject"), *own, *self._extras(component))))

    def _extras(self, component: Component) -> tuple[str, ...]:
        """Return keywords that the registry itself understands."""
        return ()

    def _keywords(self, component: Component, shipped: bool) -> tuple[tuple[str, ...], bool]:
        """Return the keywords of a component and whether it takes any other as well."""
        if component.accepts is not None:
            return component.accepts, False
        subject = self._subject(component)
        parameters = inspect.signature(component.target).parameters.values()
        names = tuple(
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in component.fixed
            and parameter.name != subject
        )
        is_open = not shipped and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        return names, is_open

    def _subject(self, component: Component) -> str | None:
        """Return the name of the parameter that takes the subject; `None` if it has none and goes first."""
        if component.subject is not None:
            return component.subject
        parameters = inspect.signature(component.target).parameters
        for name in self.getattr("subjects"):
            if name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY:
                return name
        for name, parameter in parameters.items():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                return name
            break
        return None

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Build a component.

        A string or mapping in first place is the name or the configuration; anything else is the component's first
        argument. The name may also be given as `type`.

        Raises:
            ValueError: no name, two different names, or an unknown one (the nearest are offered).
            TypeError: a keyword that the component does not have (the accepted ones are listed, nearest first).
            ImportError: the library of the component is missing.
        """
        names = []
        if args and isinstance(args[0], str):
            names.append(args[0])
            args = args[1:]
        elif args and isinstance(args[0], Mapping):
            config = dict(args[0])
            args = args[1:]
            if config.get("type") is not None:
                names.append(config["type"])
            config.pop("type", None)
            kwargs = {**config, **kwargs}
        if kwargs.get("type") is not None:
            names.append(kwargs["type"])
        kwargs.pop("type", None)
        what = self.getattr("what")
        if not names:
            raise ValueError(f"no name of {what} is given: pass it first or as type=...")
        component, shipped = self._component(names[0])
        for other in names[1:]:
            if self._entry(other) is not self._entry(names[0]):
                raise ValueError(f"two names of {what} are given, {names[0]!r} and {other!r}: keep one")
        subject = kwargs.pop(self.getattr("subject"), _MISSING)
        if args and self._is_subject(args[0]):
            if subject is not _MISSING:
                raise TypeError(f"{self.getattr('subject')} is given twice, in first place and as keyword")
            subject, args = args[0], args[1:]
        extras = {name: kwargs.pop(name) for name in self._extras(component) if name in kwargs}
        self._check_keywords(names[0], component, shipped, kwargs)
        if subject is not _MISSING:
            subject = self._prepare(component, subject, extras, kwargs)
        return self._call(component, subject, args, kwargs)

    def _is_subject(self, value: Any) -> bool:
        return True

    def _prepare(self, component: Component, subject: Any, extras: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        return subject

    def _check_keywords(self, name: str, component: Component, shipped: bool, kwargs: Mapping[str, Any]) -> None:
        own, is_open = self._keywords(component, shipped)
        if is_open:
            return
        for keyword in kwargs:
            if keyword in own:
                continue
            accepted = dict.fromkeys((self.getattr("subject"), *own, *self._extras(component)))
            message = (
                f"{self.getattr('what')} {name!r} has no argument {keyword!r}; "
                f"accepted are {', '.join(nearest(keyword, accepted))}"
            )
            if component.namesake is not None and keyword in self.accepts(component.namesake):
                message += f". {component.namesake!r} of torch has it"
            raise TypeError(message)

    def _call(self, component: Component, subject: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**component.fixed, **kwargs}
        if subject is _MISSING:
            return component.target(*args, **kwargs)
        place = self._subject(component)
        parameters = list(inspect.signature(component.target).parameters)
        if place is None or (parameters and parameters[0] == place):
            return component.target(subject, *args, **kwargs)
        return component.target(*args, **{place: subject}, **kwargs)
