"""Runs over the tensor, context and expert axes: equal to one process, killed and resumed, loaded elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from danling.backends.torch.conformance.forks import Forks

EXPERTS, STAGED = {"model": "experts"}, {"model": "staged"}
ADAMW = {
    "optim__type": "adamw",
    "optim__lr": 1e-2,
    "optim__weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "ema__enabled": True,
}
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9, "accum_steps": 3, "max_grad_norm": 0.05}


@pytest.fixture(scope="module")
def start():
    """Run scenarios on ranks; what each rank found, by scenario. With `crash`, one rank is killed there, and nothing is."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forks = Forks("parallel", "plans_runs:main")

    def run(
        folder: Path, nproc: int, scenarios: dict[str, list[dict[str, Any]]], crash: str | None = None
    ) -> list[dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        (folder / "scenarios.json").write_text(json.dumps(scenarios))
        env = {} if crash is None else {"DANLING_CRASH_AT": crash}
        ranks = forks.run(nproc, [str(folder / "scenarios.json")], timeout=200, env=env, check=crash is None)
        if crash is not None:
            assert ranks[int(crash.partition("@")[2][0])].returncode in (137, -9), ranks[0].output
            return []
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]

    with forks:
        yield run


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


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """One process on the whole of each batch."""
    cases = {
        "adamw": {**ADAMW, "dataloader__batch_size": 12},
        "sgd": {**SGD, "dataloader__batch_size": 4},
        "experts": {**ADAMW, **EXPERTS, "dataloader__batch_size": 12},
        "staged": {**ADAMW, **STAGED, "dataloader__batch_size": 12},
    }
    runs = {name: [{"stack": "torch", **case}] for name, case in cases.items()}
    return start(tmp_path_factory.mktemp("one"), 1, runs)[0]


def test_each_axis_alone(start, tmp_path, one):
    runs = {
        "adamw, tensor": over(ADAMW, tensor=2),
        "sgd, context": over(SGD, 4, context=2),
        "experts, expert": over(ADAMW | EXPERTS, expert=2),
    }
    refused = {"at once": [over(ADAMW, tensor=2) | {"optim__foreach": True, "fails": True}]}
    ranks = start(tmp_path, 2, {name: [run] for name, run in runs.items()} | refused)
    assert ranks[0]["at once"]["error"] == "ConfigError" and "optim.foreach" in ranks[0]["at once"]["text"]
    for name in runs:
        compare([rank[name] for rank in ranks], one[name.split(", ")[0]], name)


LIVELY = {
    **ADAMW,
    "language": {"dropout": 0.2},
    "accum_steps": 2,
    "scheduler__type": "cosine",
    "checkpoint__interval": 3,
}


def same(resumed: dict[str, Any], straight: dict[str, Any]) -> None:
    """A run that was stopped and resumed ended, bit for bit, as the one that went on."""
    for key in ("weights", "average", "results", "best", "state", "entries", "rate"):
        assert resumed[key] == straight[key], key
    assert 0 < len(resumed["norms"]) < len(straight["norms"])
    assert resumed["norms"] == straight["norms"][-len(resumed["norms"]) :]


@pytest.mark.faults
def test_two_axes_at_once(start, tmp_path, one):
    runs = {
        "adamw, shard × tensor": over(ADAMW, shard=2, tensor=2),
        "sgd, replicate × tensor": over(SGD, 4, replicate=2, tensor=2),
        "sgd, replicate × context": over(SGD, 4, replicate=2, context=2),
        "adamw, context × tensor": over(ADAMW, context=2, tensor=2),
        "staged, context × pipeline": over(ADAMW | STAGED, context=2, pipeline=2)
        | {"parallel__pipeline_n_microbatches": 2},
        "experts, shard × expert": over(ADAMW | EXPERTS, shard=2, expert=2),
        "experts, expert × expert_tensor": over(ADAMW | EXPERTS, expert=2, expert_tensor=2),
    }
    lively = over(LIVELY, 4, shard=2, tensor=2)
    resumed = {"straight": [lively], "resumed": [{**lively, "stop": 7}, {**lively, "auto_resume": True}]}
    ranks = start(tmp_path, 4, {name: [run] for name, run in runs.items()} | resumed)
    for name in runs:
        compare([rank[name] for rank in ranks], one[name.split(", ")[0]], name)
    for rank in ranks:
        same(rank["resumed"], rank["straight"])


def killed(start: Any, folder: Path, run: dict[str, Any], crash: str) -> None:
    """Run on two ranks, kill one where `crash` says, resume, and compare with a run that was left alone."""
    straight = start(folder / "straight", 2, {"run": [run]})
    start(folder / "killed", 2, {"run": [run]}, crash)
    resumed = start(folder / "killed", 2, {"run": [{**run, "auto_resume": True}]})
    for other, alone in zip(resumed, straight, strict=True):
        same(other["run"], alone["run"])


def test_killed_on_tensor_ranks_and_resumed(start, tmp_path):
    killed(start, tmp_path, over(LIVELY, 4, tensor=2), "step.end@1:8")


@pytest.mark.slow
def test_killed_on_context_ranks_and_resumed(start, tmp_path):
    killed(start, tmp_path, over(LIVELY, 4, context=2), "save.manifest@0:3")


@pytest.mark.slow
def test_killed_on_expert_ranks_and_resumed(start, tmp_path):
    killed(start, tmp_path, over(LIVELY | EXPERTS, 4, expert=2), "save.file@1:4")


@pytest.mark.slow
def test_what_one_layout_saved_another_loads(start, tmp_path):
    """Weights go anywhere, under the names and shapes of the unsplit model; whole states where the layout allows it."""
    half = {**ADAMW, "stop": 10}
    split, whole = over(half, tensor=2), {**half, "stack": "torch", "dataloader__batch_size": 12}
    saved = start(tmp_path / "saved", 2, {"split": [split]})[0]
    saved |= start(tmp_path / "wide", 4, {"parts": [over(half, replicate=2, context=2)]})[0]
    one = start(tmp_path / "one", 1, {"whole": [whole]})[0]["whole"]
    assert flat(saved["split"]["weights"]) == pytest.approx(flat(one["weights"]), rel=1e-9, abs=1e-11)
    still = {"optim__lr": 0.0, "optim__weight_decay": 0.0, "ema__enabled": False, "steps": 1}
    taken = {"pretrained": f"{saved['split']['dir']}/checkpoints/latest", **still}
    here = start(tmp_path / "here", 1, {"whole": [whole | taken]})[0]["whole"]
    assert here["weights"] == saved["split"]["average"]
    there = {"pretrained": f"{one['dir']}/checkpoints/latest", **still}
    resumed = {"resume": f"{saved['split']['dir']}/checkpoints/latest"}
    runs = {
        "taken": [split | there],
        "refused": [over(ADAMW, context=2) | resumed | {"fails": True}],
        "resharded": [over(ADAMW, shard=2) | {"resume": f"{saved['parts']['dir']}/checkpoints/latest"}],
        "straight": [over(ADAMW, shard=2)],
    }
    found = start(tmp_path / "there", 2, runs)[0]
    assert found["taken"]["weights"] == one["average"]
    assert found["refused"]["error"] == "ResumeError" and "tensor=2" in found["refused"]["text"]
    assert "pretrained" in found["refused"]["text"]
    assert flat(found["resharded"]["weights"]) == pytest.approx(flat(found["straight"]["weights"]), rel=1e-9, abs=1e-11)
