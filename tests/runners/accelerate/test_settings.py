"""What danling's keys and Accelerate's arguments mean together, and every way in which they can contradict."""

from __future__ import annotations

import os

import pytest
from accelerate import utils

from danling.backends.accelerate.settings import launch_environment, read_settings
from danling.runners import ConfigError, RunnerConfig


def settings(accelerate=None, environ=None, **config):
    options = {name.replace("__", "."): value for name, value in config.items()}
    return read_settings(RunnerConfig({"stack": "accelerate", "accelerate": accelerate, **options}), environ or {})


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("where", ["nowhere", "argument", "environment", "both"])
def test_precision(precision, where):
    said = {None: "no", "fp32": "no"}.get(precision, precision)
    found = settings(
        {"mixed_precision": said} if where in ("argument", "both") else None,
        {"ACCELERATE_MIXED_PRECISION": said} if where in ("environment", "both") else None,
        precision=precision,
    )
    assert found.arguments["mixed_precision"] == {"fp8": "bf16"}.get(said, said)
    assert (found.precision or "fp32") == (precision or "fp32")


def test_precision_said_to_accelerate_alone():
    assert settings({"mixed_precision": "bf16"}).precision == "bf16"
    assert settings(None, {"ACCELERATE_MIXED_PRECISION": "fp16"}).precision == "fp16"
    both = settings({"mixed_precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "no"})
    assert both.precision == both.arguments["mixed_precision"] == "bf16"  # an argument goes before the environment


def test_arguments_are_built_and_passed_on():
    found = settings(
        {
            "step_scheduler_with_optimizer": False,
            "dataloader_config": {"split_batches": True},
            "project_config": {"total_limit": 3},
            "kwargs_handlers": {"AutocastKwargs": {"cache_enabled": False}},
            "gradient_accumulation_steps": 4,
            "parallelism_config": {"tp_size": 1},
        },
        accum_steps=4,
        ddp__find_unused_parameters=True,
    ).arguments
    assert found["step_scheduler_with_optimizer"] is False
    assert found["dataloader_config"] == utils.DataLoaderConfiguration(split_batches=True)
    assert found["project_config"].total_limit == 3
    assert found["gradient_accumulation_plugin"].num_steps == 1 and "gradient_accumulation_steps" not in found
    ddp, autocast = found["kwargs_handlers"]
    assert ddp.find_unused_parameters and ddp.gradient_as_bucket_view and isinstance(autocast, utils.AutocastKwargs)
    assert autocast.cache_enabled is False


def test_handlers_may_be_a_list():
    (_, scaler) = settings({"kwargs_handlers": [{"GradScalerKwargs": {"init_scale": 4.0}}]}).arguments[
        "kwargs_handlers"
    ]
    assert scaler == utils.GradScalerKwargs(init_scale=4.0)


@pytest.mark.parametrize(
    ("accelerate", "environ", "config", "words"),
    [
        ({"mixed_precison": "bf16"}, {}, {}, ["accelerate.mixed_precison", "mixed_precision"]),
        ({"dataloader_config": {"split_batch": 1}}, {}, {}, ["dataloader_config.split_batch", "split_batches"]),
        ({"dataloader_config": 3}, {}, {}, ["accelerate.dataloader_config", "DataLoaderConfiguration"]),
        ({"dynamo_plugin": {"backend": "no-such"}}, {}, {}, ["accelerate.dynamo_plugin"]),
        ({"kwargs_handlers": {"AutocastKwarg": {}}}, {}, {}, ["AutocastKwarg", "AutocastKwargs"]),
        ({"kwargs_handlers": {"AutocastKwargs": {"enable": 1}}}, {}, {}, ["AutocastKwargs.enable", "'enabled'"]),
        ({"kwargs_handlers": ["AutocastKwargs"]}, {}, {}, ["kwargs_handlers", "mapping"]),
        ({"mixed_precision": "bf16"}, {}, {"precision": "fp32"}, ["mixed_precision", "'bf16'", "'fp32'"]),
        ({"mixed_precision": "bf61"}, {}, {}, ["mixed_precision", "bf61"]),
        (None, {"ACCELERATE_MIXED_PRECISION": "no"}, {"precision": "bf16"}, ["ACCELERATE_MIXED_PRECISION", "'no'"]),
        ({"gradient_accumulation_steps": 2}, {}, {"accum_steps": 3}, ["gradient_accumulation_steps: 2", "3"]),
        (None, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ["GRADIENT_ACCUMULATION_STEPS: 4", "accum_steps"]),
        ({"gradient_accumulation_plugin": {"num_steps": 2}}, {}, {}, ["gradient_accumulation_plugin", "accum_steps"]),
        ({"dynamo_backend": "inductor"}, {}, {"compile__enable": True}, ["dynamo_backend", "compile.enable"]),
        ({"dynamo_plugin": {"backend": "eager"}}, {}, {"compile__enable": True}, ["dynamo_plugin", "compile.enable"]),
        (None, {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, {"compile__enable": True}, ["EAGER", "compile.enable"]),
        (
            {"kwargs_handlers": {"DistributedDataParallelKwargs": {}}},
            {},
            {},
            ["DistributedDataParallelKwargs", "`ddp`"],
        ),
        ({"kwargs_handlers": {"InitProcessGroupKwargs": {}}}, {}, {}, ["InitProcessGroupKwargs", "comm.backend"]),
        ({"kwargs_handlers": {"ProfileKwargs": {}}}, {}, {}, ["ProfileKwargs", "profiling"]),
        ({"log_with": "wandb"}, {}, {}, ["log_with", "wandb.enabled", "tensorboard"]),
        ({"deepspeed_plugin": {"zero_stage": 2}}, {}, {}, ["deepspeed_plugin", "--stack deepspeed"]),
        ({"deepspeed_plugins": {"a": {}}}, {}, {}, ["deepspeed_plugins", "--stack deepspeed"]),
        ({"megatron_lm_plugin": {"tp_degree": 2}}, {}, {}, ["megatron_lm_plugin", "--stack parallel"]),
        ({"fsdp_plugin": {"fsdp_version": 1}}, {}, {}, ["fsdp_plugin", "fsdp_version is 1", "set it to 2"]),
        ({"fsdp_plugin": {"fsdp_versoin": 2}}, {}, {}, ["fsdp_plugin.fsdp_versoin", "'fsdp_version'"]),
        ({"fsdp_plugin": True}, {}, {}, ["fsdp_plugin", "a mapping", "True"]),
        (
            {"fsdp_plugin": {"activation_checkpointing": True}},
            {},
            {},
            ["fsdp_plugin", "activation_checkpoint.enabled"],
        ),
        ({"parallelism_config": {"tp_size": 2}}, {}, {}, ["parallelism_config", "--stack parallel"]),
        (None, {"ACCELERATE_USE_DEEPSPEED": "true"}, {}, ["ACCELERATE_USE_DEEPSPEED", "--stack deepspeed"]),
        (None, {"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, ["ACCELERATE_USE_MEGATRON_LM", "--stack parallel"]),
        (None, {"ACCELERATE_USE_FSDP": "true"}, {}, ["ACCELERATE_USE_FSDP", "fsdp_version is 1"]),
    ],
)
def test_contradictions(accelerate, environ, config, words):
    with pytest.raises(ConfigError) as caught:
        settings(accelerate, environ, **config)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_fsdp_plugin():
    before = dict(os.environ)
    found = settings({"fsdp_plugin": {"cpu_ram_efficient_loading": False, "reshard_after_forward": False}})
    assert isinstance(found.fsdp, utils.FullyShardedDataParallelPlugin) and found.arguments["fsdp_plugin"] is found.fsdp
    assert found.fsdp.fsdp_version == 2 and found.fsdp.reshard_after_forward is False
    launched = settings(None, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert launched.fsdp.fsdp_version == 2
    assert settings({}).fsdp is None and dict(os.environ) == before


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        settings({"log_with": "all", "cpuu": True, "gradient_accumulation_steps": 7})
    assert len(str(caught.value).splitlines()) == 3 and "did you mean 'cpu'?" in str(caught.value)


def test_one_process_does_not_look_like_a_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with launch_environment(1):
        assert "LOCAL_RANK" not in os.environ and "OMP_NUM_THREADS" in os.environ
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["HOME"] = "/elsewhere"
    assert dict(os.environ) == before
