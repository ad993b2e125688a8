"""RunnerConfig: what is open and what is closed, older names, types of one's own, files, copies."""

import copy
import json
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

import chanfig
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.runners import ConfigError, RunnerConfig
from danling.runners.aliases import RENAMED


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


class Model(chanfig.Config):
    hidden: int = 32
    act: str = "relu"

    def post(self):
        self.doubled = self.hidden * 2


class Mine(RunnerConfig):
    epochs: int = 3
    width: int = 64
    ratio: float = 0.5
    debug: bool = False
    title: Optional[str] = None  # noqa: UP045 - the older spelling works as well
    sizes: list[int] = [1, 2]
    pair: tuple[int, float] = (1, 2.0)
    kind: Literal["a", "b"] = "a"
    mode: Mode = Mode.FAST
    root: Path = Path("data")
    table: dict[str, float] = {"x": 1.0}
    anything: Any = None
    patience = 5  # a key of danling needs no annotation
    helper = staticmethod(len)
    constant: ClassVar[int] = 7
    _private: int = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model = Model()


def problem_lines(config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.validate()
    return str(caught.value).splitlines()


# -- access


def test_dotted_and_attribute_access_reach_the_same_value():
    config = RunnerConfig({"optim.lr": 1e-3, "model": {"a.b": 1}})
    assert config.optim.lr == config["optim.lr"] == config["optim"]["lr"] == 1e-3
    assert config.model.a.b == 1
    config.data.root = "here"
    config["data.size"] = 3
    assert config.data.dict() == {"root": "here", "size": 3}
    assert "data.size" in config and "data.colour" not in config
    del config["data.size"]
    assert config.pop("data.root") == "here" and config.get("nothing", 5) == 5


def test_defaults_are_there_from_the_start_and_belong_to_the_instance():
    first, second = RunnerConfig(), RunnerConfig()
    assert first.seed == 1016 and first.checkpoint.interval is None and first.ema.decay == 0.999
    mine, other = Mine(), Mine()
    mine.sizes.append(3)
    mine.table["y"] = 2.0
    first.checkpoint.interval = 5
    assert other.sizes == [1, 2] and other.table == {"x": 1.0} and Mine().sizes == [1, 2]
    assert second.checkpoint.interval is None


def test_sections_that_only_a_read_made_are_dropped_and_explicit_ones_stay():
    config = RunnerConfig({"model": {"options": {}}, "head": {}})
    config.backbone.layers  # noqa: B018 - the read is the point
    config.model.extra.deep  # noqa: B018
    config.deepspeed.zero  # noqa: B018
    config.optim.lr  # noqa: B018
    config.boot()
    assert "backbone" not in config and "extra" not in config.model and "lr" not in config.optim
    assert config.deepspeed is None
    assert config.model.options == {} and config.head == {}


def test_after_boot_a_missing_name_is_an_attribute_error_and_sections_still_nest():
    config = RunnerConfig().boot()
    with pytest.raises(AttributeError, match="checkpont"):
        config.checkpont  # noqa: B018
    config["data.root"] = "x"
    config.head = {"size": {"in": 3}}
    assert type(config.head.size) is chanfig.Config and config.data.dict() == {"root": "x"}
    config.head.more = {"a": 1}
    assert config.head.more.a == 1


def test_a_value_where_a_section_belongs_is_refused():
    config = RunnerConfig({"checkpoint": "runs/old"})
    with pytest.raises(ConfigError, match="stands where a section"):
        config["checkpoint.interval"] = 3
    (line,) = problem_lines(config)
    assert line.startswith("checkpoint: 'runs/old'") and "now given as 'resume'" in line


@pytest.mark.parametrize("section", ["optim", "dataloader", "parallel", "ema", "checkpoint"])
def test_none_for_a_section_means_its_defaults(section):
    config = RunnerConfig({section: None}).boot()
    assert config[section].dict() == RunnerConfig().boot()[section].dict()


# -- open and closed


@pytest.mark.parametrize("name", ["model", "network", "dataset", "data", "backbone", "head", "task", "metric", "seeds"])
def test_sections_of_ones_own_are_open(name):
    config = RunnerConfig({name: {"anything": {"goes": [1, "a", None]}}}).boot()
    assert config[name].anything.goes == [1, "a", None]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("optin", "optim"),
        ("optmi", "optim"),
        ("stacks", "stack"),
        ("schedulr", "scheduler"),
        ("epoch", "epochs"),
        ("dataloaders", "dataloader"),
        ("optimizers", "optimizer"),
        ("shed", "sched"),
        ("logs", None),
    ],
)
def test_a_section_one_edit_from_a_long_key_is_refused(name, near):
    config = RunnerConfig({name: {"a": 1}})
    if near is None:
        config.validate()
    else:
        (line,) = problem_lines(config)
        assert line.startswith(f"{name}: ") and repr(near) in line


