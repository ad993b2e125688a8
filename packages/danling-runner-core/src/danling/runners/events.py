"""What a run tells those who listen: fourteen events, in registration order, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableSequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, overload

from .errors import ResumeError

EVENTS = (
    "start",
    "resume",
    "epoch_start",
    "step",
    "skip",
    "log",
    "evaluate_start",
    "evaluate_end",
    "epoch_end",
    "save",
    "save_error",
    "stop",
    "exception",
    "end",
)

_DURING_AN_ERROR = frozenset({"save_error", "exception", "end"})

Listener = Callable[[Any, "Event"], Any]


@dataclass(frozen=True, slots=True)
class Event:
    """What a listener is told.

    Attributes:
        name: one of `EVENTS`.
        global_step: applied updates so far.
        epoch: complete epochs so far.
        split: the split the event is about, or None.
        payload: what belongs to this event: ``metrics``, ``path``, ``error``, ``signal``, ``reason``.
    """

    name: str
    global_step: int = 0
    epoch: int = 0
    split: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Entry:
    listeners: dict[str, Listener]
    owner: Any = None
    name: str | None = None


class Events:
    """Listeners of one runner.

    The loop asks ``if events["step"]`` before it emits, so that an event without listeners costs one truth test: the
    list behind a name is always the same object.

    Examples:
        >>> events = Events()
        >>> @events.on("step")
        ... def show(runner, event):
        ...     print(event.name, event.global_step)
        >>> events.emit("step", None, global_step=3)
        step 3
        >>> try:
        ...     events.on("stepp", show)
        ... except ValueError as error:
        ...     print(str(error)[:47])
        unknown event 'stepp'; did you mean 'step'? The
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._table: dict[str, list[Listener]] = {name: [] for name in EVENTS}
        self.callbacks = Callbacks(self)

    def __getitem__(self, name: str) -> list[Listener]:
        """The listeners of an event, in the order in which they are called. Not for changing."""
        _check_name(name)
        return self._table[name]

    @overload
    def on(self, name: str) -> Callable[[Listener], Listener]: ...
    @overload
    def on(self, name: str, listener: Listener) -> Listener: ...

    def on(self, name: str, listener: Listener | None = None) -> Any:
        """Call ``listener(runner, event)`` whenever ``name`` happens; without a listener, a decorator.

        Raises:
            ValueError: for an unknown event.
            TypeError: for a listener that cannot be called.
        """
        _check_name(name)
        if listener is None:
            return lambda function: self.on(name, function)
        if not callable(listener):
            raise TypeError(f"a listener must be callable, got {type(listener).__name__}")
        self._insert(len(self._entries), _Entry({name: listener}))
        return listener

    def emit(
        self,
        name: str,
        runner: Any,
        *,
        global_step: int = 0,
        epoch: int = 0,
        split: str | None = None,
        **payload: Any,
    ) -> None:
        """Call the listeners of ``name`` in registration order.

        What a listener raises ends the run like an error in a training step. While an error is already in progress
        (``payload`` holds it as ``error``) every listener is still called, and the first thing one raises is chained to
        that error.
        """
        event = Event(name, global_step, epoch, split, payload)
        if name not in _DURING_AN_ERROR:
            for listener in tuple(self[name]):
                listener(runner, event)
            return
        raised: Exception | None = None
        for listener in tuple(self[name]):
            try:
                listener(runner, event)
            except Exception as error:  # the others still have to hear of it
                raised = raised or error
        if raised is not None:
            cause = payload.get("error")
            raise raised from (cause if isinstance(cause, BaseException) else None)

    def state_dict(self) -> dict[str, Any]:
        """The state of every callback object that has one, by name."""
        return {entry.name: entry.owner.state_dict() for entry in self._entries if entry.name is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Put back what `state_dict` gave.

        Returns:
            The names in ``state`` that no callback of this run has.

        Raises:
            ResumeError: when a callback with state is missing in ``state``.
        """
        owners = {entry.name: entry.owner for entry in self._entries if entry.name is not None}
        if missing := [name for name in owners if name not in state]:
            raise ResumeError(
                f"the checkpoint holds no callback state for {', '.join(missing)}; "
                "to start them afresh, add 'callbacks' to checkpoint.exclude_from_loading"
            )
        for name, owner in owners.items():
            owner.load_state_dict(state[name])
        return [name for name in state if name not in owners]

    def _insert(self, index: int, entry: _Entry) -> None:
        self._entries.insert(index, entry)
        self._rebuild()

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._rebuild()

    def _rebuild(self) -> None:
        for listeners in self._table.values():
            listeners.clear()
        for entry in self._entries:
            for name, listener in entry.listeners.items():
                self._table[name].append(listener)


class Callbacks(MutableSequence[Any]):
    """The callback objects of a runner: a list of objects with any ``on_<event>(runner, event)``.

    An object with ``state_dict`` and ``load_state_dict`` is stored in checkpoints under its ``name`` (its class name,
    if it has none), which must be free.
    """

    def __init__(self, events: Events) -> None:
        self._events = events

    def _own(self) -> list[_Entry]:
        return [entry for entry in self._events._entries if entry.owner is not None]

    def __len__(self) -> int:
        return len(self._own())

    def __getitem__(self, index: Any) -> Any:
        owners = [entry.owner for entry in self._own()]
        return owners[index]

    def __setitem__(self, index: Any, callback: Any) -> None:
        if isinstance(index, slice):
            raise TypeError("replace callbacks one by one")
        old = self._own()[index]
        position = self._events._entries.index(old)
        self._events._remove(old)
        try:
            self._events._insert(position, self._entry(callback))
        except BaseException:
            self._events._insert(position, old)
            raise

    def __delitem__(self, index: Any) -> None:
        entries = self._own()[index]
        for entry in entries if isinstance(entries, list) else [entries]:
            self._events._remove(entry)

    def insert(self, index: int, callback: Any) -> None:
        """Add a callback before the one at ``index``.

        Raises:
            ValueError: when it listens to none of the events, or has state under a name already taken.
        """
        entry = self._entry(callback)
        own = self._own()
        at_end = index >= len(own)
        position = len(self._events._entries) if at_end else self._events._entries.index(own[index])
        self._events._insert(position, entry)

    def _entry(self, callback: Any) -> _Entry:
        kind = type(callback).__name__
        methods = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name, None))]
        listeners = {name: getattr(callback, f"on_{name}") for name in EVENTS if f"on_{name}" in methods}
        if not listeners:
            found = f" (it has {', '.join(methods)})" if methods else ""
            raise ValueError(f"{kind} listens to nothing{found}: a callback has at least one of {_names('on_')}")
        name = None
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = str(getattr(callback, "name", None) or kind)
            if any(entry.name == name for entry in self._events._entries):
                raise ValueError(
                    f"two callbacks would store their state as {name!r}; give one of them another `name` attribute"
                )
        return _Entry(listeners, callback, name)

    def __repr__(self) -> str:
        return repr([entry.owner for entry in self._own()])


def _names(prefix: str = "", names: Iterable[str] = EVENTS) -> str:
    return ", ".join(prefix + name for name in names)


def _check_name(name: str) -> None:
    if name in EVENTS:
        return
    near = get_close_matches(str(name), EVENTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown event {name!r}{hint} The events are {_names()}")
