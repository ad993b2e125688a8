"""Runs with a pipeline axis against one process on the concatenated batch."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from danling.backends.torch.conformance.forks import Forks

COMMON = {"dataloader__drop_last": False, "seed": 1, "epochs": 4, "checkpoint__load_only": True}
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9, "dataloader__batch_size": 8}
ADAMW = {"optim__type": "adamw", "optim__lr": 1e-2, "dataloader__batch_size": 8, "max_grad_norm": 0.05}
PIPELINE = {"stack": "parallel", "parallel__axes__pipeline": 2, "parallel__pipeline_n_microbatches": 4}


@pytest.fixture(scope="module")
def start():
    """Runs configurations in real processes; these are forked from one that has imported everything."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forks = Forks("parallel", "staged:main")

    def run(folder, nproc, runs, crash=None):
        folder.mkdir(exist_ok=True)
        env = {} if crash is None else {"DANLING_CRASH_AT": crash}
        arguments = [json.dumps(runs), str(folder)]
        results = forks.run(nproc, arguments, timeout=150, env=env, check=crash is None)
        if crash is not None:
            return [result.returncode for result in results]
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]

    with forks:
        yield run


def flat(value):
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


def close(found, expected, what, rel=1e-9):
    assert flat(found) == pytest.approx(flat(expected), rel=rel, abs=1e-12), what


CASES = {
    "sgd": (SGD, {}),
    "adamw, accumulated, clipped": ({**ADAMW, "accum_steps": 3}, {"parallel__pipeline_schedule": "gpipe"}),
    "interleaved": ({**ADAMW, "x_metrics": True}, {"parallel__pipeline_schedule": "Interleaved1F1B"}),
    "shaped like a V": ({**SGD, "max_grad_norm": 0.1}, {"parallel__pipeline_schedule": "ZBVZeroBubble"}),
    "parts by hand": ({**SGD, "x_parts": True, "epochs": 2}, {}),
    "summed losses": ({**SGD, "x_reduction": "sum", "optim__lr": 1e-3, "accum_steps": 2}, {}),
    "hook and tied weights": (
        {**ADAMW, "x_model": "named", "scheduler__type": "cosine", "ema__enabled": True},
        {"x_seed": 1},
    ),
    "named parts, groups": (
        {
            **SGD,
            "optim__no_decay": True,
            "optim__weight_decay": 0.01,
            "optim__param_groups": [
                {"pattern": "^12[.]", "lr_mult": 0.1},
                {"pattern": "^0[.]", "weight_decay_mult": 0.5},
            ],
            "scheduler__type": "linear",
        },
        {
            "parallel__pipeline_schedule": "LoopedBFS",
            "parallel__module_fqns_per_model_part": [["0", "1"], ["3", "4"], ["6", "7"], ["9", "10", "12"]],
        },
    ),
}


def compare(one, ranks, what):
    first = ranks[0]
    for rank, found in enumerate(ranks):
        close(found["weights"], one["weights"], (what, rank, "weights"))
        close(found["results"], one["results"], (what, rank, "results"))
        close(found["norms"], one["norms"], (what, rank, "norms"))
        close(found["entries"], one["entries"], (what, rank, "entries"), rel=1e-7)
        assert found["results"] == first["results"] and found["best"] == one["best"]
        assert found["entries"] == first["entries"] and sorted(found["rate"]) == sorted(one["rate"])
        assert found["own"] == (0 if not found["last"] else found["own"])
        for key in ("global_step", "micro_step", "epoch", "samples", "skipped"):
            assert found["state"][key] == one["state"][key], (what, rank, key)


def test_two_stages_equal_one_process(start, tmp_path):
    (one,) = start(tmp_path / "one", 1, [{"stack": "torch", **COMMON, **case} for case, _ in CASES.values()])
    two = start(tmp_path / "two", 2, [{**COMMON, **case, **PIPELINE, **own} for case, own in CASES.values()])
    for index, what in enumerate(CASES):
        compare(one[index], [rank[index] for rank in two], what)
        assert one[index]["state"]["global_step"] >= 8
        own = [rank[index] for rank in two if rank[index]["last"]]
        assert len(own) == 1 and own[0]["own"] == 21
        assert all(rank[index]["read"] == ["list"] for rank in two if rank[index]["last"])
        close(own[0]["losses"], [loss for loss in one[index]["losses"] if not math.isnan(loss)], what)  # all ignored