@pytest.mark.parametrize(
    ("name", "value", "near"), [("epoch", 3, "epochs"), ("lr", 1e-3, "optim.lr"), ("foo", "a", None)]
)
def test_an_undeclared_scalar_is_refused_with_both_remedies(name, value, near):
    (line,) = problem_lines(RunnerConfig({name: value}))
    assert line.startswith(f"{name}: unknown key (value {value!r})")
    assert f"model.{name}" in line and f"({name}: {type(value).__name__})" in line and "subclass" in line
    assert near is None or f"did you mean {near!r}" in line


@pytest.mark.parametrize("name", ["world_size", "rank", "local_rank", "master_addr", "master_port"])
def test_what_the_environment_says_is_no_key(name):
    (line,) = problem_lines(RunnerConfig({name: 2}))
    assert name.upper() in line and "environment" in line


def test_open_mappings_take_anything():
    config = RunnerConfig(
        {
            "deepspeed.zero_optimization.stage": 2,
            "stack": "deepspeed",
            "compile.options": {"max_autotune": True},
            "optim": {"type": "sgd", "nesterov": True, "foo": "1e-3"},
            "scheduler.eta_min": "1e-6",
        }
    ).boot()
    assert config.deepspeed.zero_optimization.stage == 2
    assert config.compile.options.max_autotune is True
    assert config.optim.nesterov is True and config.optim.foo == 1e-3 and config.scheduler.eta_min == 1e-6


def test_splits_override_the_loader_with_the_same_closed_keys():
    config = RunnerConfig({"dataloader": {"batch_size": 8, "val": {"batch_size": "32", "shuffle": "no"}}}).boot()
    assert config.dataloader.val.dict() == {"batch_size": 32, "shuffle": False}
    (line,) = problem_lines(RunnerConfig({"dataloader.val.batchsize": 3}))
    assert line.startswith("dataloader.val.batchsize: unknown key") and "dataloader.batch_size" in line
    (line,) = problem_lines(RunnerConfig({"dataloader.val.batch_size": 0}))
    assert line.startswith("dataloader.val.batch_size: 0")
    (line,) = problem_lines(RunnerConfig({"dataloader.val.train.batch_size": 3}))
    assert line.startswith("dataloader.val.train: unknown key")


def test_every_problem_is_in_one_error():
    config = RunnerConfig({"epochs": "three", "optin": {"lr": 1}, "lr": 3, "rank": 0, "ema.decay": 2, "ddp.bucket": 1})
    lines = problem_lines(config)
    assert lines[0] == "6 problems in the configuration:"
    assert {line.strip().split(":")[0] for line in lines[1:]} == {
        "epochs",
        "optin",
        "lr",
        "rank",
        "ema.decay",
        "ddp.bucket",
    }


def test_what_a_file_cannot_hold_is_refused():
    (line,) = problem_lines(RunnerConfig({"model": {"act": object()}}))
    assert line.startswith("model.act: builtins.object cannot be written")
    RunnerConfig(
        {"model": {"root": Path("a"), "mode": Mode.FAST, "size": (1, 2), "kind": {3, 1}, "cls": dict}}
    ).validate()


