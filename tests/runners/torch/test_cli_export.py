"""`danling export` and the other verbs on a run that a real runner has left behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from danling.runners.cli import main
from support.tiny import Tiny, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("run"), epochs=2, ema__enabled=True, ema__decay=0.5, tiny__norm=True)
    with Tiny(config) as runner:
        runner.train()
    return runner


def test_export_takes_the_average_of_the_weights(run, tmp_path, capsys):
    target = tmp_path / "model.safetensors"
    assert main(["export", str(run.checkpoint_dir / "latest"), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    averaged, own = load_file(target), run.unwrap(run.model).state_dict()
    assert set(averaged) == set(own)
    assert not torch.equal(averaged["0.weight"], own["0.weight"])
    assert main(["export", str(run.dir), str(target), "--no-ema", "--force"]) == 0
    for name, value in load_file(target).items():
        assert torch.equal(value, own[name]), name


def test_export_casts_floating_tensors_alone(run, tmp_path):
    target = tmp_path / "model.safetensors"
    assert main(["export", str(run.checkpoint_dir / "best"), str(target), "--dtype", "bf16"]) == 0
    weights = load_file(target)
    assert weights["0.weight"].dtype is torch.bfloat16 and weights["1.num_batches_tracked"].dtype is torch.int64


def test_every_verb_reads_what_a_runner_writes(run, capsys):
    def say(*argv):
        assert main([str(arg) for arg in argv]) == 0
        return capsys.readouterr().out

    (listed,) = json.loads(say("runs", run.workspace.root, "--json"))["runs"]
    assert (listed["status"], listed["progress"], listed["config_id"]) == ("finished", 1.0, run.config_id)
    assert (listed["latest"], listed["best"]) == (run.latest_score, run.best_score)
    shown = json.loads(say("show", run.dir, "--json"))
    assert [c["name"] for c in shown["checkpoints"]] == ["epoch-1", "epoch-2"]
    assert "latest" in shown["checkpoints"][-1]["aliases"]
    assert shown["config"]["optim"]["lr"] == 0.01 and shown["unreadable"] == {}
    assert "damaged" not in say("verify", run.dir)
    assert "the same experiment" in say("diff", run.dir, run.dir)
