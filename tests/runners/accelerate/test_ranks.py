"""Several ranks on Accelerate train the model that one process trains, and resume it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from support.ranks import free_port, run_ranks

SCRIPT = """
import json, os, sys, torch
sys.path.insert(0, {tests!r})
from support.tiny import Tiny, tiny_config, final_state

class Double(Tiny):
    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(100 + self.rank)  # replicas must start equal although ranks draw differently
        if self.rank:
            torch.nn.init.normal_(self.model[0].weight)
        self.set_seed()
        self.model.double()
        for dataset in self.datasets.values():
            dataset.inputs = dataset.inputs.double()

    def train_step(self, data):
        if self.rank == 1 and self.train_state.micro_step == self.config.get("tiny", {{}}).get("poisoned"):
            data = (data[0] * torch.nan, *data[1:])
        return super().train_step(data)

losses = []
for overrides in json.loads(sys.argv[1]):
    stop = overrides.pop("stop", None)
    with Double(tiny_config(sys.argv[2], **overrides)) as runner:
        if stop is not None:
            runner.on("step", lambda runner, event: event.global_step == stop and runner.request_stop("test"))
        runner.train()
        losses += runner.losses
        state = final_state(runner)
        entries = [entry.tolist() for entry in runner.infer("val", gather=True)]
        mean = runner.reduce(torch.tensor(float(runner.rank))).item()
        total = runner.all_reduce(torch.tensor(float(runner.rank + 1))).item()
        kind = runner.stack, type(runner.model).__name__, runner.precision.name
assert not torch.distributed.is_initialized()
found = dict(state=state, losses=losses, entries=entries, kind=kind, mean=mean, total=total)
json.dump(found, open(f"{{sys.argv[2]}}/rank{{runner.rank}}.json", "w"))
"""


@pytest.fixture
def script(request):
    return SCRIPT.format(tests=str(request.config.rootpath / "tests"))


def run(folder, nproc, script, *runs):
    folder.mkdir()
    run_ranks(script, nproc, [json.dumps(runs), str(folder)])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]


def flat(value):
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


COMMON = {"tiny__dropout": 0.0, "tiny__count": 49, "dataloader__drop_last": False, "seed": 1}
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9}


@pytest.mark.parametrize(
    ("size", "case"),
    [(12, SGD), (6, {**SGD, "accum_steps": 3, "max_grad_norm": 0.5}), (6, {"accum_steps": 3, "max_grad_norm": 0.5})],
    ids=["uneven", "accumulated and clipped", "adamw"],
)
def test_two_ranks_equal_one_process(tmp_path, script, size, case):
    case = {**COMMON, **case}
    (one,) = run(tmp_path / "one", 1, script, {"stack": "torch", "dataloader__batch_size": size, **case})
    two = run(tmp_path / "two", 2, script, {"stack": "accelerate", "dataloader__batch_size": size // 2, **case})
    assert one["kind"][0] == "torch" and two[0]["kind"] == ["accelerate", "DistributedDataParallel", "fp32"]
    assert two[0]["state"] == two[1]["state"] and two[0]["entries"] == two[1]["entries"]
    assert flat(two[0]["state"]["model"]) == pytest.approx(flat(one["state"]["model"]), rel=1e-9)
    assert flat(two[0]["state"]["results"]) == pytest.approx(flat(one["state"]["results"]), rel=1e-9)
    assert flat(two[0]["entries"]) == pytest.approx(flat(one["entries"]), rel=1e-7) and len(two[0]["entries"]) == 21
    assert (two[0]["mean"], two[1]["total"]) == (0.5, 3.0)


@pytest.mark.parametrize("second", ["accelerate", pytest.param("torch", marks=pytest.mark.slow)])
def test_two_ranks_stop_and_resume(tmp_path, script, second):
    case = {**COMMON, "tiny__dropout": 0.2, "tiny__augment": True, "dataloader__batch_size": 4, "accum_steps": 2}
    straight = run(tmp_path / "straight", 2, script, {"stack": "accelerate", **case})
    first = {"stack": "accelerate", "stop": 4, **case}
    resumed = run(tmp_path / "resumed", 2, script, first, {"stack": second, "auto_resume": True, **case})
    for one, other in zip(straight, resumed, strict=True):
        assert one["state"] == other["state"] and one["losses"] == other["losses"]


@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 1.0}], ids=["unclipped", "clipped"])
def test_a_nonfinite_gradient_on_one_rank_is_skipped_by_both(tmp_path, script, clipping):
    case = {**COMMON, **clipping, "tiny__poisoned": 2, "skip_nonfinite_grad": True, "dataloader__batch_size": 6}
    two = run(tmp_path / "two", 2, script, {"stack": "accelerate", "epochs": 1, **case})
    assert two[0]["state"] == two[1]["state"] and two[0]["state"]["train"]["skipped"] == 1
    assert all(map(math.isfinite, flat(two[0]["state"]["model"])))


@pytest.mark.parametrize("nproc", [1, 2])
def test_accelerate_launch(tmp_path, script, nproc):
    path = tmp_path / "train.py"
    path.write_text(script)
    case = {**COMMON, "dataloader__batch_size": 6, "epochs": 1, "stack": "accelerate"}
    options = {"num_processes": nproc, "num_machines": 1, "mixed_precision": "bf16", "dynamo_backend": "no"}
    options |= {"main_process_port": free_port(), "num_cpu_threads_per_process": 1}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu" if nproc == 1 else "--multi_gpu"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [*command, str(path), json.dumps([case]), str(tmp_path)],
        env={**os.environ, "HF_HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(nproc)]
    assert found[0]["state"] == found[-1]["state"]
    assert found[0]["kind"] == ["accelerate", "Sequential" if nproc == 1 else "DistributedDataParallel", "bf16"]
