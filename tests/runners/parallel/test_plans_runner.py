"""Runs over the tensor, context and expert axes: equal to one process, killed and resumed, loaded elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("plans_runs.py")
EXPERTS = {"model": "experts"}
ADAMW = {
    "optim__type": "adamw",
    "optim__lr": 1e-2,
    "optim__weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "ema__enabled": True,
}
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9, "accum_steps": 3, "max_grad_norm": 0.05}


def start(folder: Path, nproc: int, scenarios: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run scenarios on ranks; what each rank found, by scenario."""
    folder.mkdir(exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    tests = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    run_ranks(SCRIPT, nproc, [str(folder / "scenarios.json")], env=env, timeout=200)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]


def over(case: dict[str, Any], batch: int = 12, **axes: int) -> dict[str, Any]:
    data_ranks = axes.get("replicate", 1) * axes.get("shard", 1)
    degrees = {f"parallel__axes__{axis}": degree for axis, degree in axes.items()}
    return {**case, "stack": "parallel", "dataloader__batch_size": batch // data_ranks, **degrees}


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    return [x for item in value for x in flat(item)] if isinstance(value, list) else [value]


def compare(ranks: list[dict[str, Any]], one: dict[str, Any], what: str) -> None:
    """The main rank agrees with one process, and the others with it."""
    for key in ("weights", "average", "norms", "results", "evaluated"):
        assert flat(ranks[0][key]) == pytest.approx(flat(one[key]), rel=1e-9, abs=1e-11), (what, key)
    assert flat(ranks[0]["entries"]) == pytest.approx(flat(one["entries"]), rel=1e-6), what  # on the host in float32
    for found in ranks:
        for key in ("norms", "results", "evaluated", "entries", "state", "best"):
            assert found[key] == ranks[0][key], (what, key)


def one_process(folder: Path, **cases: dict[str, Any]) -> dict[str, Any]:
    return start(folder, 1, {name: [{"stack": "torch", **case}] for name, case in cases.items()})[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return one_process(
        tmp_path_factory.mktemp("one"),
        adamw={**ADAMW, "dataloader__batch_size": 12},
        sgd={**SGD, "dataloader__batch_size": 4},
        experts={**ADAMW, **EXPERTS, "dataloader__batch_size": 12},
    )


def test_each_axis_alone(tmp_path, one):
    runs = {
        "adamw, tensor": over(ADAMW, tensor=2),
        "sgd, context": over(SGD, 4, context=2),
        "experts, expert": over(ADAMW | EXPERTS, expert=2),
    }
    ranks = start(tmp_path, 2, {name: [run] for name, run in runs.items()})
    for name in runs:
        compare([rank[name] for rank in ranks], one[name.split(", ")[0]], name)
