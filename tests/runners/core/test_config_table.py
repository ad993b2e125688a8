"""Every configuration key, row by row: default, part in the identity, values it accepts, values it refuses."""

import copy
import re

import pytest

from danling.runners import ConfigError, RunnerConfig
from danling.runners.aliases import RENAMED, SYNONYMS
from danling.runners.keys import ABSENT, KEYS, TOP_LEVEL

BOOLS = ([("yes", True), ("OFF", False), (1, True), ("0", False), (True, True)], ["maybe", 2, 1.0, None, [True]])
BOOLS_OR_NONE = (BOOLS[0] + [(None, None), ("null", None)], ["maybe", 2, [True]])
TEXT = ([("some", "some")], [3, True, None, ["a"]])
TEXT_OR_NONE = ([("some", "some"), ("none", None), ("", None), (None, None)], [3, True, ["a"], {"a": 1}])
NAMES_OR_NONE = ([(["a", "b"], ["a", "b"]), (("a",), ["a"]), (None, None)], ["a", 3, [1, 2], {"a": 1}])
MAPPING_OR_NONE = ([({"x": {"y": 1}}, {"x": {"y": 1}}), (None, None)], ["text", 3, [1], True])
LEVEL = ([("v1.2-x", "v1.2-x")], ["a/b", "a\\b", "..", "", 3, None])
RELATIVE = ([("some", "some"), ("a/b", "a/b")], ["/etc", "../out", "", 3, None])
INTERVALS = (
    [
        (3, 3),
        (2.0, 2),
        ("500 steps", "500 steps"),
        ("2 Epochs", "2 epochs"),
        ("1 step", "1 steps"),
        (0, 0),
        (None, None),
    ],
    [-1, 1.5, True, "often", "3 days", "-2 steps", [1]],
)


def ints(low, *, optional=False, high=None):
    """Return what a whole-number key with this lower limit accepts and refuses."""
    good = [(low, low), (1e3, 1000), ("7", 7)] if high is None else [(low, low), (high, high)]
    bad = [low - 1, 1.5, "many", True, float("nan"), float("inf"), [1]] + ([] if high is None else [high + 1])
    return (good + [(None, None), ("None", None)], bad) if optional else (good, bad + [None])


def floats(limit, *, optional=False, include=False):
    """Return what a number key above (or from) this limit accepts and refuses."""
    good = [(limit + 1, limit + 1), ("3e-4", 3e-4), (0.5, 0.5)] + ([(limit, limit)] if include else [])
    bad = [limit - 1, "fast", True, [1.0], float("nan")] + ([] if include else [limit])
    return (good + [(None, None)], bad) if optional else (good, bad + [None])


def enum(*choices, optional=False, **synonyms):
    """Return what an enumeration accepts and refuses; case and dashes do not matter."""
    good = [
        (form(choice), choice) for choice in choices for form in (str, str.upper, lambda text: text.replace("_", "-"))
    ]
    good += list(synonyms.items())
    return (good + [(None, None), ("null", None)], ["other", 3, True]) if optional else (good, ["other", 3, True, None])


SPELLINGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


