"""Sharded checkpoints: the same layout goes on bit by bit, others go on with the same numbers, and nothing in them runs."""

from __future__ import annotations

import pytest

from .test_layouts import ADAMW, close, layout, start

LIVELY = {
    **ADAMW,
    "accum_steps": 2,
    "ema__enabled": True,
    "ema__decay": 0.9,
    "scheduler__type": "cosine",
    "language": {"norm": True, "dropout": 0.2},
    "checkpoint__interval": 3,
}
STILL = {**LIVELY, "language": {}}
KEPT = ("weights", "average", "results", "norms", "evaluated", "best", "entries", "rate")
RESUMED = {"auto_resume": True}


@pytest.mark.parametrize("axes", [pytest.param({"replicate": 2}, marks=pytest.mark.slow), {"shard": 2}], ids=str)
def test_stopped_and_resumed_is_the_run_that_went_on(tmp_path, axes):
    case = layout(LIVELY, 2, **axes)
    ranks = start(tmp_path, 2, {"straight": [case], "resumed": [{**case, "stop": 7}, {**case, **RESUMED}]})
    for found in ranks:
        straight, resumed = found["straight"], found["resumed"]
        assert {key: resumed[key] for key in KEPT if key != "norms"} == {k: straight[k] for k in KEPT if k != "norms"}
        done = len(straight["norms"]) - len(resumed["norms"])
        assert done == 8 and resumed["norms"] == straight["norms"][done:]
        assert resumed["notes"] == "of rank 0"  # what modules keep beside tensors is that of the first rank
        assert resumed["losses"] == straight["losses"][-len(resumed["losses"]) :]


@pytest.mark.slow
def test_other_degrees_go_on_with_the_same_numbers(tmp_path):
    """2 × 2 → 4, 4 → 2 × 2, and 4 → 2 → 1 shards with a smaller world, whose reference is plain DDP on as many ranks."""
    case = layout(STILL, 4)
    shard, square = {**case, "parallel__axes__shard": -1}, {**case, "parallel__axes__shard": 2}
    square["parallel__axes__replicate"] = 2
    plain = {**case, "stack": "torch"}
    four = {
        "straight": [shard],
        "square": [{**square, "stop": 9}, {**shard, **RESUMED}],
        "wide": [{**shard, "stop": 9}, {**square, **RESUMED}],
        "fewer": [{**shard, "stop": 4}],
        "fewer, plain": [{**plain, "stop": 4}],
    }
    first = start(tmp_path, 4, four)[0]
    two = {
        "fewer": [{**shard, **RESUMED, "stop": 12}, {**case, **RESUMED, "parallel__axes__replicate": 2}],
        "fewer, plain": [{**plain, **RESUMED, "stop": 12}, {**plain, **RESUMED}],
    }
    second = start(tmp_path, 2, two)[0]
    pairs = [(first["square"], first["straight"]), (first["wide"], first["straight"])]
    for found, expected in [*pairs, (second["fewer"], second["fewer, plain"])]:
        assert len(found["norms"]) < 12 and found["state"] == expected["state"]
        for key in KEPT:
            last = expected[key][-len(found[key]) :] if key == "norms" else expected[key]
            close(found[key], last, key, rel=1e-6 if key == "entries" else 1e-9)


@pytest.mark.slow
def test_what_lost_ranks_had_measured_counts(tmp_path):
    """Nothing is learned, so that the mean loss of the epoch is the same on any number of ranks."""
    case = layout({**ADAMW, "optim__lr": 0.0, "epochs": 1, "log_interval": 0}, 4, shard=-1)
    found = start(tmp_path, 4, {"straight": [case], "fewer": [{**case, "stop": 2}]})[0]
    assert len(found["fewer"]["norms"]) < len(found["straight"]["norms"])
    fewer = start(tmp_path, 2, {"fewer": [{**case, **RESUMED}]})[0]["fewer"]
    close(fewer["results"], found["straight"]["results"], "results")


CRASHES = ["save.file@1:9", "step.end:11", "save.manifest_tmp:3", "save.rename:4", "evaluate.batch@1:3"]


@pytest.mark.slow
@pytest.mark.parametrize("crash", CRASHES)
def test_killed_and_resumed_is_the_run_that_was_not(tmp_path, crash):
    case = layout({**LIVELY, "accum_steps": 1}, 2, shard=2)
    codes = start(tmp_path, 2, {"killed": [case]}, crash=crash)
    assert 137 in codes and 0 not in codes, codes
    for found in start(tmp_path, 2, {"killed": [{**case, **RESUMED}], "straight": [case]}):
        for key in KEPT:
            killed, straight = found["killed"][key], found["straight"][key]
            assert killed == (straight[-len(killed) :] if key == "norms" else straight), key
        assert len(found["killed"]["norms"]) < 20
