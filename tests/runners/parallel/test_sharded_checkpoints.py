"""Sharded checkpoints: the same layout goes on bit by bit, others go on with the same numbers, and nothing in them runs."""

from __future__ import annotations

import pytest

from .test_layouts import ADAMW, CASES, close, layout, start

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


@pytest.mark.parametrize("axes", [{"replicate": 2}, {"shard": 2}], ids=str)
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


def test_other_degrees_go_on_with_the_same_numbers(tmp_path):
    """4 → 2 → 1 shards and 2 × 2 → 4, a world of 4 → 2, always with 12 samples a window."""
    four = {
        "straight": [layout(STILL, 4, shard=4)],
        "stopped": [{**layout(STILL, 4, shard=4), "stop": 4}],
        "square": [{**layout(STILL, 4, replicate=2, shard=2), "stop": 9}, {**layout(STILL, 4, shard=4), **RESUMED}],
        "wide": [{**layout(STILL, 4, shard=4), "stop": 9}, {**layout(STILL, 4, replicate=2, shard=2), **RESUMED}],
    }
    first = start(tmp_path, 4, four)[0]
    two = {
        "stopped": [
            {**layout(STILL, 2, shard=2), "stop": 12, **RESUMED},
            {**layout(STILL, 2, replicate=2), **RESUMED},
        ]
    }
    second = start(tmp_path, 2, two)[0]
    for name, found in (("square", first["square"]), ("wide", first["wide"]), ("stopped", second["stopped"])):
        for key in KEPT:
            if key == "norms":
                close(found[key], first["straight"][key][-len(found[key]) :], (name, key))
            else:
                close(found[key], first["straight"][key], (name, key), rel=1e-6 if key == "entries" else 1e-9)
