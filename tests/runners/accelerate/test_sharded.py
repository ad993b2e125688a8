"""With an FSDP2 plugin two ranks hold parts of every weight, and still train what one process trains."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from support.ranks import free_port, run_ranks

SCRIPT = """
import json, re, sys, torch
from torch import nn
sys.path.insert(0, {tests!r})
from torch.distributed.fsdp import FSDPModule
from support.tiny import Tiny, tiny_config

class Double(Tiny):
    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(100 * self.config.get("tiny", {{}}).get("unequal", self.rank))
        if self.rank:
            torch.nn.init.normal_(self.model[0].weight)
        self.set_seed()
        self.model.double()
        for dataset in self.datasets.values():
            dataset.inputs = dataset.inputs.double()
        self.norms = []
        self.on("step", lambda runner, event: runner.norms.append(float(runner.grad_norm or 0)))
        if self.config.get("tiny", {{}}).get("bound"):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def train_step(self, data):
        if self.rank == 1 and self.train_state.micro_step == self.config.get("tiny", {{}}).get("poisoned"):
            data = (data[0] * torch.nan, *data[1:])
        return super().train_step(data)

found = []
for order in json.loads(sys.argv[1]):
    stop, root = order.pop("stop", None), sys.argv[2] + "/" + order.pop("run", "run")
    with Double(tiny_config(root, **order)) as runner:
        resumed = runner.global_step
        if stop is not None:
            runner.on("step", lambda runner, event: event.global_step == stop and runner.request_stop("test"))
        runner.train()
        runner.export(root + "/weights.safetensors")
        whole = [runner.broadcast_object(runner.export_state(ema=ema)) for ema in (False, True)]
        runner.checkpoint_manager.drain()
        found.append(dict(
            model={{name: value.tolist() for name, value in whole[0].items()}},
            average={{name: value.tolist() for name, value in whole[1].items()}},
            losses=runner.losses, results=runner.results.rows(), norms=runner.norms, resumed=resumed,
            skipped=runner.train_state.skipped, train=runner.train_state.state_dict()["global_step"],
            entries=[entry.tolist() for entry in runner.infer("val", gather=True)],
            units=sum(isinstance(module, FSDPModule) for module in runner.unwrap(runner.model).modules()),
            held=sum(getattr(p, "to_local", lambda: p)().numel() for p in runner.local_parts()[0].parameters()),
            buffers=[buffer.tolist() for buffer in runner.unwrap(runner.model).buffers()],
            newest=str(runner.checkpoint_dir), names=[info.name for info in runner.checkpoint_manager.list()],
            precision=runner.precision.name, verified=[
                problem for info in runner.checkpoint_manager.list()
                for problem in runner.checkpoint_manager.verify(runner.checkpoint_dir / info.name)
            ],
        ))
