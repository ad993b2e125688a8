"""What danling's keys and DeepSpeed's mean together, and every way in which they can contradict."""

from __future__ import annotations

import copy

import pytest

from danling.backends.deepspeed.engine import check_mapping
from danling.backends.deepspeed.settings import read_settings
from danling.runners import ConfigError, RunnerConfig


def settings(deepspeed=None, world_size=1, device="cpu", **config):
    options = {name.replace("__", "."): value for name, value in config.items()}
    config = RunnerConfig({"stack": "deepspeed", "deepspeed": deepspeed or {}, **options})
    return read_settings(config, world_size=world_size, device=device)


def engine(*args, **config):
    return settings(*args, **config).engine


def test_without_a_section():
    assert engine(dataloader__batch_size=4) == {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_nothing_is_changed():
    config = RunnerConfig({"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": "auto"}}})
    before = copy.deepcopy(config)
    first, second = read_settings(config), read_settings(config)
    assert config == before and first == second
    first.engine["zero_optimization"]["stage"] = 3
    assert read_settings(config) == second


@pytest.mark.parametrize("given", [None, 1, 3, "auto"])
def test_accumulation(given):
    found = engine({} if given is None else {"gradient_accumulation_steps": given}, accum_steps=3)
    assert found["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("size", [None, 1, 4])
def test_batch_size(size):
    given = {"train_micro_batch_size_per_gpu": size or 1, "train_batch_size": (size or 1) * 2 * 3}
    found = engine(given, world_size=2, accum_steps=3, dataloader__batch_size=size)
    assert found["train_micro_batch_size_per_gpu"] == (size or 1) and "train_batch_size" not in found
    assert engine({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"})["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("given", "norm", "found"), [(2.0, None, 2.0), (None, 0.5, 0.5), ("auto", 0.5, 0.5), (1, 1.0, 1)]
)
def test_clipping(given, norm, found):
    assert engine({"gradient_clipping": given} if given else None, max_grad_norm=norm)["gradient_clipping"] == found


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("where", ["danling", "engine", "both", "auto"])
def test_precision(precision, where):
    section = {"fp8": "bf16", "bf16": "bf16", "fp16": "fp16"}.get(precision)
    given = {section: {"enabled": where != "auto" or "auto"}} if section and where != "danling" else None
    found = settings(given, device="cuda", precision=None if where == "engine" else precision)
    assert [name for name in ("bf16", "fp16") if name in found.engine] == ([section] if section else [])
    assert section is None or found.engine[section] == {"enabled": True}
    assert found.precision == (section if where == "engine" else precision)


def test_precision_keeps_its_options():
    assert engine({"bfloat16": {"check_grad_overflow": False}}, precision="bf16")["bf16"] == {
        "check_grad_overflow": False,
        "enabled": True,
    }
    found = engine({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}})
    assert found["bf16"] == found["fp16"] == {"enabled": False}


def test_the_engine_may_make_optimizer_and_scheduler():
    given = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-7}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}},
    }
    found = settings(given, steps=100, optim__lr=3e-4)
    assert found.makes_optimizer and found.engine["optimizer"]["params"] == {"lr": 3e-4, "eps": 1e-7}
    assert found.engine["scheduler"]["params"] == {"total_num_steps": 100, "warmup_max_lr": 3e-4}
    assert "zero_allow_untested_optimizer" not in found.engine


def test_everything_else_is_passed_through():
    given = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "zero_force_ds_cpu_optimizer": True,
        "comms_logger": {"enabled": False},
    }
    found = settings(given)
    assert found.stage == 3 and found.engine["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
    }
    assert {key: found.engine[key] for key in list(given)[1:]} == {key: given[key] for key in list(given)[1:]}


