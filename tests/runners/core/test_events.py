"""Listeners and callbacks: order, names, state, and what happens when one raises."""

from __future__ import annotations

import pytest

from danling.runners.errors import ResumeError
from danling.runners.events import EVENTS, Event, Events


class Recorder:
    def __init__(self, log, tag):
        self.log, self.tag = log, tag

    def on_step(self, runner, event):
        self.log.append((self.tag, event.global_step))

    def on_end(self, runner, event):
        self.log.append((self.tag, "end"))


class Counter:
    name = "counter"

    def __init__(self):
        self.count = 0

    def on_step(self, runner, event):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_there_are_fourteen_names():
    assert len(EVENTS) == len(set(EVENTS)) == 14


def test_listeners_and_callbacks_are_called_in_registration_order():
    events, log = Events(), []
    events.on("step", lambda runner, event: log.append(("first", event.global_step)))
    events.callbacks.append(Recorder(log, "object"))

    @events.on("step")
    def last(runner, event):
        log.append(("last", event.global_step))

    events.emit("step", "runner", global_step=7)
    assert log == [("first", 7), ("object", 7), ("last", 7)]
    assert last is not None  # the decorator gives the function back


def test_the_event_carries_position_and_payload():
    events, seen = Events(), []
    events.on("save", lambda runner, event: seen.append((runner, event)))
    events.emit("save", "me", global_step=3, epoch=1, split="train", path="checkpoints/step-3")
    assert seen == [("me", Event("save", 3, 1, "train", {"path": "checkpoints/step-3"}))]


def test_the_list_behind_a_name_stays_the_same_object():
    events = Events()
    steps = events["step"]
    assert not steps
    recorder = Recorder([], "x")
    events.callbacks.append(recorder)
    assert steps and steps is events["step"]
    events.callbacks.remove(recorder)
    assert not steps


@pytest.mark.parametrize("use", [lambda e: e.on("stepp", print), lambda e: e["stepp"], lambda e: e.emit("stepp", None)])
def test_an_unknown_event_names_the_nearest(use):
    with pytest.raises(ValueError, match="unknown event 'stepp'; did you mean 'step'"):
        use(Events())


def test_a_listener_must_be_callable():
    with pytest.raises(TypeError, match="must be callable, got int"):
        Events().on("step", 3)


def test_an_object_that_listens_to_nothing_is_refused():
    class Misspelt:
        def on_stepp(self, runner, event): ...

    with pytest.raises(ValueError, match=r"Misspelt listens to nothing \(it has on_stepp\).*on_step"):
        Events().callbacks.append(Misspelt())
    with pytest.raises(ValueError, match="object listens to nothing"):
        Events().callbacks.append(object())


def test_callbacks_behave_like_a_list():
    events, log = Events(), []
    a, b, c = (Recorder(log, tag) for tag in "abc")
    events.callbacks.extend([a, c])
    events.callbacks.insert(1, b)
    assert list(events.callbacks) == [a, b, c] and len(events.callbacks) == 3
    events.emit("step", None)
    assert [tag for tag, _ in log] == ["a", "b", "c"]
    del events.callbacks[0]
    events.callbacks[0] = a
    assert list(events.callbacks) == [a, c]
    with pytest.raises(ValueError, match="listens to nothing"):
        events.callbacks[0] = object()
    assert list(events.callbacks) == [a, c]


def test_what_a_listener_raises_ends_the_emission():
    events, log = Events(), []

    def fail(runner, event):
        raise KeyError("broken")

    events.on("step", fail)
    events.on("step", lambda *_: log.append("never"))
    with pytest.raises(KeyError, match="broken"):
        events.emit("step", None)
    assert log == []


@pytest.mark.parametrize("name", ["save_error", "exception", "end"])
def test_during_an_error_everybody_hears_and_the_first_failure_is_chained(name):
    events, log = Events(), []
    original = OSError("disk full")

    def fail(runner, event):
        raise KeyError("broken")

    events.on(name, fail)
    events.on(name, lambda runner, event: log.append(event.payload["error"]))
    with pytest.raises(KeyError, match="broken") as caught:
        events.emit(name, None, error=original)
    assert caught.value.__cause__ is original
    assert log == [original]


def test_state_goes_in_and_out_by_name():
    events = Events()
    counter = Counter()
    events.callbacks.append(counter)
    events.callbacks.append(Recorder([], "stateless"))
    events.emit("step", None)
    state = events.state_dict()
    assert state == {"counter": {"count": 1}}
    counter.count = 0
    assert events.load_state_dict(state | {"gone": {}}) == ["gone"]
    assert counter.count == 1


def test_two_callbacks_cannot_share_a_name():
    events = Events()
    events.callbacks.append(Counter())
    with pytest.raises(ValueError, match="would store their state as 'counter'"):
        events.callbacks.append(Counter())
    assert len(events.callbacks) == 1


def test_a_checkpoint_without_the_state_of_a_callback_says_the_way_out():
    events = Events()
    events.callbacks.append(Counter())
    with pytest.raises(ResumeError, match=r"counter.*'callbacks' to checkpoint.exclude_from_loading"):
        events.load_state_dict({})
