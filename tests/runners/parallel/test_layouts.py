"""Replicated and sharded runs against one process on the concatenated batch, update by update, in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

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


def start(folder, nproc, scenarios, timeout=180):
    """Run scenarios on ranks; what each rank found, by scenario."""
    folder.mkdir(exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    tests = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
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


def test_four_ranks(tmp_path, one):
    names = ["sgd, accumulated, clipped", "adamw, clipped"]
    scenarios = {f"2 × 2: {name}": [layout(CASES[name], 4, replicate=2, shard=2)] for name in names}
    scenarios["shard: adamw, accumulated"] = [layout(CASES["adamw, accumulated"], 4, shard=4)]
    ranks = start(tmp_path, 4, scenarios)
    for name in scenarios:
        compare([rank[name] for rank in ranks], one[name.split(": ")[1]], name)
