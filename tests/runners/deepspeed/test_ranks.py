"""Two ranks under every ZeRO stage train the model that one process trains, skip together, and resume bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file

from danling.backends.deepspeed import DeepSpeedRunner
from danling.runners.cli import main
from support.ranks import run_ranks

JOB = Path(__file__).with_name("job.py")
COMMON = {
    "steps": 20,
    "seed": 1,
    "tiny__dropout": 0.0,
    "tiny__count": 49,  # four global batches of 12, and one of a single sample: a rank is left without any
    "dataloader__drop_last": False,
    "dataloader__val__batch_size": 5,  # 11 samples on one rank and 10 on the other: 3 batches and 2
    "checkpoint__interval": 0,
    "eval_interval": 10,
    "log_interval": 0,
}
SGD = {"optim__type": "sgd", "optim__lr": 0.05, "optim__momentum": 0.9}
ADAMW = {"optim__type": "adamw", "optim__lr": 5e-3}


def play(folder, nproc, runs, **options):
    folder.mkdir(exist_ok=True)
    run_ranks(JOB, nproc, [str(folder), json.dumps(runs)], timeout=280, **options)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]


def play_here(folder, runs):
    play_one = runpy.run_path(str(JOB))["play"]
    folder.mkdir()
    return json.loads(json.dumps([play_one(dict(run), folder) for run in runs]))


def on_one(case):
    """The same updates in one process, without DeepSpeed."""
    case = {key: value for key, value in case.items() if key != "deepspeed"}
    return {**case, "stack": "torch", "dataloader__batch_size": 2 * case["dataloader__batch_size"]}


def case(stage, size=6, **more):
    zero = {"zero_optimization": {"stage": stage}}
    return {**COMMON, "stack": "deepspeed", "deepspeed": zero, "dataloader__batch_size": size, **more}


def assert_close(ours, theirs, tolerance=1e-5):
    """All of a row, relative to the largest number in it."""
    largest = max(map(abs, theirs))
    assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) <= tolerance * largest


def assert_equal_training(two, one, clipped):
    assert two[0]["steps"] == one["steps"] and two[0]["skips"] == one["skips"]
    assert len(two[0]["weights"]) == len(one["weights"]) > 15
    for ours, theirs in zip(two[0]["weights"], one["weights"], strict=True):
        assert_close(ours, theirs)
    for (index, ours), (other, theirs) in zip(two[0]["results"].items(), one["results"].items(), strict=True):
        assert index == other
        for split in theirs:
            assert ours[split]["loss"] == pytest.approx(theirs[split]["loss"], rel=1e-5)
    for rank in two:
        assert rank["scheduler"] == one["scheduler"] and rank["lr"] == pytest.approx(one["lr"], rel=1e-12)
        assert rank["results"] == two[0]["results"] and rank["entries"] == two[0]["entries"]
        assert clipped is None or rank["norm"] == pytest.approx(one["norm"], rel=1e-4)
        assert not rank["problems"]
    assert_close(sum(two[0]["entries"], []), sum(one["entries"], []), 1e-4)
    assert len(two[0]["entries"]) == 21


def training(stage):
    """Accumulated, clipped and scheduled; and with a window that has no weight."""
    return {
        "accumulated": case(stage, 3, **SGD, accum_steps=3, max_grad_norm=0.5, scheduler__type="cosine"),
        "muted": case(stage, **ADAMW, muted=3),
    }


def stopping(stage):
    """Everything random, stopped in the middle of an epoch and resumed; the last two end where the first does."""
    options = {"scheduler__type": "cosine", "accum_steps": 2, "steps": 8, "eval_interval": 3, "checkpoint__interval": 3}
    options |= {"ema__enabled": stage < 3, "tiny__dropout": 0.2, "tiny__augment": True, "tiny__norm": True}
    options |= {"tiny__count": 55}  # the last batch has 4 and 3 samples: one would not do for a batch norm
    straight = case(stage, 4, **ADAMW, **options)
    return {
        "straight": {**straight, "at": f"straight{stage}"},
        "stopped": {**straight, "at": f"stopped{stage}", "stop": 4},
        "resumed": {**straight, "at": f"stopped{stage}", "auto_resume": True},
    }


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_every_stage(tmp_path, stages):
    runs = {}
    for stage in stages:
        runs |= {(stage, name): {**run, "at": f"{name}{stage}"} for name, run in training(stage).items()}
        poisoned = case(stage, **ADAMW, steps=4, poisoned=2, eval_interval=0, skip_nonfinite_grad=stage == 0)
        runs[stage, "poisoned"] = {**poisoned, "at": f"poisoned{stage}"}
        runs |= {(stage, name): run for name, run in stopping(stage).items()}
    ranks = play(tmp_path / "two", 2, list(runs.values()))
    two = {key: [rank[index] for rank in ranks] for index, key in enumerate(runs)}
    references = {name: {**on_one(run), "at": name} for name, run in training(stages[0]).items()}
    found = play_here(tmp_path / "one", list(references.values()))
    one = dict(zip(references, found, strict=True))
    for stage in stages:
        for name, run in training(stage).items():
            assert_equal_training(two[stage, name], one[name], run.get("max_grad_norm"))
        skipping = two[stage, "poisoned"]
        for rank in skipping:
            assert rank["steps"] == [4, 5, 1] and rank["skips"] == [2], (stage, rank["steps"])
        assert all(map(math.isfinite, skipping[0]["final"]))
        straight, stopped, resumed = (two[stage, name] for name in ("straight", "stopped", "resumed"))
        for rank in range(2):
            assert (stopped[rank]["steps"][0], resumed[rank]["resumed_at"]) == (4, 4)
            assert stopped[rank]["losses"] + resumed[rank]["losses"] == straight[rank]["losses"], stage
            assert stopped[rank]["seen"] + resumed[rank]["seen"] == straight[rank]["seen"]
            for what in ("final", "results", "steps", "lr", "entries", "buffers"):
                assert resumed[rank][what] == straight[rank][what], (stage, what)
        exported = [load_file(tmp_path / "two" / f"{name}{stage}.safetensors") for name in ("straight", "stopped")]
        assert list(exported[0]) == list(exported[1]) and "0.weight" in exported[0]
        assert all(value.equal(exported[1][name]) for name, value in exported[0].items())
        assert main(["verify", resumed[0]["directory"]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equal_to_one_process(tmp_path, stage):
    names = list(itertools.product((SGD, ADAMW), (1, 3), (None, 0.5)))
    cases = [
        case(stage, 6 // accum, **optimizer, accum_steps=accum, max_grad_norm=norm, scheduler__type="cosine")
        for optimizer, accum, norm in names
    ]
    runs = [{**run, "at": f"{index}"} for index, run in enumerate(cases)]
    ranks = play(tmp_path / "two", 2, runs)
    one = play_here(tmp_path / "one", [on_one(run) for run in runs])
    for index, run in enumerate(runs):
        assert_equal_training([rank[index] for rank in ranks], one[index], run["max_grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_killed_and_started_again(tmp_path, stage):
    runs = stopping(stage)
    (tmp_path / "two").mkdir()
    arguments = [str(tmp_path / "two"), json.dumps([{**runs["resumed"], "watched": False}])]
    killed = run_ranks(JOB, 2, arguments, env={"DANLING_CRASH_AT": "step.end@1:5"}, check=False, timeout=120)
    assert killed[1].returncode == 137 and killed[0].returncode != 0
    assert all(path.name in ("step-3", "step-4") for path in (tmp_path / "two").glob("*/*/*/*/checkpoints/step-*"))
    ranks = play(tmp_path / "two", 2, [{**runs["straight"], "watched": False}, {**runs["resumed"], "watched": False}])
    for straight, resumed in ranks:
        assert resumed["resumed_at"] >= 3
        for what in ("final", "results", "steps", "lr", "entries", "buffers"):
            assert resumed[what] == straight[what], what


def test_the_class_claims_what_is_tested():
    assert DeepSpeedRunner.guarantees == frozenset(range(1, 12)) and not DeepSpeedRunner.axes