WRONG = [
    ({"gradient_accumulation_steps": 2}, {"accum_steps": 3}, ["gradient_accumulation_steps: 2", "accum_steps: 3"]),
    ({"train_micro_batch_size_per_gpu": 8}, {"dataloader__batch_size": 4}, ["per_gpu: 8", "dataloader.batch_size: 4"]),
    ({"train_micro_batch_size_per_gpu": 8}, {"dataloader__batch_size": None}, ["per_gpu: 8", "batch_size: 1"]),
    (
        {"train_batch_size": 64},
        {"dataloader__batch_size": 4, "accum_steps": 3},
        ["train_batch_size: 64", "4 × 2 × 3 = 24"],
    ),
    ({"gradient_clipping": 1.0}, {"max_grad_norm": 0.5}, ["gradient_clipping: 1.0", "max_grad_norm: 0.5"]),
    ({}, {"max_grad_value": 0.5}, ["max_grad_value", "max_grad_norm"]),
    ({"bf16": {"enabled": True}}, {"precision": "fp32"}, ["bf16.enabled: True", "'fp32'"]),
    ({"bf16": {"enabled": False}}, {"precision": "bf16"}, ["bf16.enabled: False", "'bf16'"]),
    ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ["fp16.enabled: True", "'bf16'"]),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, ["exclude each other"]),
    ({}, {"precision": "fp16"}, ["fp16", "accelerator", "bf16"]),
    ({"fp16": {"enabled": True}}, {}, ["fp16", "accelerator"]),
    (
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        {"skip_nonfinite_grad": True},
        ["check_grad_overflow", "skip_nonfinite_grad"],
    ),
    ({"optimizer": {"type": "AdamW"}}, {"optim__type": "adamw"}, ["deepspeed.optimizer", "optim.type: 'adamw'"]),
    (
        {"scheduler": {"type": "WarmupLR"}},
        {"optim__type": "adamw", "scheduler__type": "cosine"},
        ["deepspeed.scheduler", "scheduler.type: 'cosine'"],
    ),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, {}, ["warmup_num_steps", "auto"]),
    ({"zero_optimization": {"stage": 4}}, {}, ["zero_optimization.stage: 4", "0, 1, 2, 3"]),
    ({"zero_optimization": {"stage": 3}}, {"ema__enabled": True}, ["ema.enabled", "ZeRO 3"]),
    ({}, {"checkpoint__backend": "dcp"}, ["checkpoint.backend", "dcp"]),
    ({}, {"checkpoint__async_mode": "async"}, ["checkpoint.async_mode", "synchronous"]),
    ({"pipeline": {"stages": 2}}, {}, ["pipeline.stages: 2", "--stack parallel"]),
    ({"tensor_parallel": {"autotp_size": 2}}, {}, ["tensor_parallel.autotp_size: 2", "--stack parallel"]),
    ({"sequence_parallel_size": 4}, {}, ["sequence_parallel_size: 4", "--stack parallel"]),
    ({"managed_gradient_accumulation": False}, {}, ["managed_gradient_accumulation", "accum_steps"]),
    ({"gradient_allreduce_op": "SUM"}, {}, ["gradient_allreduce_op", "averaged"]),
    ({"curriculum_learning": {"enabled": True}}, {}, ["curriculum_learning.enabled", "danling's"]),
    ({"checkpoint": {"load_universal": True}}, {}, ["checkpoint.load_universal", "pretrained"]),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, {}, ["checkpoint.writer", "committed"]),
]


@pytest.mark.parametrize(("deepspeed", "config", "words"), WRONG)
def test_contradictions(deepspeed, config, words):
    with pytest.raises(ConfigError) as caught:
        settings(deepspeed, world_size=2, **config)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        settings({"gradient_accumulation_steps": 7, "gradient_clipping": 2}, max_grad_norm=1, max_grad_value=1)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"zero_optimization": {"stage": 1, "no_such_option": 3}}, ["deepspeed.zero_optimization", "no_such_option"]),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}, ["deepspeed.zero_optimization", "bucket"]),
        ({"checkpoint": {"tag_validation": "sometimes"}}, ["deepspeed.checkpoint", "SOMETIMES"]),
        ({"flops_profiler": {"enabled": [1]}}, ["deepspeed.flops_profiler"]),
    ],
)
def test_errors_of_the_engine_name_the_key(deepspeed, words):
    with pytest.raises(ConfigError) as caught:
        check_mapping(engine(deepspeed))
    assert all(word in str(caught.value) for word in words), str(caught.value)