# -- contradictions


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 10, "epochs": 2}, ["steps: 10", "epochs: 2"]),
        ({"checkpoint": {"async_enabled": False, "async_mode": "async"}}, ["checkpoint.async_enabled", "'async'"]),
        ({"compile": {"mode": "default", "options": {"a": 1}}}, ["compile.mode", "compile.options"]),
        ({"parallel.axes": {"shard": -1, "tensor": -1}}, ["parallel.axes.shard, parallel.axes.tensor", "-1"]),
        ({"fsdp.enabled": False, "parallel.axes.shard": 2}, ["fsdp.enabled", "parallel.axes.shard: 2"]),
        ({"ft": {"replica_id": 2, "group_size": 2}}, ["ft.replica_id: 2", "ft.group_size: 2"]),
        ({"ft": {"min_replica_size": 3, "group_size": 2}}, ["ft.min_replica_size: 3", "ft.group_size: 2"]),
        ({"deepspeed": {"a": 1}, "stack": "torch"}, ["deepspeed", "'torch'"]),
        ({"accelerate": {"a": 1}, "stack": "ddp"}, ["accelerate", "'ddp'"]),
        ({"dataloader.prefetch_factor": 2}, ["dataloader.prefetch_factor", "num_workers is 0"]),
        ({"dataloader.persistent_workers": True}, ["dataloader.persistent_workers", "num_workers is 0"]),
        ({"dataloader": {"val": {"prefetch_factor": 2}}}, ["dataloader.val.prefetch_factor"]),
        ({"dataloader": {"num_workers": 2, "prefetch_factor": 2, "val": {"num_workers": 0}}}, ["dataloader.val.pref"]),
    ],
)
def test_contradictions(given, words):
    (line,) = problem_lines(RunnerConfig(given))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "given",
    [
        {"checkpoint": {"async_enabled": False, "async_mode": "disabled"}},
        {"checkpoint": {"async_mode": "async"}},
        {"deepspeed": {"a": 1}, "stack": "ds"},
        {"deepspeed": {"a": 1}},
        {"accelerate": {"a": 1}, "stack": "Accelerate"},
        {"dataloader": {"train": {"num_workers": 2, "prefetch_factor": 2}}},
        {"parallel.axes": {"shard": -1}},
        {"fsdp.enabled": False},
    ],
)
def test_no_contradiction(given):
    RunnerConfig(given).validate()


def test_unordered_batches_are_warned_about():
    config = RunnerConfig({"dataloader.in_order": False})
    with pytest.warns(UserWarning, match="in_order.*exact resume") as caught:
        RunnerConfig.of(config)
        config.validate()
        RunnerConfig.of(config).identity()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="in_order.*exact resume"):
        RunnerConfig({"dataloader.val.in_order": False}).validate()


# -- older names and synonyms


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_older_names(old, new):
    value = {"stack": "torch", "epochs": 3, "steps": 3, "checkpoint.interval": 3}.get(new, "text")
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        config = RunnerConfig({old: value})
    config.validate()
    assert config[new] == value and old not in config
    config = RunnerConfig()
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        setattr(config, old, value)
    config.validate()
    assert config[new] == value
    with pytest.warns(DeprecationWarning):
        RunnerConfig({old: value, new: value}).validate()
    other = {"stack": "deepspeed", "epochs": 4, "steps": 4, "checkpoint.interval": 4}.get(new, "other")
    with pytest.warns(DeprecationWarning):
        (line,) = problem_lines(RunnerConfig({old: value, new: other}))
    assert line.startswith(f"{old}: {value!r} contradicts {new}: {other!r}")
    with pytest.warns(DeprecationWarning):
        config = RunnerConfig({new: other})
        setattr(config, old, value)
    assert problem_lines(config)[0].startswith(f"{old}: {value!r} contradicts")
    config[new] = value  # settled
    config.validate()


def test_an_older_name_on_the_command_line_wins_over_the_default_of_the_class():
    with pytest.warns(DeprecationWarning):
        assert Mine().parse(["--epoch_end", "20"]).epochs == 20
    with pytest.warns(DeprecationWarning):
        config = Mine()
        config.epoch_end = 20
    assert config.boot().epochs == 20


def test_a_deprecation_warning_names_the_callers_line():
    with pytest.warns(DeprecationWarning) as caught:
        RunnerConfig({"epoch_end": 3})
        RunnerConfig(run_name="a")
        RunnerConfig().index = "acc"
        RunnerConfig().merge({"save_interval": 3})
    assert [Path(item.filename).name for item in caught] == ["test_config.py"] * 4


@pytest.mark.parametrize(("synonym", "name"), [("sched", "scheduler"), ("optimizer", "optim")])
def test_synonyms_read_and_write_one_section(synonym, name):
    config = RunnerConfig()
    config[synonym].type = "a"
    assert config[name].type == "a" and getattr(config, synonym) is getattr(config, name)
    setattr(config, synonym, {"type": "b"})
    assert config[f"{name}.type"] == "b" and synonym in config and f"{synonym}.type" in config
    assert synonym not in list(config)
    config = RunnerConfig({synonym: {"type": "a"}, name: {"extra": 1}}).boot()
    assert config[name].type == "a" and config[name].extra == 1
    for both in ({synonym: {"type": "a"}, name: {"type": "b"}}, {name: {"type": "b"}, synonym: {"type": "a"}}):
        (line,) = problem_lines(RunnerConfig(both))
        assert f"{synonym}.type" in line and f"{name}.type" in line
    assert config.pop(f"{synonym}.extra") == 1


def test_a_synonym_on_a_subclass():
    class Config(RunnerConfig):
        sched: dict = {"type": "cosine"}

    config = Config().boot()
    assert config.scheduler.type == "cosine" and config.identity() == {"scheduler.type": "cosine"}


