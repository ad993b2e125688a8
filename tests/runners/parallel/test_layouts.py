"""Replicated and sharded runs against one process on the concatenated batch, update by update, in float64."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from danling.backends.torch.payload import read_weights
from support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("layouts.py")
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9}
ADAMW = {"optim__type": "adamw", "optim__lr": 1e-2, "optim__weight_decay": 0.1}
CASES = {
    "sgd": SGD,
    "sgd, accumulated, clipped": {**SGD, "accum_steps": 3, "max_grad_norm": 0.05, "dataloader__batch_size": 4},
    "adamw, clipped": {**ADAMW, "max_grad_norm": 0.05, "ema__enabled": True, "ema__decay": 0.9},
    "adamw, accumulated": {**ADAMW, "accum_steps": 3, "scheduler__type": "cosine", "dataloader__batch_size": 4},
}


def start(folder, nproc, scenarios, crash=None, timeout=300):
    """Run scenarios on ranks; what each rank found, by scenario; exit codes when a rank is to crash."""
    folder.mkdir(exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    tests = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    if crash is not None:
        env["DANLING_CRASH_AT"] = crash
        ended = run_ranks(SCRIPT, nproc, [str(folder / "scenarios.json")], env=env, timeout=timeout, check=False)
        return [result.returncode for result in ended]
    run_ranks(SCRIPT, nproc, [str(folder / "scenarios.json")], env=env, timeout=timeout)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]


def flat(value):
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


def close(found, expected, what, rel=1e-9):
    assert flat(found) == pytest.approx(flat(expected), rel=rel, abs=1e-10), (
        what
    )  # the gradient of key biases is zero but for rounding


def compare(ranks, one, what):
    """Every rank agrees with one process, and the ranks with each other."""
    first = ranks[0]
    for key in ("weights", "average", "results", "norms", "evaluated"):
        close(first[key], one[key], (what, key))
    close(first["entries"], one["entries"], (what, "entries"), rel=1e-6)  # on the host in float32
    assert len(first["entries"]) == 19
    for found in ranks:
        for key in ("results", "norms", "evaluated", "entries", "best", "state", "rate"):
            assert found[key] == first[key], (what, key)
        for key in ("global_step", "micro_step", "epoch", "samples", "skipped"):
            assert found["state"][key] == one["state"][key], (what, key)
    assert first["notes"] == "of rank 0"


def layout(case, data_ranks, **axes):
    size = case.get("dataloader__batch_size", 12)
    return {
        **case,
        "stack": "parallel",
        "dataloader__batch_size": size // data_ranks,
        **{f"parallel__axes__{axis}": degree for axis, degree in axes.items()},
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    scenarios = {name: [{"stack": "torch", **case}] for name, case in CASES.items()}
    return start(tmp_path_factory.mktemp("one"), 1, scenarios)[0]


def test_two_ranks(tmp_path, one):
    scenarios = {}
    for name, case in CASES.items():
        scenarios[f"replicate: {name}"] = [layout(case, 2, replicate=2)]
        scenarios[f"shard: {name}"] = [layout(case, 2, shard=-1)]
    ranks = start(tmp_path, 2, scenarios)
    for name in scenarios:
        kind, case = name.split(": ")
        found = [rank[name] for rank in ranks]
        compare(found, one[case], name)
        assert found[0]["model"] == ("FSDPModel" if kind == "shard" else "DistributedDataParallel")
        assert found[0]["own"] + found[1]["own"] == 19
        assert found[0]["wrappers"] == (3 if kind == "shard" else 0)


@pytest.mark.slow
def test_four_ranks(tmp_path, one):
    names = ["sgd, accumulated, clipped", "adamw, clipped"]
    scenarios = {f"2 × 2: {name}": [layout(CASES[name], 4, replicate=2, shard=2)] for name in names}
    scenarios["shard: adamw, accumulated"] = [layout(CASES["adamw, accumulated"], 4, shard=4)]
    ranks = start(tmp_path, 4, scenarios)
    for name in scenarios:
        compare([rank[name] for rank in ranks], one[name.split(": ")[1]], name)


SHARD = layout(SGD, 2, shard=2)
OPTIONS = {
    "replicas of one shard": {**layout(SGD, 2, replicate=2), "fsdp__enabled": True},
    "kept gathered": {**SHARD, "fsdp__reshard_after_forward": False},
    "other units": {**SHARD, "fsdp__module_classes": ["TransformerEncoderLayer", "torch.nn.modules.sparse.Embedding"]},
    "optimizer of the user": {**SHARD, "optim__type": None, "language": {"bound": True}},
    "optimizer of the user, replicated": {
        **layout(SGD, 2, replicate=2),
        "optim__type": None,
        "language": {"bound": True},
    },
    "recomputed": {**SHARD, "activation_checkpoint__enabled": True},
    "gradients as asked": {**SHARD, "fsdp__mp_policy": {"reduce_dtype": "fp64", "cast_forward_inputs": False}},
}
LOOSE = {
    "bf16": {**SHARD, "precision": "bf16", "language": {"dtype": "float32"}},
    "bf16 weights": {**SHARD, "fsdp__mp_policy": {"param_dtype": "bf16"}, "language": {"dtype": "float32"}},
}
ODD = {
    "meta": {**SHARD, "language": {"meta": True}, "ema__enabled": True},
    "skipped": {**SHARD, "skip_nonfinite_grad": True, "max_grad_norm": 1.0, "language": {"poisoned": 3}},
    "skipped, replicated": {
        **layout(SGD, 2, replicate=2),
        "skip_nonfinite_grad": True,
        "accum_steps": 2,
        "language": {"poisoned": 3},
    },
    "weights alone": {**SHARD, "checkpoint__last_save_model_only": True, "checkpoint__export_dtype": "fp32"},
}


@pytest.mark.slow
def test_options(tmp_path, one):
    ranks = start(tmp_path, 2, {name: [case] for name, case in {**OPTIONS, **LOOSE, **ODD}.items()})
    reference = one["sgd"]
    for name in OPTIONS:
        compare([rank[name] for rank in ranks], reference, name)
    assert ranks[0]["replicas of one shard"]["model"] == "FSDPModel"
    for name in LOOSE:
        close(ranks[0][name]["evaluated"], reference["evaluated"], name, rel=2e-2)
    for name in ODD:
        assert ranks[0][name]["results"] == ranks[1][name]["results"], name
        assert all(map(math.isfinite, flat(ranks[0][name]["weights"]))), name
    assert [rank["skipped"]["state"]["skipped"] for rank in ranks] == [1, 1]
    assert [rank["skipped, replicated"]["state"]["skipped"] for rank in ranks] == [1, 1]
    first, last = (ranks[0]["meta"]["results"][step]["val"]["loss"] for step in ("10", "20"))
    assert last < first < 3
    (final,) = (tmp_path / "weights alone").glob("lin/exp/*/checkpoints/final")
    assert read_weights(final)["head.weight"].dtype is torch.float32