def test_two_stages_in_bf16(start, tmp_path):
    half = {**COMMON, **SGD, "precision": "bf16", "max_grad_norm": 0.05, "accum_steps": 2}
    ((one,),) = start(tmp_path / "one", 1, [{"stack": "torch", **half}])
    ranks = start(tmp_path / "two", 2, [{**half, **PIPELINE}])
    for (found,) in ranks:
        close(found["results"], one["results"], "results", rel=2e-2)
        close(found["norms"], one["norms"], "norms", rel=5e-2)
        assert found["results"] == ranks[0][0]["results"] and found["results"] != one["results"]


WIDE = {
    "four stages": (SGD, {"parallel__axes__pipeline": 4}),
    "a stream through four stages": ({**SGD, "x_stream": True, "accum_steps": 3}, {"parallel__axes__pipeline": 4}),
    "sharded stages": (
        {**ADAMW, "accum_steps": 2, "ema__enabled": True},
        {"parallel__axes__shard": 2, "dataloader__batch_size": 4, "parallel__pipeline_n_microbatches": 2},
    ),
    "sharded stages, several each": (
        {**SGD, "max_grad_norm": 0.05, "x_metrics": True},
        {
            "parallel__axes__shard": 2,
            "dataloader__batch_size": 4,
            "parallel__pipeline_schedule": "Interleaved1F1B",
        },
    ),
    "stages split over tensor ranks": (
        {**SGD, "x_model": "transformer", "accum_steps": 2, "max_grad_norm": 0.05},
        {"parallel__axes__tensor": 2},
    ),
    "replicated stages": (
        {**SGD, "accum_steps": 3},
        {"parallel__axes__replicate": 2, "dataloader__batch_size": 4, "parallel__pipeline_schedule": "ZBVZeroBubble"},
    ),
}


@pytest.mark.slow
def test_four_ranks_equal_one_process(start, tmp_path):
    (one,) = start(tmp_path / "one", 1, [{"stack": "torch", **COMMON, **case} for case, _ in WIDE.values()])
    four = start(tmp_path / "four", 4, [{**COMMON, **case, **PIPELINE, **own} for case, own in WIDE.values()])
    for index, what in enumerate(WIDE):
        compare(one[index], [rank[index] for rank in four], what)
    assert [rank[0]["read"] for rank in four] == [
        ["list"],
        ["Tensor"],
        ["Tensor"],
        ["list"],
    ]  # positions between the ends
    assert [rank[1]["read"] for rank in four] == [["list"]] * 4  # where a stream ends only it knows


def test_first_and_last_stage_augment_alike(start, tmp_path):
    noisy = {**COMMON, **SGD, **PIPELINE, "x_noisy": True, "x_dropout": 0.1, "epochs": 2}
    ranks = start(tmp_path / "two", 2, [noisy, {**noisy, "dataloader__num_workers": 1}])  # the second after the first
    for first, last in zip(*ranks, strict=True):
        assert first["seen"] == last["seen"] and len(first["seen"]) == 14
        assert first["seen"][0] != first["seen"][7]
    assert ranks[0][0]["seen"] == ranks[0][1]["seen"]  # in the process, or in a worker


SHORT = {**COMMON, **SGD, **PIPELINE, "epochs": 1}
REFUSED = {
    "unknown schedule": (
        {"parallel__pipeline_schedule": "fast"},
        "ConfigError",
        "'fast'; the schedules are 1F1B, GPipe",
    ),
    "microbatches": ({"parallel__pipeline_n_microbatches": 3}, "ConfigError", "8 rows cannot be cut into .*= 3 equal"),
    "no way to cut": (
        {"x_model": "plain"},
        "ConfigError",
        "Plain cannot be cut .*build_pipeline_model_part.*module_fqns",
    ),
    "missing": ({"parallel__module_fqns_per_model_part": [["0"], ["3", "6"]]}, "ConfigError", "no .*stage holds '9'"),
    "one stage too many": (
        {"parallel__module_fqns_per_model_part": [["0"], ["3"], ["6"]]},
        "ConfigError",
        "3 stages, no multiple of the 2 ranks",
    ),
    "not declared as tied": (
        {"x_model": "untied"},
        "ConfigError",
        "'embed.weight' and 'head.weight' would be trained apart",
    ),
    "no model": ({"x_model": "none"}, "ValueError", "has no model"),
    "class that does not occur": (
        {"activation_checkpoint__enabled": True, "activation_checkpoint__module_classes": ["Conv2d"]},
        "ConfigError",
        "activation_checkpoint.module_classes.*Conv2d",
    ),
    "cut backward, compiled": (
        {"compile__enable": True, "parallel__pipeline_schedule": "ZBVZeroBubble"},
        "ConfigError",
        "ZBVZeroBubble runs the backward pass",
    ),
    "a step of one's own": ({"x_own_step": True}, "RuntimeError", "the schedule runs forward and backward"),
    "unsized": ({"x_unsized": True}, "ValueError", "'stream' has no length"),
}


