"""Which engines are installed, and which one a configuration means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import StackError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .base_runner import BaseRunner

GROUP = "danling.runners"
ALIASES = {"ddp": "torch", "ds": "deepspeed"}
KNOWN = {
    "torch": "danling-runner-torch",
    "parallel": "danling-runner-parallel",
    "deepspeed": "danling-runner-deepspeed",
    "accelerate": "danling-runner-accelerate",
}


@dataclass(frozen=True)
class StackInfo:
    """What is known of a stack without importing its engine.

    Attributes:
        name: what ``config.stack`` says.
        target: ``module:Class``, or None when the stack is not installed.
        distribution: the package that provides it, or that would.
        version: of that package, or None.
        problem: why it cannot be used, or None.
        missing: packages that it needs and that are not installed, itself among them.
    """

    name: str
    target: str | None
    distribution: str
    version: str | None = None
    problem: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether its package is installed."""
        return self.target is not None

    @property
    def install(self) -> str | None:
        """The command that brings what is missing; None when nothing is."""
        return f"pip install {' '.join(self.missing)}" if self.missing else None


@dataclass(frozen=True)
class StackChoice:
    """The stack a run uses, and why."""

    name: str
    reason: str


def stacks() -> dict[str, StackInfo]:
    """Every stack that is installed or could be, by name; danling's own first.

    No engine is imported: the answer comes from the installed packages' metadata. ``installed`` stacks whose own
    requirements are missing carry a ``problem``.

    Examples:
        >>> known = stacks()
        >>> list(known)[:4]
        ['torch', 'parallel', 'deepspeed', 'accelerate']
        >>> known["torch"].installed == (known["torch"].install is None)
        True
    """
    found = _entry_points()
    names = [*KNOWN, *sorted(set(found) - set(KNOWN))]
    return {name: _describe(name, found.get(name, [])) for name in names}


def resolve_stack(config: Mapping[str, Any], *, checkpoint_stack: str | None = None) -> StackChoice:
    """The stack that a validated configuration means.

    Args:
        config: with ``stack``, ``parallel.axes``, ``deepspeed`` and ``accelerate``.
        checkpoint_stack: the stack that wrote the checkpoint this run will resume from, if it will.

    Raises:
        StackError: the stack is unknown, not installed, claimed twice, or ``auto`` cannot decide.
    """
    asked = str(_get(config, "stack") or "auto").lower().replace("-", "_")
    if asked != "auto":
        name = ALIASES.get(asked, asked)
        _entry_point(name)
        return StackChoice(name, "asked for")
    sections = [name for name in ("deepspeed", "accelerate") if _get(config, name) is not None]
    if len(sections) > 1:
        raise StackError("both `deepspeed` and `accelerate` are configured; choose with `stack`")
    if axes := wide_axes(config):
        raise StackError(
            f"parallel.axes.{axes[0]} is set, which `stack: auto` does not choose for you: set `stack: parallel`"
            + ("" if _entry_points().get("parallel") else f" (pip install {KNOWN['parallel']})")
        )
    if sections:
        _entry_point(sections[0])
        return StackChoice(sections[0], f"`{sections[0]}` is configured")
    if checkpoint_stack:
        _entry_point(checkpoint_stack)
        return StackChoice(checkpoint_stack, "it wrote the checkpoint to resume from")
    if _entry_points().get("deepspeed"):
        usable, why = _usable("deepspeed")
        if usable:
            return StackChoice("deepspeed", "installed and usable")
        _entry_point("torch")
        return StackChoice("torch", f"DeepSpeed is not usable: {why}")
    _entry_point("torch")
    return StackChoice("torch", "the default")


def load_engine(name: str) -> type[BaseRunner]:
    """Import the class behind a stack's name.

    Raises:
        StackError: there is none, two packages claim the name, its module cannot be imported, or the class is no
            `BaseRunner`.
    """
    from .base_runner import BaseRunner

    entry = _entry_point(ALIASES.get(name, name))
    who = f"stack {entry.name!r} of {_provider(entry)}"
    try:
        engine = entry.load()
    except Exception as error:
        raise StackError(f"{who} cannot be loaded from {entry.value}: {type(error).__name__}: {error}") from error
    if not (isinstance(engine, type) and issubclass(engine, BaseRunner)):
        raise StackError(f"{who}: {entry.value} is no subclass of danling.runners.BaseRunner")
    return engine


