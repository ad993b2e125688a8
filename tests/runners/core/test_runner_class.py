"""`Runner` takes its engine from the configuration: one combined class per pair, which pickles by reference."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from abc import ABC, abstractmethod

import pytest

from danling.runners import BaseRunner, ConfigError, Runner, StackError
from danling.runners.discovery import StackChoice
from danling.runners.manifest import write_manifest
from danling.runners.runner import combine

ENGINES = """
    from danling.runners import BaseRunner

    class Toy(BaseRunner):
        stack = "toy"
        def hello(self):
            return "toy"

    class Other(BaseRunner):
        stack = "other"
        def hello(self):
            return "other"
"""

USER = """
    import pickle
    from danling.runners import BaseRunner, Runner

    class Mine(Runner):
        "What I do."
        def __init__(self, config, extra=0):
            super().__init__(config)
            self.extra = extra
        def hello(self):
            return "mine over " + super().hello()
        @staticmethod
        def add_one(value):
            return value + 1

    class Mapped:
        # what a data loader's worker is given: a class by reference, inside an object
        def __init__(self, runner):
            self.kind = type(runner)
        def __call__(self, value):
            return self.kind.__name__, self.kind.__mro__[3].__name__, self.kind.add_one(value)
"""


class Toy(BaseRunner):
    stack = "toy"

    def hello(self):
        return "toy"


class Other(BaseRunner):
    stack = "other"


class Mine(Runner):
    """What I do."""

    def hello(self):
        return "mine over " + super().hello()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory on the path with two engines, their entry points, and a user's module."""
    directory = tmp_path_factory.mktemp("site")
    info = directory / "danling_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: danling-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[danling.runners]\ntoy = toy_engines:Toy\nother = toy_engines:Other\n")
    (directory / "toy_engines.py").write_text(textwrap.dedent(ENGINES))
    (directory / "user_module.py").write_text(textwrap.dedent(USER))
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    yield directory
    sys.path.remove(str(directory))


@pytest.fixture
def user(site):
    """The user's module."""
    return importlib.import_module("user_module")


@pytest.fixture
def config(tmp_path):
    """Makes configurations for this test."""
    return lambda stack, **more: {"stack": stack, "workspace_root": str(tmp_path), "epochs": 1, "log": False, **more}


def test_the_combined_class():
    combined = combine(Mine, Toy)
    assert combined.__bases__ == (Mine, Toy) and combined is combine(Mine, Toy)
    assert combined is not combine(Mine, Other)
    assert issubclass(combined, Runner)
    assert (combined.__name__, combined.__qualname__, combined.__module__) == ("Mine", "Mine", __name__)
    assert combined.__doc__ == "What I do." and combined.stack == "toy"
    assert Mine.stack is None and Runner.stack is None  # no base is changed
    assert Mine.__bases__ == (Runner,) and Runner.__bases__ == (BaseRunner,)
    order = combined.__mro__
    assert order.index(Mine) < order.index(Runner) < order.index(Toy) < order.index(BaseRunner)


@pytest.mark.parametrize("stack", ["toy", "other"])
def test_one_script_runs_on_any_engine(user, config, stack):
    with user.Mine(config(stack), extra=3) as runner:
        assert isinstance(runner, user.Mine) and isinstance(runner, Runner) and isinstance(runner, BaseRunner)
        assert runner.hello() == f"mine over {stack}" and runner.extra == 3
        assert (runner.stack, runner.stack_reason) == (stack, "asked for")
        assert type(runner).__module__ == "user_module"
    with user.Mine(config=config(stack, name="second")) as again:
        assert type(again) is type(runner)
    with Runner(config(stack, name="plain")) as plain:
        assert plain.hello() == stack


def test_it_pickles_by_reference_even_where_no_runner_was_ever_built(user, config, site, tmp_path):
    with user.Mine(config("toy")) as runner:
        kind = type(runner)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps([kind, user.Mapped(runner)], protocol)
        back, mapped = pickle.loads(data)
        assert back is kind and mapped(1) == ("Mine", "Toy", 2)
        (tmp_path / f"pickled-{protocol}").write_bytes(data)
    code = """
import pickle, sys
for path in sys.argv[1:]:
    kind, mapped = pickle.load(open(path, "rb"))
    assert kind.stack == "toy" and mapped(1) == ("Mine", "Toy", 2), path
assert "torch" not in sys.modules
"""
    files = sorted(map(str, tmp_path.glob("pickled-*")))
    assert len(files) == pickle.HIGHEST_PROTOCOL + 1
    env = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code, *files], env=env, check=True)


def test_a_spawned_worker_knows_the_class(user, config):
    with user.Mine(config("toy")) as runner, multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(user.Mapped(runner), [1, 2]) == [("Mine", "Toy", 2), ("Mine", "Toy", 3)]


def test_abstract_classes_mix_in(user, config):
    class Named(ABC):
        @abstractmethod
        def title(self): ...

    class Titled(user.Mine, Named):
        def title(self):
            return "titled"

    class Untitled(user.Mine, Named): ...

    with Titled(config("toy")) as runner:
        assert runner.title() == "titled" and runner.hello() == "mine over toy" and isinstance(runner, Named)
    with pytest.raises(TypeError, match="abstract"):
        Untitled(config("toy", name="other"))


def test_a_subclass_of_an_engine_is_left_as_it_is(user, config):
    engine = importlib.import_module("toy_engines").Toy

    class Fixed(engine): ...

    class Both(Runner, engine): ...

    with Fixed(config("auto")) as runner:
        assert type(runner) is Fixed and runner.stack_reason == "the class is fixed to it"
    with Both(config("toy", name="both")) as runner:
        assert type(runner) is Both and runner.hello() == "toy"
    with pytest.raises(StackError, match="Fixed is fixed to stack 'toy', but the configuration says stack: torch"):
        Fixed(config("torch"))


def test_a_configuration_that_the_constructor_makes_must_agree_with_the_engine_chosen_before(user, config, monkeypatch):
    class Own(Runner):
        def __init__(self, width, stack):
            super().__init__(config(stack, name=str(width)))

    monkeypatch.setattr("danling.runners.runner.resolve_stack", lambda *_, **__: StackChoice("toy", "the default"))
    with Own(3, "auto") as runner:
        assert runner.stack == "toy"
    with pytest.raises(StackError, match="fixed to stack 'toy', but the configuration says stack: other"):
        Own(3, "other")


def test_the_engine_of_the_checkpoint_is_taken_again(user, config, tmp_path):
    with user.Mine(config("toy")) as runner:
        directory = runner.checkpoint_dir / "epoch-1"
    directory.mkdir(parents=True)
    write_manifest(directory, {"kind": "full", "stack": "other", "global_step": 5}, {})
    from danling.runners.config import RunnerConfig
    from danling.runners.runner import _checkpoint_stack

    assert _checkpoint_stack(RunnerConfig.of(config("auto"))) is None
    assert _checkpoint_stack(RunnerConfig.of(config("auto", auto_resume=True))) == "other"
    assert _checkpoint_stack(RunnerConfig.of(config("auto", resume=str(directory)))) == "other"
    assert _checkpoint_stack(RunnerConfig.of(config("auto", resume=str(tmp_path / "nowhere")))) is None


def test_a_wrong_configuration_leaves_nothing_behind(user, config, tmp_path):
    with pytest.raises(ConfigError, match="epoch"):
        user.Mine(config("toy", epoch=3))
    with pytest.raises(StackError, match="unknown stack 'nonsense'"):
        user.Mine(config("nonsense"))
    assert list(tmp_path.iterdir()) == []