# -- keys of one's own


def test_annotated_keys_are_typed_whatever_the_source():
    config = Mine(
        {
            "width": 1e2,
            "ratio": "3e-4",
            "debug": "false",
            "title": "none",
            "sizes": ("3", 4.0),
            "pair": [2, "1e-1"],
            "kind": "b",
            "mode": "slow",
            "root": "here",
            "table": {"x": "2"},
            "anything": [1],
        }
    ).boot()
    assert (config.width, config.ratio, config.debug, config.title, config.sizes) == (100, 3e-4, False, None, [3, 4])
    assert (config.pair, config.kind, config.mode, config.root) == ((2, 0.1), "b", Mode.SLOW, Path("here"))
    assert config.table == {"x": 2.0} and config.anything == [1] and config.patience == 5
    assert "constant" not in config and "_private" not in config and "helper" not in config


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("width", 1.5),
        ("width", True),
        ("ratio", "fast"),
        ("debug", "maybe"),
        ("title", 3),
        ("sizes", 3),
        ("sizes", ["a"]),
        ("pair", [1]),
        ("pair", [1.5, 2]),
        ("kind", "c"),
        ("mode", "medium"),
        ("root", 3),
        ("table", {"x": "y"}),
        ("table", 3),
        ("epochs", 0),
        ("patience", "long"),
        ("model.hidden", "wide"),
    ],
)
def test_annotated_keys_refuse_wrong_values(name, wrong):
    config = Mine()
    config[name] = wrong
    (line,) = problem_lines(config)
    assert line.startswith(f"{name}: ") and "is not allowed; give " in line


def test_a_required_key():
    class Config(RunnerConfig):
        root: str
        size: int | None
        extra: dict

    (line,) = problem_lines(Config())
    assert line == "root: missing; Config declares it as str without a default"
    assert Config(root="a").boot().root == "a"
    assert Config().parse(["--root", "here"]).root == "here"


def test_a_section_class_of_ones_own_keeps_its_class_types_and_post():
    config = Mine()
    config.model.hidden = "8"
    config.boot()
    assert type(config.model) is Model and config.model.hidden == 8 and config.model.doubled == 16
    assert type(copy.deepcopy(config).model) is Model


def test_a_section_class_declared_on_the_class_types_what_is_given():
    class Declared(RunnerConfig):
        model: Model = Model()

    config = Declared({"model": {"hidden": "5"}}).boot()
    assert type(config.model) is Model and config.model.hidden == 5 and config.model.doubled == 10
    assert Declared().parse(["--model.hidden", "6"]).model.doubled == 12 and Declared().model.hidden == 32
    (line,) = problem_lines(Declared({"model.hidden": "wide"}))
    assert line.startswith("model.hidden: 'wide'")


def test_constructor_arguments_win_over_what_init_sets():
    config = Mine({"model": {"hidden": 8}}).boot()
    assert type(config.model) is Model and config.model.hidden == 8 and config.model.doubled == 16


def test_post_sees_typed_values_and_may_complete_them():
    class Config(RunnerConfig):
        width: int = 4

        def post(self):
            assert type(self.width) is int and type(self.epochs) is int
            self.model.width = self.width * 2
            self.name = f"w{self.width}"

    config = Config({"epochs": 1e1}).parse(["--width", "8"])
    assert config.model.width == 16 and config.name == "w8"


def test_interpolation_leaves_plain_values():
    config = RunnerConfig({"data": {"root": "here", "train": "${data.root}/train", "all": ["${data.root}"]}}).boot()
    assert config.data.train == "here/train" and type(config.data.train) is str
    assert type(config.data.root) is str and config.data.all == ["here"]
    config.data.root = "there"
    assert config.identity()["data.train"] == "here/train"
    with pytest.raises(ConfigError, match="data.nothing"):
        RunnerConfig({"data": {"x": "${data.nothing}"}}).boot()


def test_forward_references_that_cannot_be_resolved_are_not_checked():
    namespace: dict = {"RunnerConfig": RunnerConfig}
    exec("from __future__ import annotations\nclass C(RunnerConfig):\n  a: Missing = 3\n  b: int = 4", namespace)
    assert namespace["C"]().boot().b == 4


# -- copies and files