def check_engine(engine: type[BaseRunner], config: Mapping[str, Any]) -> None:
    """Refuse a configuration that this engine class contradicts.

    Raises:
        StackError: ``stack`` names another stack than the one the class is fixed to.
    """
    asked = str(_get(config, "stack") or "auto").lower().replace("-", "_")
    fixed = engine.stack
    if asked != "auto" and fixed is not None and ALIASES.get(asked, asked) != fixed:
        raise StackError(
            f"{engine.__name__} is fixed to stack {fixed!r}, but the configuration says stack: {asked}; "
            "subclass danling.runners.Runner to leave the choice to the configuration"
        )


def wide_axes(config: Mapping[str, Any]) -> list[str]:
    """The names of the parallel axes that are not 1."""
    axes = _get(config, "parallel.axes")
    return [name for name, size in axes.items() if size not in (None, 1)] if isinstance(axes, Mapping) else []


def engine_by_class_name(class_name: str, stack: str) -> type[BaseRunner]:
    """``danling.runners.TorchRunner`` and its siblings.

    Raises:
        ImportError: naming the package to install.
    """
    if not _entry_points().get(stack):
        raise ImportError(f"{class_name} is not installed: pip install {KNOWN[stack]}", name=KNOWN[stack])
    try:
        return load_engine(stack)
    except StackError as error:
        raise ImportError(str(error)) from error


def _entry_points() -> dict[str, list[EntryPoint]]:
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _entry_point(name: str) -> EntryPoint:
    found = _entry_points()
    info = _describe(name, found.get(name, []))
    if not info.installed:
        if name in KNOWN:
            raise StackError(f"stack {name!r} is not installed: {info.install}")
        near = get_close_matches(name, ["auto", *ALIASES, *KNOWN, *found], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        installs = [f"{other} ({info.install})" for other, info in stacks().items() if not info.installed]
        more = f" Not installed: {', '.join(installs)}." if installs else ""
        raise StackError(f"unknown stack {name!r}{hint} Installed: {', '.join(sorted(found)) or 'none'}.{more}")
    if info.problem and not info.problem.startswith(
        "needs "
    ):  # a missing requirement is reported better by the import itself
        raise StackError(f"stack {name!r}: {info.problem}")
    return found[name][0]


def _describe(name: str, entries: list[EntryPoint]) -> StackInfo:
    if not entries:
        package = KNOWN.get(name, name)
        return StackInfo(name, None, package, problem="not installed", missing=(package,))
    entry = entries[0]
    distribution = entry.dist
    owners = {e.dist.name if e.dist else "?" for e in entries} | ({KNOWN[name]} if name in KNOWN else set())
    missing = _missing_requirements(distribution.requires if distribution else None)
    problem = None
    if len(entries) > 1 or len(owners) > 1:
        problem = f"the name is claimed by {' and '.join(sorted(owners))}; uninstall all but one"
    elif not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problem = "a stack's name has lower case letters, digits and `_` only"
    elif missing:
        problem = f"needs {', '.join(missing)}: pip install {' '.join(missing)}"
    return StackInfo(
        name,
        entry.value,
        distribution.name if distribution else "?",
        distribution.version if distribution else None,
        problem,
        tuple(missing),
    )


def _missing_requirements(requirements: Iterable[str] | None) -> list[str]:
    from importlib.metadata import PackageNotFoundError, distribution

    missing = []
    for requirement in requirements or ():
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match is None or ";" in requirement:  # conditional: not ours to judge
            continue
        try:
            distribution(match.group())
        except PackageNotFoundError:
            missing.append(match.group())
    return missing


def _usable(name: str) -> tuple[bool, str]:
    module = _entry_point(name).module
    try:
        usable = getattr(import_module(module), "usable", None)
        return (True, "") if usable is None else usable()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _provider(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        if config is None:
            return None
    return config