assert not torch.distributed.is_initialized()
json.dump(found, open(f"{{sys.argv[2]}}/rank{{runner.rank}}.json", "w"))
"""
FSDP = {"stack": "accelerate", "accelerate": {"fsdp_plugin": {}}}
UNITS = {"auto_wrap_policy": "size_based_wrap", "min_num_params": 20}
COMMON = {"tiny__dropout": 0.0, "tiny__count": 49, "dataloader__drop_last": False, "seed": 1}
SGD = {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9}


@pytest.fixture
def script(request):
    return SCRIPT.format(tests=str(request.config.rootpath / "tests"))


def run(folder, nproc, script, *orders):
    folder.mkdir()
    run_ranks(script, nproc, [json.dumps(orders), str(folder)])
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(nproc)]
    for found in zip(*ranks, strict=True):
        for name in ("model", "average", "results", "norms", "entries", "skipped", "buffers"):
            assert all(rank[name] == found[0][name] for rank in found), name
        assert not any(rank["verified"] for rank in found)
    return ranks


def flat(value):
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


def test_equal_to_one_process(tmp_path, script):
    """Uneven windows, accumulation, clipping, an average; the whole model as one unit, and each layer as one."""
    cases = [
        {**SGD, "run": "a", "dataloader__batch_size": 12},
        {"run": "b", "dataloader__batch_size": 6, "accum_steps": 3, "max_grad_norm": 0.5, "ema__enabled": True},
        {**SGD, "run": "c", "dataloader__batch_size": 6, "max_grad_value": 0.05, "max_grad_norm": 0.2},
        {"run": "d", "dataloader__batch_size": 12, "optim__type": None, "tiny__bound": True},
    ]
    (one,) = run(tmp_path / "one", 1, script, *({"stack": "torch", **COMMON, **case} for case in cases))
    plugins = [{"cpu_offload": True}, UNITS, {"reshard_after_forward": False}, UNITS]
    two = run(
        tmp_path / "two",
        2,
        script,
        *(
            {**FSDP, **COMMON, **case, "dataloader__batch_size": case["dataloader__batch_size"] // 2}
            | {"accelerate": {"fsdp_plugin": plugin}}
            for case, plugin in zip(cases, plugins, strict=True)
        ),
    )
    whole = one[0]["held"]
    for case, plugin, expected, found, other in zip(cases, plugins, one, *two, strict=True):
        assert (
            found["units"] == (3 if plugin is UNITS else 1) and found["held"] + other["held"] == whole > found["held"]
        )
        for name in ("model", "average", "results", "entries", "norms"):
            assert flat(found[name]) == pytest.approx(flat(expected[name]), rel=1e-9), (case["run"], name)
        assert list(found["model"]) == list(expected["model"]) and len(found["entries"]) == 21
    assert flat(one[1]["average"]) != flat(one[1]["model"])


RESUMED = {**COMMON, "tiny__dropout": 0.2, "tiny__augment": True, "dataloader__batch_size": 4, "accum_steps": 2}
RESUMED |= {"scheduler__type": "cosine", "ema__enabled": True, "max_grad_norm": 0.5}


def test_stopped_and_resumed_bitwise_and_exchanged_with_the_torch_stack(tmp_path, script):
    """Checkpoints of the torch stack, whole, and of the plugin, in parts, resume each other in full."""
    torch_ = {**RESUMED, "stack": "torch"}
    ours, again = {**RESUMED, **FSDP}, {"auto_resume": True}
    ranks = run(
        tmp_path / "runs",
        2,
        script,
        {**ours, "run": "straight"},
        {**ours, "run": "ours", "stop": 4},
        {**ours, "run": "ours", **again},
        {**torch_, "run": "from torch", "stop": 4},
        {**ours, "run": "from torch", **again},
        {**ours, "run": "to torch", "stop": 4},
        {**torch_, "run": "to torch", **again},
    )
    for straight, first, second, begun, ours, sharded, theirs in ranks:
        assert [x["resumed"] for x in (second, ours, theirs)] == [4, 4, 4]
        for name in ("model", "average", "results", "entries"):
            assert second[name] == straight[name], name
            for other in (ours, theirs):
                assert flat(other[name]) == pytest.approx(flat(straight[name]), rel=1e-9)
        assert first["losses"] + second["losses"] == straight["losses"] and first["norms"] + second["norms"]
        for other in (begun["losses"] + ours["losses"], sharded["losses"] + theirs["losses"]):
            assert other == pytest.approx(straight["losses"], rel=1e-9)
    checkpoint = ranks[0][0]["newest"] + "/" + ranks[0][0]["names"][-1]
    assert {".metadata", "__0_0.distcp"} <= set(os.listdir(checkpoint + "/dcp"))


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 3])
def test_resumed_by_another_number_of_ranks(tmp_path, script, nproc):
    """The parts are put together anew: with one process there is nothing to shard."""
    options = {**COMMON, "ema__enabled": True, "dataloader__batch_size": 6}
    orders = [{**FSDP, **options, "run": "parts"}, {"stack": "torch", **options, "run": "whole"}]
    begun = run(tmp_path / "begun", 2, script, *({**order, "stop": 4} for order in orders))[0]
    sources = [f"{found['newest']}/{found['names'][-1]}" for found in begun]
    orders = [{**order, "resume": source} for order, source in zip(orders, sources, strict=True)]
    found, expected = run(tmp_path / "ended", nproc, script, *orders)[0]
    assert found["resumed"] == expected["resumed"] >= 4
    assert flat(found["model"]) == pytest.approx(flat(expected["model"]), rel=1e-9)
    assert flat(found["average"]) == pytest.approx(flat(expected["average"]), rel=1e-9)


@pytest.mark.slow
def test_skips_and_buffers_are_those_of_all_ranks(tmp_path, script):
    """A NaN on one rank stops the update of both, however gradients are clipped; running statistics stay the same."""
    options = {**FSDP, **COMMON, "tiny__norm": True, "tiny__poisoned": 2, "skip_nonfinite_grad": True, "epochs": 1}
    options |= {"dataloader__batch_size": 6, "tiny__val": 6, "tiny__count": 48}
    clipping = [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.1, "max_grad_norm": 1.0}]
    orders = [{**options, **more, "run": f"{i}"} for i, more in enumerate(clipping)]
    for found in run(tmp_path / "runs", 2, script, *orders)[0]:
        assert found["skipped"] == 1 and all(map(math.isfinite, flat(found["model"]["0.weight"])))
        assert found["buffers"]


TRANSFORMER = {"auto_wrap_policy": "transformer_based_wrap"}
REFUSED = [
    ({"checkpoint__backend": "file"}, "'file' cannot hold"),
    ({"accelerate": {"fsdp_plugin": {"ignored_modules": "0"}}}, "0.weight, 0.bias would be trained"),
    ({"accelerate": {"fsdp_plugin": {"auto_wrap_policy": "all"}}}, "Invalid auto wrap policy"),
    ({"accelerate": {"fsdp_plugin": {**TRANSFORMER, "transformer_cls_names_to_wrap": ["Foo"]}}}, "fsdp_plugin: .* Foo"),
]


@pytest.mark.slow
def test_refused(tmp_path, script):
    script = (
        script[: script.index("found = []")]
        + """
for order, words in json.loads(sys.argv[1]):
    try:
        Double(tiny_config(sys.argv[2], **order)).close()
    except ValueError as error:
        assert type(error).__name__ == "ConfigError" and re.search(words, str(error)), error
    else:
        raise AssertionError(order)
    assert not torch.distributed.is_initialized()
"""
    )
    run_ranks(script, 2, [json.dumps([({**FSDP, **COMMON, **more}, words) for more, words in REFUSED]), str(tmp_path)])


@pytest.mark.slow
def test_accelerate_launch(tmp_path, script):
    """The plugin that the launcher describes, with its precision."""
    path = tmp_path / "train.py"
    path.write_text(script)
    case = {**COMMON, "dataloader__batch_size": 6, "epochs": 1, "stack": "accelerate"}
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "bf16", "dynamo_backend": "no"}
    options |= {"main_process_port": free_port(), "num_cpu_threads_per_process": 1, "fsdp_version": 2}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [*command, str(path), json.dumps([case]), str(tmp_path)],
        env={**os.environ, "HF_HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text())[0] for rank in range(2)]
    assert found[0]["model"] == found[1]["model"] and found[0]["precision"] == "bf16"
    assert found[0]["units"] == 1 and found[0]["held"] < 59