def test_of_copies_and_leaves_the_original_alone():
    given = {"optim": {"lr": "1e-3"}, "model": {"sizes": [1]}}
    config = RunnerConfig.of(given)
    config.model.sizes.append(2)
    assert given == {"optim": {"lr": "1e-3"}, "model": {"sizes": [1]}} and config.optim.lr == 1e-3
    mine = Mine().freeze()
    other = RunnerConfig.of(mine)
    assert type(other) is Mine
    other.sizes.append(9)
    other.epochs = 7
    assert mine.sizes == [1, 2] and mine.epochs == 3
    assert mine.getattr("frozen")


@pytest.mark.parametrize("make", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("booted", [False, True])
def test_copies_are_equal_and_of_the_same_class(make, booted):
    config = Mine({"optim": {"lr": 1e-3, "param_groups": [{"pattern": "bias"}]}, "data.root": "x"})
    config = config.boot() if booted else config
    copied = make(config)
    assert type(copied) is Mine and copied == config and copied.optim.lr == 1e-3 and copied.sched is copied.scheduler
    assert copied.boot().identity() == config.boot().identity()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_give_back_what_was_written(tmp_path, suffix):
    config = Mine(
        {"optim.lr": 1e-5, "model.tag": "1e-3", "data": {"date": "2026-01-31", "at": "12:30", "no": "no"}}
    ).boot()
    path = tmp_path / f"config.{suffix}"
    config.save(path)
    again = Mine.load(path).boot()
    assert again.diff(config) == {} and again.identity() == config.identity()
    assert again.model.tag == "1e-3" and again.data.dict() == {"date": "2026-01-31", "at": "12:30", "no": "no"}
    assert Mine(path).boot() == again
    if suffix == "json":
        json.loads(path.read_text())


def test_yaml_numbers_are_numbers():
    config = RunnerConfig.from_yamls(
        "optim: {lr: 1e-3}\nmodel: {a: 1e-3, b: 1E5, c: 0x10, d: 010, e: 1_000, f: .5, g: -.inf}"
    )
    assert config.optim.lr == 1e-3
    assert config.model.dict() == {"a": 1e-3, "b": 1e5, "c": 16, "d": "010", "e": 1000, "f": 0.5, "g": float("-inf")}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.from_regex(r"[-+]?[0-9._]{1,4}(e[-+]?[0-9]{1,2})?", fullmatch=True)
    | st.sampled_from(["yes", "null", "~", "2026-01-31", "12:30", "1e3", "0o7", "0x1f", "=", "<<", "- a", "a: b", "#"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_yaml_round_trip(value):
    from danling.runners.configfile import dump_yaml, parse_yaml

    again = parse_yaml(dump_yaml({"v": value}))["v"]
    assert again == value and repr(again) == repr(value)


def test_what_a_run_stored_is_read_without_its_class():
    class Own(Mine):
        identity_exclude: ClassVar = {"root", "data.root"}

    config = Own({"width": 5, "data": {"root": "/x", "size": 3}, "optim.lr": 1e-3}).boot()
    stored = RunnerConfig.stored(json.loads(config.jsons()), config.excluded())
    for again in (stored, RunnerConfig.of(stored), pickle.loads(pickle.dumps(stored)), copy.deepcopy(stored)):
        assert again.boot().width == 5 and again.identity() == config.identity()
    with pytest.raises(ConfigError, match="epochs: 'soon'"):
        RunnerConfig.stored({"epochs": "soon", "width": 5}).validate()
    with pytest.raises(ConfigError, match="width: unknown key"):
        RunnerConfig({"width": 5}).validate()


def test_diff():
    config = RunnerConfig({"optim.lr": 1e-3, "model": {"a": 1, "b": 2}})
    other = RunnerConfig({"optim.lr": "1e-3", "model": {"a": 1.0, "c": 2}, "log": False})
    assert config.diff(other) == {"log": (True, False), "model.b": (2, None), "model.c": (None, 2)}
    assert config.diff(config) == {} and config.diff({"seed": 1, "optim.lr": 1e-3, "model": {"a": 1, "b": 2}}) == {
        "seed": (1016, 1)
    }


# -- imports


def test_configuration_works_without_torch():
    """chanfig imports torch when it is there; with torch hidden the whole configuration works all the same."""
    script = """
import sys
sys.modules["torch"] = None
from danling.runners import RunnerConfig
config = RunnerConfig({"optim.type": "adamw"}).parse(["--epochs", "3", "--model.width", "4"])
assert config.identity() == {"model.width": 4, "optim.type": "adamw"}
assert RunnerConfig.from_yamls(config.yamls()).boot() == config
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_the_table_needs_neither_torch_nor_chanfig():
    script = """
import sys
from danling.runners import aliases, commandline, configfile, contradictions, declared
from danling.runners import errors, identity, interval, keys, kinds
assert not {"torch", "chanfig"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
