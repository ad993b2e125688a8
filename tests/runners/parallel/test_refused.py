"""What a layout cannot honour is refused by name; what drifts apart is found; weights go to every other layout."""

from __future__ import annotations

import pytest

from .layouts import Language, config_of
from .test_layouts import ADAMW, SGD, close, layout, start


def test_needs_several_processes(tmp_path):
    with pytest.raises(RuntimeError, match="torchrun.*torch stack"):
        Language(config_of(tmp_path, {"stack": "parallel"}))
    assert not list(tmp_path.iterdir())


TWO = layout(SGD, 2)
REFUSED = {
    "product": ({**TWO, "parallel__axes__shard": 3}, "ConfigError", ["3", "world size is 2"]),
    "does not divide": (
        {**TWO, "parallel__axes__shard": -1, "parallel__axes__tensor": 3},
        "ConfigError",
        ["shard", "3"],
    ),
    "file backend": (
        {**TWO, "parallel__axes__shard": 2, "checkpoint__backend": "file"},
        "ConfigError",
        ["checkpoint.backend", "dcp"],
    ),
    "without fsdp": (
        {**TWO, "parallel__axes__shard": 2, "fsdp__enabled": False},
        "ConfigError",
        ["fsdp.enabled", "parallel.axes.shard: 2"],
    ),
    "expert": ({**TWO, "parallel__axes__expert": 2}, "NoPlanError", ["parallel.axes.expert: 2", "parallelize(ctx)"]),
    "unknown class": (
        {**TWO, "parallel__axes__shard": 2, "fsdp__module_classes": ["Foo"]},
        "ConfigError",
        ["fsdp.module_classes", "Foo", "TransformerEncoderLayer"],
    ),
    "unknown policy": (
        {**TWO, "parallel__axes__shard": 2, "fsdp__mp_policy": {"param_type": "bf16"}},
        "ConfigError",
        ["fsdp.mp_policy", "param_type", "param_dtype"],
    ),
    "unknown dtype": (
        {**TWO, "parallel__axes__shard": 2, "fsdp__mp_policy": {"param_dtype": "fp7"}},
        "ConfigError",
        ["fsdp.mp_policy.param_dtype", "fp7", "bf16"],
    ),
    "unknown offload": (
        {**TWO, "parallel__axes__shard": 2, "fsdp__offload_policy": {"pin": True}},
        "ConfigError",
        ["fsdp.offload_policy", "pin_memory"],
    ),
    "drift": (
        {**TWO, "parallel__axes__replicate": 2, "language": {"drift": 0}},
        "RuntimeError",
        ["head.bias", "ranks [0, 1]", "axis replicate", "after the first update"],
    ),
}


def test_refused_on_two_ranks(tmp_path):
    scenarios = {name: [{**case, "fails": error}] for name, (case, error, _) in REFUSED.items()}
    for found in start(tmp_path, 2, scenarios):
        for name, (_, error, words) in REFUSED.items():
            assert error == found[name]["error"], (name, found[name])
            assert all(word in found[name]["text"] for word in words), (name, found[name])
        assert {"ConfigError", "NotImplementedError", "ValueError"} <= set(found["expert"]["bases"])


@pytest.mark.slow
def test_checkpoints_and_other_layouts(tmp_path):
    """Full resumes need the degrees that split tensors; weights and seed checkpoints go everywhere, also over stacks."""
    case = {**ADAMW, "dataloader__batch_size": 6, "steps": 4, "eval_interval": 2, "checkpoint__interval": 2}
    case |= {"ema__enabled": True, "stack": "parallel"}
    shard, tensor = {**case, "parallel__axes__shard": 2}, {**case, "parallel__axes__tensor": 2}
    (one,) = start(tmp_path, 1, {"one": [{**case, "stack": "torch", "draws": 3}]})
    scenarios = {
        "shard": [{**shard, "seeded": True, "export": True}],
        "tensor": [{**tensor, "seeded": True, "draws": 3}],
        "shard from tensor": [{**shard, "resume": "@tensor/step-4", "fails": "ResumeError"}],
        "tensor from shard": [{**tensor, "resume": "@shard/step-4", "fails": "ResumeError"}],
        "shard from one": [{**shard, "resume": "@one/step-4", "fails": "ResumeError"}],
        "seed": [{**tensor, "resume": "@shard/seed", "draws": 5}, {**shard, "resume": "@shard/seed", "draws": 7}],
        "other seed": [
            {**shard, "resume": "@tensor/seed", "draws": 8},
            {**tensor, "resume": "@tensor/seed", "draws": 9},
        ],
        "weights of shard": [{**tensor, "pretrained": "@shard/step-4", "steps": 1}],
        "weights of tensor": [{**shard, "pretrained": "@tensor/step-4", "steps": 1, "draws": 11}],
        "weights of one": [{**shard, "pretrained": "@one/step-4", "steps": 1, "draws": 12}],
    }
    found = start(tmp_path, 2, scenarios)[0]
    for name in ("shard from tensor", "tensor from shard"):
        text = found[name]["text"]
        assert all(word in text for word in ("tensor=2", "shard=2", "pretrained")), text
    assert all(word in found["shard from one"]["text"] for word in ("'torch'", "'parallel'", "pretrained"))
    for name in ("weights", "average", "results"):
        close(found["tensor"][name], one["one"][name], name)
        close(found["seed"][name], found["shard"][name], ("seed", name))  # through tensor ranks and back
        close(found["other seed"][name], one["one"][name], ("other seed", name))
    after = [found[f"weights of {name}"] for name in ("tensor", "one")]
    close(after[0]["weights"], after[1]["weights"], "pretrained")
    back = {
        "back": [{**case, "stack": "torch", "pretrained": "@shard/step-4", "steps": 1}],
        "refused": [{**case, "stack": "torch", "resume": "@shard/step-4", "fails": "ResumeError"}],
    }
    (plain,) = start(tmp_path, 1, back)
    close(plain["back"]["weights"], found["weights of shard"]["weights"], "back")
    assert "'parallel'" in plain["refused"]["text"]
    from danling.backends.torch.export import read_safetensors
    from danling.runners.cli.main import main

    (checkpoint,) = (tmp_path / "shard").glob("lin/exp/*/checkpoints/step-4")
    assert main(["verify", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "file.safetensors")]) == 0
    offline, online = (
        read_safetensors(tmp_path / "file.safetensors"),
        read_safetensors(tmp_path / "shard" / "model.safetensors"),
    )
    assert offline.keys() == online.keys() == found["shard"]["average"].keys()
    for name, value in found["shard"]["average"].items():
        assert offline[name].tolist() == online[name].tolist() == value