DTYPES = enum("fp32", "fp16", "bf16", "fp64", optional=True)
# name: (default, identifies, (accepted [(given, held)], refused))
TABLE = {
    "stack": ("auto", False, TEXT),
    "name": (None, False, (LEVEL[0] + [(None, None)], ["a/b", "..", 3])),
    "workspace_root": ("experiments", False, ([("/data/runs", "/data/runs")], [3, None, "", True])),
    "lineage": ("lin", False, LEVEL),
    "experiment": ("exp", False, LEVEL),
    "seed": (1016, True, ints(0, optional=True)),
    "deterministic": (False, True, BOOLS),
    "steps": (None, False, ints(1, optional=True)),
    "epochs": (None, False, ints(1, optional=True)),
    "accum_steps": (1, True, ints(1)),
    "precision": (
        None,
        True,
        enum("fp32", "bf16", "fp16", "fp8", "fp8_torchao", "fp8_te", optional=True, **SPELLINGS),
    ),
    "max_grad_value": (None, True, floats(0, optional=True)),
    "max_grad_norm": (None, True, floats(0, optional=True)),
    "skip_nonfinite_grad": (False, True, BOOLS),
    "train_splits": (None, True, NAMES_OR_NONE),
    "evaluate_splits": (None, False, NAMES_OR_NONE),
    "score_split": (None, False, TEXT_OR_NONE),
    "score_name": ("loss", False, TEXT),
    "score_mode": ("auto", False, enum("auto", "min", "max")),
    "patience": (None, False, ints(1, optional=True)),
    "eval_interval": (None, False, INTERVALS),
    "log_interval": (None, False, ints(0, optional=True)),
    "progress": (None, False, BOOLS_OR_NONE),
    "auto_resume": (False, False, BOOLS),
    "resume": (None, False, TEXT_OR_NONE),
    "pretrained": (None, True, TEXT_OR_NONE),
    "checkpoint.dir_name": ("checkpoints", False, RELATIVE),
    "checkpoint.interval": (None, False, INTERVALS),
    "checkpoint.keep_latest_k": (0, False, ints(0)),
    "checkpoint.async_enabled": (True, False, BOOLS),
    "checkpoint.async_mode": (None, False, enum("disabled", "async", "async_with_pinned_mem", optional=True)),
    "checkpoint.dedicated_async_process_group": (True, False, BOOLS),
    "checkpoint.async_process_group_backend": ("gloo", False, enum("gloo", "nccl")),
    "checkpoint.backend": ("auto", False, enum("auto", "file", "dcp")),
    "checkpoint.wait_timeout": (None, False, floats(0, optional=True)),
    "checkpoint.load_only": (False, False, BOOLS),
    "checkpoint.exclude_from_loading": (
        None,
        False,
        ([("ema", "ema"), (["ema", "model.head.*"], ["ema", "model.head.*"]), (None, None)], [3, [1], {"a": 1}]),
    ),
    "checkpoint.last_save_model_only": (False, False, BOOLS),
    "checkpoint.export_dtype": (None, False, DTYPES),
    "checkpoint.enable_ft_dataloader_checkpoints": (False, False, BOOLS),
    "checkpoint.ft_replica_id": (None, False, TEXT_OR_NONE),
    "checkpoint.ft_dataloader_checkpoint_prefix": ("dataloader-replica", False, LEVEL),
    "optim.type": (None, True, TEXT_OR_NONE),
    "optim.lr": (ABSENT, True, ([("3e-4", 3e-4), (1, 1.0), (1e-3, 1e-3)], ["fast", True, None, [1]])),
    "optim.weight_decay": (ABSENT, True, ([(0, 0.0), ("1e-2", 1e-2)], ["much", True, None])),
    "optim.betas": (ABSENT, True, ([((0.9, 0.99), [0.9, 0.99]), ([0.9, 0.99], [0.9, 0.99])], [0.9, "0.9", None])),
    "optim.momentum": (ABSENT, True, ([(0.9, 0.9)], ["much", True, None])),
    "optim.eps": (
        ABSENT,
        True,
        ([("1e-8", 1e-8), ([1e-30, 1e-3], [1e-30, 1e-3]), (None, None)], ["small", True, {"a": 1}]),
    ),
    "optim.param_groups": (
        None,
        True,
        ([([{"pattern": "bias"}], [{"pattern": "bias"}]), (None, None)], ["bias", [1], {"pattern": "bias"}]),
    ),
    "optim.no_decay": (False, True, BOOLS),
    "scheduler.type": (None, True, TEXT_OR_NONE),
    "scheduler.interval": ("auto", True, enum("auto", "step", "epoch")),
    "scheduler.monitor": (None, True, TEXT_OR_NONE),
    "ema.enabled": (False, True, BOOLS),
    "ema.decay": (0.999, True, ([(0.5, 0.5), ("0.99", 0.99)], [0, 1, 1.5, -0.1, "slow", None, True])),
    "ema.interval": (1, True, ints(1)),
    "ema.start_step": (0, True, ints(0)),
    "activation_checkpoint.enabled": (False, False, BOOLS),
    "activation_checkpoint.module_classes": (None, False, NAMES_OR_NONE),
    "activation_checkpoint.checkpoint_impl": ("no_reentrant", False, enum("no_reentrant", "reentrant")),
    "dataloader.batch_size": (1, True, ints(1, optional=True)),
    "dataloader.shuffle": (None, True, BOOLS_OR_NONE),
    "dataloader.drop_last": (None, True, BOOLS_OR_NONE),
    "dataloader.num_workers": (0, False, ints(0)),
    "dataloader.prefetch_factor": (None, False, ints(1, optional=True)),
    "dataloader.persistent_workers": (False, False, BOOLS),
    "dataloader.pin_memory": (None, False, BOOLS_OR_NONE),
    "dataloader.pin_memory_device": ("", False, ([("cuda:0", "cuda:0"), ("", "")], [3, None])),
    "dataloader.timeout": (0.0, False, floats(0, include=True)),
    "dataloader.in_order": (True, False, BOOLS),
    "dataloader.multiprocessing_context": (None, False, enum("fork", "spawn", "forkserver", optional=True)),
    "dataloader.snapshot_every_n_steps": (1, False, ints(1)),
    "dataloader.shard": ("auto", True, enum("auto", "stride", "none")),
    "ddp.find_unused_parameters": (False, False, BOOLS),
    "ddp.static_graph": (False, False, BOOLS),
    "ddp.gradient_as_bucket_view": (True, False, BOOLS),
    "ddp.broadcast_buffers": (True, False, BOOLS),
    "ddp.bucket_cap_mb": (25.0, False, floats(0)),
    "fsdp.enabled": (None, False, BOOLS_OR_NONE),
    "fsdp.reshard_after_forward": (
        None,
        False,
        ([(True, True), ("false", False), (1, 1), (4, 4), (None, None)], [1.5, "some", [1]]),
    ),
    "fsdp.mp_policy": (
        None,
        False,
        ([({"param_dtype": "bf16"}, {"param_dtype": "bf16"}), (None, None)], ["bf16", 3, {"dtype": "bf16"}]),
    ),
    "fsdp.offload_policy": (
        None,
        False,
        ([(True, True), ({"pin_memory": False}, {"pin_memory": False}), (None, None)], [3, "some", [1]]),
    ),
    "fsdp.module_classes": (None, False, NAMES_OR_NONE),
    **{
        f"parallel.axes.{axis}": (1, False, ([(1, 1), (4, 4), (-1, -1), ("2", 2)], [0, -2, 1.5, True, None, "all"]))
        for axis in ("replicate", "shard", "context", "pipeline", "tensor", "expert", "expert_tensor")
    },
    "parallel.pipeline_schedule": ("1F1B", False, TEXT),
    "parallel.pipeline_microbatch_size": (1, False, ints(1)),
    "parallel.pipeline_n_microbatches": (None, False, ints(1, optional=True)),
    "parallel.module_fqns_per_model_part": (
        None,
        False,
        ([([["a"], ["b"]], [["a"], ["b"]]), (None, None)], ["a", 3, {"a": 1}]),
    ),
    "compile.enable": (False, False, BOOLS),
    "compile.backend": (None, False, TEXT_OR_NONE),
    "compile.mode": (None, False, TEXT_OR_NONE),
    "compile.fullgraph": (None, False, BOOLS_OR_NONE),
    "compile.dynamic": (None, False, BOOLS_OR_NONE),
    "compile.options": (None, False, MAPPING_OR_NONE),
    "compile.optimize_ddp": (None, False, TEXT_OR_NONE),
    "compile.precompile_artifact_dir": (None, False, TEXT_OR_NONE),
    "compile.memory_policy": (None, False, enum("default", optional=True)),
    "comm.backend": (None, False, TEXT_OR_NONE),
    "comm.init_timeout_seconds": (None, False, ints(1, optional=True)),
    "comm.train_timeout_seconds": (None, False, ints(1, optional=True)),
    "gc.interval": (None, False, ints(1, optional=True)),
    "gc.generation": (1, False, ints(0, high=2)),
    "gc.disable_automatic": (True, False, BOOLS),
    "log": (True, False, BOOLS),
    "tensorboard": (False, False, BOOLS),
    "wandb.enabled": (False, False, BOOLS),
    **{
        f"wandb.{name}": (None, False, TEXT_OR_NONE)
        for name in ("project", "entity", "group", "name", "job_type", "dir")
    },
    "wandb.tags": (None, False, NAMES_OR_NONE),
    "wandb.mode": (None, False, enum("online", "offline", "disabled", optional=True)),
    "ft.enabled": (False, False, BOOLS),
    "ft.process_group": ("gloo", False, enum("gloo", "nccl")),
    "ft.process_group_timeout_ms": (10000, False, ints(1)),
    "ft.replica_id": (0, False, ([(0, 0)], [-1, 1.5, "first", True, None])),
    "ft.group_size": (1, False, ints(1)),
    "ft.min_replica_size": (1, False, ([(1, 1)], [0, 1.5, "all", True, None])),
    "profiling.enabled": (False, False, BOOLS),
    "profiling.wait": (1, False, ints(0)),
    "profiling.warmup": (1, False, ints(0)),
    "profiling.active": (3, False, ints(1)),
    "profiling.repeat": (1, False, ints(1, optional=True)),
    **{
        f"profiling.{name}": (False, False, BOOLS)
        for name in ("record_shapes", "profile_memory", "with_stack", "with_flops")
    },
    "profiling.trace_dir": ("profiles", False, RELATIVE),
    "heartbeat.enabled": (False, False, BOOLS),
    "heartbeat.interval_seconds": (60.0, False, floats(0)),
    "heartbeat.dir_name": ("heartbeats", False, RELATIVE),
    **{
        f"performance.{name}": (None, False, floats(0, optional=True))
        for name in ("model_flops_per_sample", "model_flops_per_token", "peak_flops")
    },
    "deepspeed": (None, False, MAPPING_OR_NONE),
    "accelerate": (None, False, MAPPING_OR_NONE),
}
# what a value needs beside it so that only the row under test decides
COMPANIONS = {
    "dataloader.prefetch_factor": {"dataloader.num_workers": 2},
    "dataloader.persistent_workers": {"dataloader.num_workers": 2},
    "fsdp.enabled": {"parallel.axes.shard": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore:dataloader.in_order:UserWarning")


def build(name, value):
    return RunnerConfig({**COMPANIONS.get(name, {}), name: copy.deepcopy(value)})


def plain(value):
    return value.dict() if hasattr(value, "dict") else value


def test_the_table_is_complete():
    assert set(TABLE) == set(KEYS)


def test_no_key_hides_a_method():
    """chanfig serves methods before keys: `config.copy` could never be a key."""
    from chanfig.flat_dict import method_names

    assert not (TOP_LEVEL | set(RENAMED) | set(SYNONYMS)) & method_names(RunnerConfig)


@pytest.mark.parametrize("name", TABLE)
def test_default(name):
    default, _, _ = TABLE[name]
    config = RunnerConfig().boot()
    if default is ABSENT:
        assert name not in config
    else:
        assert config[name] == default and type(config[name]) is type(default)


@pytest.mark.parametrize("name", TABLE)
def test_accepted(name):
    for given, held in TABLE[name][2][0]:
        config = build(name, given)
        config.validate()
        value = plain(config[name])
        assert value == held and isinstance(value, bool) == isinstance(held, bool), (given, value)


@pytest.mark.parametrize("name", TABLE)
def test_refused(name):
    for given in TABLE[name][2][1]:
        with pytest.raises(ConfigError) as caught:
            build(name, given).validate()
        message = str(caught.value)
        assert name in message, (given, message)
        assert re.search(r"is not allowed; give ", message), (given, message)


@pytest.mark.parametrize("name", TABLE)
def test_unknown_neighbour(name):
    """A key with one letter too many is refused, and the message names this key or one just as near."""
    head, dot, leaf = name.rpartition(".")
    wrong = f"{head}{dot}{leaf}x"
    if head in ("optim", "scheduler"):  # arguments of a class that is known when the runner is built
        RunnerConfig({wrong: 1}).validate()
        return
    with pytest.raises(ConfigError, match=f"{re.escape(wrong)}: unknown key .*did you mean '{re.escape(name)}'"):
        RunnerConfig({wrong: 1}).validate()


@pytest.mark.parametrize("name", TABLE)
def test_identity(name):
    """A key is in the identity view exactly when its row says so and its value is not danling's default."""
    default, identifies, (good, _) = TABLE[name]
    for given, held in good:
        config = build(name, given)
        view = config.identity()
        at_default = held == default or name == "precision" and held == "fp32"
        found = any(key == name or key.startswith(f"{name}.") for key in view)
        assert found == (identifies and not at_default), (given, view)
    if default is not ABSENT:
        assert name not in RunnerConfig().identity()


def test_rows_of_describe():
    rows = {row.name: row for row in RunnerConfig().describe()}
    assert list(rows) == list(KEYS)
    for name, (default, identifies, _) in TABLE.items():
        assert rows[name].default == default or rows[name].default is default
        assert rows[name].identity is identifies
        assert rows[name].meaning and rows[name].allowed
