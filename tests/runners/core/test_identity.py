"""Identity: what is in the view, and that the ids of today are the ids of every later version."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.runners import RunnerConfig
from danling.runners.identity import canonical_json, config_id, differences, flatten, identity_view, normalise
from danling.runners.interval import Interval


class Digits(RunnerConfig):
    epochs: int = 10
    width: int = 64
    seed: int = 7

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.optim.type = "adamw"
        self.optim.lr = 1e-3


# These literals are the contract: a change here moves every run directory that exists.
FROZEN = [
    (RunnerConfig, {}, {}, "44136fa355b3"),
    (Digits, {}, {"optim.lr": 0.001, "optim.type": "adamw", "seed": 7, "width": 64}, "a2f4913baa21"),
    (
        RunnerConfig,
        {
            "model": {"name": "résnet", "layers": [3, 4.0, {"a": True}], "root": Path("a/b"), "none": None},
            "optim": {
                "type": "sgd",
                "lr": 1e-1,
                "momentum": 0.9,
                "param_groups": [{"pattern": "bias", "lr_mult": 2.0}],
            },
            "scheduler": {"type": "cosine", "warmup": 1e2},
            "dataloader": {"batch_size": 32, "num_workers": 4, "val": {"batch_size": 64, "num_workers": 2}},
            "precision": "bfloat16",
            "pretrained": "weights.safetensors",
            "epochs": 90,
            "stack": "torch",
        },
        {
            "dataloader.batch_size": 32,
            "dataloader.val.batch_size": 64,
            "model.layers": [3, 4, {"a": True}],
            "model.name": "résnet",
            "model.none": None,
            "model.root": "a/b",
            "optim.lr": 0.1,
            "optim.momentum": 0.9,
            "optim.param_groups": [{"lr_mult": 2, "pattern": "bias"}],
            "optim.type": "sgd",
            "precision": "bf16",
            "pretrained": "weights.safetensors",
            "scheduler.type": "cosine",
            "scheduler.warmup": 100,
        },
        "f40779c06be6",
    ),
]


@pytest.mark.parametrize(("cls", "given", "view", "digest"), FROZEN)
def test_frozen_vectors(cls, given, view, digest):
    found = cls(given).identity()
    assert found == view and list(found) == sorted(found)
    assert json.loads(canonical_json(found)) == view
    assert config_id(found) == digest and len(digest) == 12


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 5},
        {"steps": 100},
        {"dataloader.num_workers": 3},
        {"log": False},
        {"tensorboard": True},
        {"eval_interval": 2},
        {"checkpoint.interval": 3},
        {"score_name": "acc"},
        {"resume": "x"},
        {"workspace_root": "elsewhere"},
        {"name": "n"},
        {"stack": "deepspeed", "deepspeed": {"a": 1}},
        {"parallel.axes.shard": 2},
        {"fsdp.enabled": True},
        {"ddp.static_graph": True},
        {"compile.enable": True},
        {"activation_checkpoint.enabled": True},
        {"ft.group_size": 2},
        {"wandb.enabled": True},
        {"accelerate": {"a": 1}},
        {"profiling.enabled": True},
        {"gc.interval": 3},
        {"heartbeat.enabled": True},
        {"comm.backend": "gloo"},
        {"performance.peak_flops": 1e12},
        {"evaluate_splits": ["a"]},
        {"patience": 3},
        {"auto_resume": True},
        {"progress": False},
        {"precision": "fp32"},
        {"seed": 1016},
        {"seed": 1016.0},
        {"ema.decay": "0.999"},
        {"optim": {"type": None}},
    ],
)
def test_budget_resources_layout_and_danlings_defaults_do_not_count(given):
    assert RunnerConfig(given).identity() == {}


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 1},
        {"seed": None},
        {"optim.lr": 0.1},
        {"optim.nesterov": False},
        {"dataloader.batch_size": 2},
        {"pretrained": "x"},
        {"dataloader.train.shuffle": False},
        {"model": {"a": 1}},
        {"model": {}},
        {"accum_steps": 2},
        {"ema.enabled": True},
        {"scheduler.eta_min": 0},
        {"train_splits": ["a"]},
        {"deterministic": True},
        {"precision": "bf16"},
        {"dataloader.shard": "none"},
    ],
)
def test_what_counts(given):
    config = RunnerConfig(given)
    assert config.identity() != {} and config_id(config.identity()) != config_id({})


def test_defaults_changed_on_a_subclass_and_keys_of_ones_own_always_stand():
    assert Digits().identity()["seed"] == 7 and Digits().identity()["width"] == 64
    assert "seed" not in Digits(seed=1016).identity()
    assert Digits(width=64).identity() == Digits().identity()


def test_a_subclass_removes_keys_of_its_own():
    class Base(Digits):
        identity_exclude: ClassVar = {"dataset.root"}

    class Child(Base):
        identity_exclude = ["width", "cache"]

    config = Child({"dataset": {"root": "/data", "name": "digits"}, "cache": {"a": 1, "b": {"c": 2}}})
    assert config.identity() == {"dataset.name": "digits", "optim.lr": 0.001, "optim.type": "adamw", "seed": 7}
    assert "dataset.root" not in Base({"dataset.root": "x"}).identity() and "width" in Base().identity()
    assert "identity_exclude" not in Child()


def test_the_same_view_from_the_object_a_file_and_the_command_line(tmp_path):
    config = Digits({"model": {"rate": 1e-3, "size": (3, 4)}}).boot()
    config.yaml(tmp_path / "c.yaml")
    config.json(tmp_path / "c.json")
    words = "--model.rate 0.001 --model.size 3 4".split()
    views = [
        Digits.load(tmp_path / "c.yaml").identity(),
        Digits.load(tmp_path / "c.json").identity(),
        Digits().parse(words).identity(),
        identity_view(config.dict()),
    ]
    assert all(view == config.identity() for view in views)


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (1e3, 1000),
        (-0.0, 0),
        (0.1, 0.1),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (True, True),
        ([1.0, {"a": 2.0}], [1, {"a": 2}]),
        ("1.0", "1.0"),
        (2.0**60, 2**60),
    ],
)
def test_normalise(value, result):
    found = normalise(value)
    assert found == result and type(found) is type(result)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.dictionaries(
    st.from_regex(r"[a-z]{6,9}", fullmatch=True),
    st.dictionaries(st.text("xyz", min_size=1, max_size=2), LEAVES, max_size=3),
    max_size=3,
)


@given(TREES)
def test_the_id_does_not_depend_on_the_order_of_keys(tree):
    shuffled = {name: dict(reversed(section.items())) for name, section in reversed(tree.items())}
    assert config_id(identity_view(tree)) == config_id(identity_view(shuffled))


@given(TREES, TREES)
def test_equal_views_are_equal_ids(one, other):
    first, second = identity_view(one), identity_view(other)
    assert (canonical_json(first) == canonical_json(second)) == (config_id(first) == config_id(second))
    assert bool(differences(first, first)) is False


def test_differences_tell_booleans_from_numbers():
    assert differences({"a": True, "b": 1, "c": None}, {"a": 1, "b": 1.0}) == {"a": (True, 1)}


def test_flatten_keeps_lists_and_empty_sections():
    assert flatten({"a": {"b": [{"c": 1}], "d": {}}}) == {"a.b": [{"c": 1}], "a.d": {}}


@pytest.mark.parametrize(
    ("value", "unit", "result"),
    [
        (3, "epochs", (3, "epochs")),
        ("5", "steps", (5, "steps")),
        ("500 steps", "epochs", (500, "steps")),
        ("2EPOCHS", "steps", (2, "epochs")),
        ("1 epoch", "steps", (1, "epochs")),
        (0, "steps", (0, "steps")),
        (2.0, "epochs", (2, "epochs")),
        (Interval(1, "steps"), "epochs", (1, "steps")),
    ],
)
def test_interval(value, unit, result):
    interval = Interval.parse(value, unit)
    assert (interval.count, interval.unit) == result
    assert Interval.parse(str(interval), "epochs") == interval


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "", "3 days", "steps", "1.5 epochs", [1]])
def test_interval_refuses(value):
    with pytest.raises(ValueError, match="not an interval"):
        Interval.parse(value, "epochs")
    with pytest.raises(ValueError, match="unit"):
        Interval.parse(1, "days")