def test_what_a_pipeline_refuses(start, tmp_path):
    runs = [{**SHORT, **case, "x_fails": True, "name": f"r{i}"} for i, (case, _, _) in enumerate(REFUSED.values())]
    ranks = start(tmp_path / "two", 2, runs)
    for index, (what, (_, kind, message)) in enumerate(REFUSED.items()):
        for rank in ranks:
            assert rank[index]["error"] == kind, (what, rank[index])
            assert re.search(message, rank[index]["text"], re.DOTALL), (what, rank[index])


def test_decisions_are_those_of_all_stages(start, tmp_path):
    """A NaN that only the last stage sees is skipped everywhere; a stop on one rank stops all; any rank goes on from there."""
    case = {**LIVELY, "skip_nonfinite_grad": True, "x_poisoned": 4, "activation_checkpoint__enabled": True}
    case |= {"activation_checkpoint__module_classes": ["Tanh"], "name": "skip", "x_count": 48}
    stopped = {**LIVELY, "name": "stop", "x_stop": [1, 5]}
    ranks = start(tmp_path / "two", 2, [case, stopped, {**stopped, "auto_resume": True, "x_stop": [0, 9]}])
    for rank in ranks:
        skip, stop, more = rank
        assert skip["state"]["skipped"] == 1 and skip["state"]["global_step"] == 11
        assert 5 <= stop["state"]["global_step"] <= 6 and 9 <= more["state"]["global_step"] <= 10
        assert [one["weights"] for one in rank] == [one["weights"] for one in ranks[0]]
        assert all(math.isfinite(value) for value in flat(skip["weights"]))
    first, last = ranks[0][0], ranks[1][0]
    assert first["inferred"] == ["list"] and last["inferred"] == ["NoneType"]
    assert first["streamed"] == [0] * 3 and last["streamed"] == [8, 8, 5] and first["own"] == 0


LIVELY = {
    **ADAMW,
    "optim__no_decay": True,
    "optim__param_groups": [{"pattern": "^12[.]", "lr_mult": 0.1}],
    "x_noisy": True,
    **PIPELINE,
    "x_dropout": 0.2,
    "x_metrics": True,
    "accum_steps": 2,
    "ema__enabled": True,
    "scheduler__type": "cosine",
    "checkpoint__interval": "2 steps",
    "checkpoint__keep_latest_k": 2,
    "dataloader__drop_last": False,
    "seed": 1,
    "epochs": 4,
}
RESUMED = {
    "killed in a window": (2, {}, "step.end@1:6"),
    "killed in a save": (2, {"parallel__pipeline_schedule": "DualPipeV"}, "save.manifest@0:3"),
    "killed in an evaluation": (2, {"checkpoint__async_enabled": False}, "evaluate.batch@1:5"),
    "sharded, killed in a save": (
        4,
        {"parallel__axes__shard": 2, "dataloader__batch_size": 4, "parallel__pipeline_schedule": "Interleaved1F1B"},
        "save.file@3:4",
    ),
}


@pytest.mark.parametrize(
    "case", [name if name == "killed in a save" else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_killed_and_resumed_is_never_killed(start, tmp_path, case):
    nproc, own, crash = RESUMED[case]
    config = {**LIVELY, **own}
    straight = start(tmp_path / "straight", nproc, [config])
    codes = start(tmp_path / "killed", nproc, [config], crash=crash)
    assert codes[int(crash.partition("@")[2][0])] == 137
    resumed = start(tmp_path / "killed", nproc, [{**config, "auto_resume": True}])
    for one, other in zip(straight, resumed, strict=True):
        one, other = one[0], other[0]
        for key in ("weights", "results", "best", "state", "entries", "rate"):
            assert one[key] == other[key], (case, key)
        assert 0 < len(other["norms"]) < len(one["norms"])
        assert other["norms"] == one["norms"][-len(other["norms"]) :]
