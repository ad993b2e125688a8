"""The small helpers: decorators, cached methods, devices, JSON."""

import asyncio
import copy
import gc
import inspect
import os
import pdb
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danling import utils
from danling.utils import (
    catch,
    debug,
    ensure_dir,
    flexible_decorator,
    is_json_serializable,
    method_cache,
    to_device,
)


def test_importing_needs_no_library():
    code = """
import sys
for name in ("torch", "numpy", "pandas", "yaml"):
    sys.modules[name] = None  # importing it fails
import danling.utils as utils
assert sorted(utils.__all__) == utils.__all__
for name in utils.__all__:
    getattr(utils, name)
assert utils.to_device([1, {"a": "b"}], "cpu") == [1, {"a": "b"}]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(utils.__all__) == {
        "catch",
        "debug",
        "ensure_dir",
        "flexible_decorator",
        "is_json_serializable",
        "load",
        "load_pandas",
        "method_cache",
        "save",
        "to_device",
    }


# catch


def test_catch_reports_and_returns_none(capsys):
    @catch
    def plain(x, *, y=0):
        """Divide."""
        return x / y

    assert plain(6, y=2) == 3
    assert plain(1, y=0) is None
    error = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in error
    assert "plain(1, y=0)" in error
    assert (plain.__name__, plain.__doc__) == ("plain", "Divide.")
    assert list(inspect.signature(plain).parameters) == ["x", "y"]


def test_catch_survives_objects_that_cannot_be_shown(capsys):
    class Broken:
        def __repr__(self):
            raise RuntimeError("no")

        @catch()
        def fail(self, long):
            raise ValueError("the real one")

    assert Broken().fail("x" * 100_000) is None
    error = capsys.readouterr().err
    assert "the real one" in error
    assert len(error) < 5000


def test_catch_selects_errors():
    seen = []

    def record(error, function, args, kwargs, *extra, **named):
        seen.append((type(error), function.__name__, args, kwargs, extra, named))

    @catch(LookupError, KeyError, record, 1, two=2)
    def look(error, key=None):
        raise error

    assert look(IndexError(), key=3) is None
    ((kind, name, args, kwargs, extra, named),) = seen
    assert (kind, name, len(args), kwargs, extra, named) == (IndexError, "look", 1, {"key": 3}, (1,), {"two": 2})
    for error in (KeyError, ValueError):
        with pytest.raises(error):
            look(error())

    @catch((ValueError, TypeError), callback=record)
    def several(error):
        raise error

    assert several(TypeError()) is None
    with pytest.raises(OSError):
        several(OSError())


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_requests_to_leave_pass_unless_named(leaving):
    def fail():
        raise leaving

    for wrapped in (catch(fail), catch(BaseException)(fail), catch((BaseException, ValueError))(fail)):
        with pytest.raises(leaving):
            wrapped()
    quiet = {"callback": lambda *args: None}
    assert catch(leaving, **quiet)(fail)() is None
    assert catch((ValueError, leaving), **quiet)(fail)() is None


def test_coroutine_functions_stay_coroutine_functions(capsys):
    @catch(ValueError)
    async def work(fail):
        await asyncio.sleep(0)
        if fail:
            raise ValueError("later")
        return 5

    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(work(False)) == 5
    assert asyncio.run(work(True)) is None
    assert "later" in capsys.readouterr().err


# debug


def test_debug_opens_the_debugger_where_it_failed_and_continues(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(pdb, "post_mortem", opened.append)

    def deep():
        raise ValueError("deep")

    after = False
    with debug():
        deep()
    after = True
    assert after
    traceback = opened[0]
    while traceback.tb_next:
        traceback = traceback.tb_next
    assert traceback.tb_frame.f_code.co_name == "deep"
    assert "ValueError: deep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"enable": False}, ValueError),
        ({"error": KeyError}, ValueError),
        ({"error": LookupError, "exclude": KeyError}, KeyError),
        ({}, KeyboardInterrupt),
    ],
)
def test_debug_lets_other_errors_pass(arguments, error, monkeypatch):
    monkeypatch.setattr(pdb, "post_mortem", lambda traceback: pytest.fail("opened"))
    with pytest.raises(error), debug(**arguments):
        raise error


# flexible_decorator


def test_a_flexible_decorator_works_with_and_without_parentheses():
    @flexible_decorator
    def tagged(tag="none", *, upper=False):
        """Tag it."""

        def decorate(function):
            function.tag = tag.upper() if upper else tag
            return function

        return decorate

    @tagged
    def a(): ...

    @tagged()
    def b(): ...

    @tagged("x", upper=True)
    def c(): ...

    @tagged
    class D: ...

    assert [a.tag, b.tag, c.tag, D.tag] == ["none", "none", "X", "none"]
    assert (tagged.__name__, tagged.__doc__) == ("tagged", "Tag it.")
    assert str(inspect.signature(tagged)) == "(tag='none', *, upper=False)"
    with pytest.raises(TypeError, match="'needed'"):
        flexible_decorator(lambda needed: None)


# method_cache


class Model:
    __hash__ = None  # type: ignore[assignment]  # unhashable

    def __init__(self, factor=1):
        self.factor = factor
        self.calls = 0

    def __eq__(self, other):
        return isinstance(other, Model)  # equal, but not the same

    @method_cache
    def plain(self, x, *, power=1):
        """Compute."""
        self.calls += 1
        return self.factor * x**power

    @method_cache(maxsize=2, typed=True)
    def small(self, x):
        self.calls += 1
        return x


class Slotted:
    __slots__ = ("__weakref__",)

    @method_cache()
    def value(self):
        return object()


class NoReference:
    __slots__ = ()

    @method_cache()
    def value(self):
        return 1


def test_results_are_cached_per_instance():
    one, two = Model(1), Model(2)
    assert [one.plain(3), one.plain(3), two.plain(3), one.plain(3, power=2)] == [3, 3, 6, 9]
    assert (one.calls, two.calls) == (2, 1)
    assert one.plain.cache_info()[:2] == (1, 2)
    assert two.plain.cache_info()[:2] == (0, 1)
    one.plain.cache_clear()
    assert one.plain(3) == 3
    assert (one.calls, two.plain.cache_info().currsize) == (3, 1)
    assert (Model.plain.__name__, Model.plain.__doc__, one.plain.__name__) == ("plain", "Compute.", "plain")
    assert list(inspect.signature(Model.plain).parameters) == ["self", "x", "power"]
    assert Model.plain(one, 3) == 3
    assert one.calls == 3


def test_the_oldest_result_goes_first_and_types_can_count():
    model = Model()
    for x in (1, 1.0, 1, 2, 1.0):
        model.small(x)
    assert model.calls == 4
    assert model.small.cache_info().currsize == 2
    with pytest.raises(TypeError, match="unhashable"):
        model.plain([])


def test_instances_are_collected_and_their_caches_with_them():
    model = Model()
    model.plain(1)
    assert len(Model.plain.caches) == 1
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert not Model.plain.caches
    for _ in range(1000):  # ids are used again
        fresh = Model()
        assert fresh.plain.cache_info().currsize == 0
        fresh.plain(1)
        assert fresh.calls == 1
    bound = Model(7).plain  # keeps its instance, as a bound method does
    gc.collect()
    assert bound(1) == 7


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_copies_start_empty(duplicate):
    model = Model(3)
    model.plain(2)
    other = duplicate(model)
    assert vars(other) == vars(model) == {"factor": 3, "calls": 1}
    assert other.plain.cache_info().currsize == 0
    assert other.plain(2) == 6
    assert (other.calls, model.calls) == (2, 1)


def test_bound_methods_compare_and_pickle():
    model = Model(3)
    assert model.plain == model.plain
    assert model.plain != Model(3).plain
    assert hash(model.plain) == hash(model.plain)
    assert pickle.loads(pickle.dumps(model.plain))(2) == 6
    assert "Model.plain" in repr(model.plain)


def test_slots_need_weak_references():
    slotted = Slotted()
    assert slotted.value() is slotted.value()
    with pytest.raises(TypeError, match="'__weakref__' to its __slots__"):
        NoReference().value()
    with pytest.raises(TypeError, match="coroutine"):

        class _:
            @method_cache
            async def work(self): ...


def test_subclasses_reach_the_cached_method_of_their_parent():
    class Child(Model):
        def plain(self, x, *, power=1):
            return 10 * super().plain(x, power=power)

    child = Child(2)
    assert [child.plain(1), child.plain(1)] == [20, 20]
    assert child.calls == 1


def test_many_threads_share_one_cache():
    class Slow:
        @method_cache(maxsize=None)
        def value(self, x):
            time.sleep(0.001)
            return (x, object())

    barrier = threading.Barrier(8)
    shared, errors, results = Slow(), [], []

    def work():
        try:
            barrier.wait()
            for i in range(20):
                own = Slow()
                assert own.value(i)[0] == i
                shared.value(i)
            results.append([shared.value(i)[0] for i in range(20)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert results == [list(range(20))] * 8
    assert [shared.value(i) for i in range(20)] == [shared.value(i) for i in range(20)]
    assert shared.value.cache_info().currsize == 20
    gc.collect()
    assert len(Slow.value.caches) == 1


# ensure_dir


def test_ensure_dir_creates_what_it_returns(tmp_path):
    class Run:
        @ensure_dir
        def path(self):
            """Where."""
            return tmp_path / "a" / "b"

        @ensure_dir
        def string(self):
            return str(tmp_path / "c")

        @ensure_dir
        def raw(self):
            return os.fsencode(tmp_path / "d")

        @ensure_dir
        def nothing(self):
            return None

        @ensure_dir
        @property
        def stacked(self):
            return tmp_path / "e"

        @ensure_dir
        def own(self):
            return self._own

        @own.setter
        def own(self, value):
            self._own = value

    run = Run()
    for _ in range(2):
        assert run.path == tmp_path / "a" / "b"
        assert run.path.is_dir()
    (tmp_path / "a" / "b").rmdir()
    assert run.path.is_dir()
    assert (type(run.string), type(run.raw), run.nothing) == (str, bytes, None)
    run.own = tmp_path / "f"
    assert run.own == run.stacked.parent / "f"
    assert all((tmp_path / name).is_dir() for name in "acdef")
    assert isinstance(Run.path, property)
    assert Run.path.__doc__ == "Where."


# is_json_serializable


class Hostile(dict):
    def items(self):
        raise OSError("no")

    def __bool__(self):
        return True


def test_is_json_serializable():
    cycle: list = []
    cycle.append(cycle)
    deep: list = []
    for _ in range(200_000):
        deep = [deep]
    for obj in (1, None, "a", [1.5], {"a": (1, 2)}, float("nan")):
        assert is_json_serializable(obj)
    for obj in (cycle, deep, {1, 2}, object(), {(1,): 2}, b"", Hostile(a=1)):
        assert not is_json_serializable(obj)
    while deep:  # taking a deep list apart recursively is too much for some interpreters
        deep = deep[0]


@given(st.recursive(st.integers() | st.binary() | st.text(), lambda inner: st.lists(inner) | st.sets(st.integers())))
def test_is_json_serializable_is_what_json_says(obj):
    import json

    try:
        json.dumps(obj)
        expected = True
    except TypeError:
        expected = False
    assert is_json_serializable(obj) == expected


# to_device


Pair = namedtuple("Pair", "first second")


class MyList(list):
    pass


@dataclass(frozen=True)
class Batch:
    ids: torch.Tensor
    names: list
    hidden: torch.Tensor = field(init=False, default=None)  # type: ignore[assignment]


@dataclass
class Slots:
    __slots__ = ("x",)
    x: torch.Tensor


class Movable:
    def __init__(self, device="cpu"):
        self.device = device

    def to(self, device, non_blocking=False):
        return Movable((device, non_blocking))


class MovableByDeviceAlone:
    def to(self, device):
        return device


def test_to_device_keeps_every_container():
    tensor = torch.ones(2)
    factory = defaultdict(list, a=[tensor])
    attributed = MyList([tensor])
    attributed.note = "kept"
    data = {
        "list": [tensor, 1, "a", None],
        "tuple": (tensor, 2.5),
        "named": Pair(tensor, "b"),
        "ordered": OrderedDict(x=tensor),
        "default": factory,
        "mine": attributed,
        "batch": Batch(tensor, [tensor]),
        "slots": Slots(tensor),
        "max": torch.ones(2, 2).max(0),
        "set": {1, 2},
        "path": Path("x"),
        "type": torch.Tensor,
        "module": torch.nn.Linear(1, 1),
    }
    moved = to_device(data, "meta")

    def check(before, after):
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta"
        elif isinstance(before, torch.nn.Module):
            assert next(after.parameters()).device.type == "meta"
        else:
            assert type(after) is type(before)
            if isinstance(before, dict):
                assert list(after) == list(before)
                for key in before:
                    check(before[key], after[key])
            elif isinstance(before, (list, tuple)):
                assert len(after) == len(before)
                for one, other in zip(before, after, strict=True):
                    check(one, other)
            elif isinstance(before, (Batch, Slots)):
                for name in type(before).__dataclass_fields__:
                    check(getattr(before, name), getattr(after, name))
            else:
                assert after is before or after == before

    check(data, moved)
    assert moved["default"].default_factory is list
    assert moved["mine"].note == "kept"
    assert moved["named"].second == "b"
    assert tensor.device.type == "cpu"
    assert all(item.device.type == "cpu" for item in (factory["a"][0], attributed[0], data["batch"].ids))


def test_to_device_moves_whatever_can_be_moved():
    assert to_device([Movable()], "x")[0].device == ("x", False)
    assert to_device(Movable(), "x", non_blocking=True).device == ("x", True)
    assert to_device(MovableByDeviceAlone(), "x") == "x"
