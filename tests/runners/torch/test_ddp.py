"""Several ranks train the model that one process trains, and decide together."""

import json

import pytest

from support.ranks import run_ranks

REFERENCE = """
import json, os, sys, torch
sys.path.insert(0, {tests!r})
from support.tiny import Tiny, tiny_config, final_state

class Double(Tiny):
    def __init__(self, config):
        super().__init__(config)
        self.model.double()
        for dataset in self.datasets.values():
            dataset.inputs = dataset.inputs.double()

overrides = json.loads(sys.argv[1])
with Double(tiny_config(sys.argv[2], **overrides)) as runner:
    runner.train()
    state = final_state(runner)
    entries = runner.infer("val", gather=True)
    found = dict(state=state, seen=runner.seen, rng=torch.rand(3).tolist(), entries=[e.tolist() for e in entries])
    json.dump(found, open(f"{{sys.argv[2]}}/rank{{runner.rank}}.json", "w"))
"""


def run(tmp_path, nproc, tests_dir, **overrides):
    folder = tmp_path / f"{nproc}"
    folder.mkdir()
    run_ranks(REFERENCE.format(tests=str(tests_dir)), nproc, [json.dumps(overrides), str(folder)])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]


@pytest.fixture
def tests_dir(request):
    return request.config.rootpath / "tests"


def flat(value):
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


@pytest.mark.parametrize(
    "case",
    [
        {"dataloader__batch_size": 12, "dataloader__drop_last": False, "tiny__count": 49},
        pytest.param(
            {
                "dataloader__batch_size": 6,
                "dataloader__drop_last": False,
                "accum_steps": 2,
                "max_grad_norm": 0.5,
                "tiny__count": 49,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["uneven", "accumulated and clipped"],
)
def test_two_ranks_equal_one_process(tmp_path, tests_dir, case):
    common = {
        "tiny__dropout": 0.0,
        "tiny__val": 21,
        "optim__type": "sgd",
        "optim__lr": 0.1,
        "optim__momentum": 0.9,
        **case,
    }
    size = common.pop("dataloader__batch_size")
    (one,) = run(tmp_path, 1, tests_dir, dataloader__batch_size=size, **common)
    two = run(tmp_path, 2, tests_dir, dataloader__batch_size=size // 2, **common)
    assert two[0]["state"] == two[1]["state"]
    assert two[0]["rng"] != two[1]["rng"]
    assert flat(two[0]["state"]["model"]) == pytest.approx(flat(one["state"]["model"]), rel=1e-9)
    assert flat(two[0]["state"]["results"]) == pytest.approx(flat(one["state"]["results"]), rel=1e-9)
    assert sorted(set(two[0]["seen"] + two[1]["seen"])) == list(range(49))
    assert two[0]["entries"] == two[1]["entries"]
    assert flat(two[0]["entries"]) == pytest.approx(flat(one["entries"]), rel=1e-7)
    assert len(one["entries"]) == 21
