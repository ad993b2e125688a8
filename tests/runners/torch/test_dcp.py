"""Sharded checkpoints in one process, and what their files may hold."""

from __future__ import annotations

import io
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from danling.backends.torch.dcp import Report as Written
from danling.backends.torch.dcp import StoredTensors, assign, load_named, read_index, write_index
from danling.backends.torch.export import read_safetensors
from danling.backends.torch.payload import read_weights
from danling.runners import CheckpointError, ResumeError
from danling.runners.cli.main import main
from danling.runners.manifest import describe_files, read_manifest, walk, write_manifest
from support.tiny import Tiny, final_state, tiny_config

DCP = {"checkpoint__backend": "dcp", "ema__enabled": True, "scheduler__type": "cosine", "tiny__norm": True, "seed": 3}


class Slow(Tiny):
    """Stops after a number of updates."""

    def __init__(self, config, stop=None):
        super().__init__(config)
        self.on("step", lambda runner, event: event.global_step == stop and runner.request_stop("test"))


def train(root, stop=None, **overrides):
    with Slow(tiny_config(root, **{**DCP, **overrides}), stop) as runner:
        runner.train()
    return runner


def newest(runner):
    return runner.checkpoint_manager.newest()


def resign(path):
    """Write the manifest of a checkpoint again, over files that were changed."""
    header = {key: value for key, value in read_manifest(path).items() if key not in ("files", "format_version")}
    write_manifest(path, header, describe_files(path, list(walk(path))))


def test_resumes_bit_by_bit(tmp_path):
    straight = train(tmp_path / "straight")
    stopped = train(tmp_path / "resumed", stop=8)
    files = set(walk(newest(stopped)))
    assert {"dcp/.metadata", "dcp/__0_0.distcp", "optimizer.pt", "runner.json"} <= files
    assert not files & {"model.pt", "ema.pt"}
    resumed = train(tmp_path / "resumed", auto_resume=True)
    assert final_state(resumed) == final_state(straight)
    assert not newest(resumed).joinpath("dcp", ".metadata.tmp").exists()


@pytest.mark.parametrize("first", ["dcp", "file"])
def test_both_backends_read_each_other(tmp_path, first):
    second = {"dcp": "file", "file": "dcp"}[first]
    straight = train(tmp_path / "straight", checkpoint__backend="file")
    train(tmp_path / "resumed", stop=8, checkpoint__backend=first)
    resumed = train(tmp_path / "resumed", auto_resume=True, checkpoint__backend=second)
    assert final_state(resumed) == final_state(straight)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_holds_the_weights_of_its_step(tmp_path, mode):
    runner = train(tmp_path, steps=6, checkpoint__interval=2, checkpoint__async_mode=mode, optim__lr=0.1)
    weights = [read_weights(runner.checkpoint_dir / f"step-{step}", ema=False)["0.weight"] for step in (2, 4, 6)]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[2], runner.model[0].weight)


def test_exported_and_verified_from_the_command_line(tmp_path, capsys):
    runner = train(tmp_path / "run")
    path = newest(runner)
    assert main(["verify", str(path)]) == 0
    assert main(["export", str(path), str(tmp_path / "m.safetensors"), "--no-ema"]) == 0
    exported = read_safetensors(tmp_path / "m.safetensors")
    assert {name: value.tolist() for name, value in exported.items()} == final_state(runner)["model"]
    with Tiny(tiny_config(tmp_path / "other", tiny__norm=True, pretrained=str(path))) as other:
        averaged = {name.removeprefix("module."): v for name, v in runner.ema.state_dict().items()}
        assert all(torch.equal(value, averaged[name]) for name, value in other.model.state_dict().items())
    with open(path / "dcp" / "__0_0.distcp", "r+b") as file:
        file.seek(100)
        file.write(b"x")
    assert main(["verify", str(path)]) == 1
    assert "dcp/__0_0.distcp" in capsys.readouterr().out


def test_final_weights_are_cast(tmp_path):
    runner = train(tmp_path, checkpoint__last_save_model_only=True, checkpoint__export_dtype="bf16")
    weights = read_weights(runner.checkpoint_dir / "final")
    assert weights["0.weight"].dtype is torch.bfloat16 and weights["1.num_batches_tracked"].dtype is torch.int64
    with pytest.raises(ResumeError, match="pretrained"):
        train(tmp_path, resume=str(runner.checkpoint_dir / "final"), auto_resume=True)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


@pytest.mark.parametrize("where", ["index", "entry", "tensor"])
def test_runs_no_code(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    path = newest(train(tmp_path / "run"))
    folder = path / "dcp"
    if where == "index":
        folder.joinpath(".metadata").write_bytes(pickle.dumps(Harm()))
    elif where == "entry":
        metadata = read_index(folder)
        metadata.planner_data = Harm()
        folder.joinpath(".metadata").write_bytes(pickle.dumps(metadata))
    else:
        buffer = io.BytesIO()
        torch.save(Harm(), buffer)
        metadata = read_index(folder)
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = "harm.distcp", 0, len(buffer.getvalue())
        folder.joinpath("harm.distcp").write_bytes(buffer.getvalue())
        folder.joinpath(".metadata").write_bytes(pickle.dumps(metadata))
    resign(path)
    with pytest.raises(CheckpointError, match="harm|mkdir|damaged"):
        Tiny(tiny_config(tmp_path / "run", **DCP, resume=str(path)))
    assert not (tmp_path / "harm-done").exists()


def test_names_the_forbidden_class(tmp_path):
    tmp_path.joinpath(".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="posix.mkdir.*danling runs no code"):
        read_index(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bytes_are_read_without_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"weight": torch.ones(2)}, "note": 7, "harm": Harm()}, checkpoint_id=tmp_path, no_dist=True)
    stored = StoredTensors(tmp_path, "model.")
    assert list(stored) == ["weight"] and stored["weight"].tolist() == [1, 1]  # what is no tensor is not offered
    every = StoredTensors(tmp_path)
    every.read_into({"note": None})
    with pytest.raises(CheckpointError, match="harm"):
        every.read_into({"harm": None})
    assert not (tmp_path / "harm-done").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([1]))], ids=str)
def test_a_damaged_index(tmp_path, content):
    tmp_path.joinpath(".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_index(tmp_path)


def test_no_index_and_files_elsewhere(tmp_path):
    with pytest.raises(CheckpointError, match="has no .metadata"):
        read_index(tmp_path)
    path = newest(train(tmp_path / "run")) / "dcp"
    metadata = read_index(path)
    for info in metadata.storage_data.values():
        info.relative_path = "../runner.json"
    path.joinpath(".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside"):
        read_index(path)


def test_missing_and_damaged_tensors(tmp_path):
    path = newest(train(tmp_path / "run"))
    shutil.copytree(path, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / "dcp" / "__0_0.distcp", 200)
    with pytest.raises(CheckpointError, match="damaged"):
        dict(read_weights(tmp_path / "copy"))
    config = tiny_config(tmp_path / "other", **{**DCP, "tiny__norm": False}, pretrained=str(path))
    with pytest.raises(CheckpointError, match="missing: 3.weight.*unexpected: 1.weight"):
        Tiny(config)


def test_an_index_that_does_not_add_up(tmp_path):
    whole, half = torch.Size([4]), torch.Size([2])
    chunk = ("weight", whole, torch.float32, torch.Size([0]), half)
    with pytest.raises(CheckpointError, match="wrote 2 elements of weight, which has 4"):
        write_index(tmp_path, [Written([chunk], [])])
    with pytest.raises(CheckpointError, match="weight"):
        write_index(tmp_path, [Written([chunk], []), Written([chunk], [])])
    other = ("weight", torch.Size([5]), torch.float32, torch.Size([2]), half)
    with pytest.raises(CheckpointError, match=r"\(4,\) on one rank and \(5,\)"):
        write_index(tmp_path, [Written([chunk], []), Written([other], [])])


def test_load_named_lists_what_does_not_fit():
    layer = nn.Linear(2, 2)
    state = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    targets = dict(layer.named_parameters())
    before = layer.weight.clone()
    with pytest.raises(
        ResumeError, match=r"missing: bias; unexpected: extra; wrong shapes: weight \(3, 2\) instead of \(2, 2\)"
    ):
        load_named(targets, state)
    assert torch.equal(layer.weight, before)
    load_named(targets, {"module.weight": torch.ones(2, 2)}, strict=False)
    assert layer.weight.sum() == 4
    assign(layer.bias, torch.tensor([5.0, 6.0]))
    assert layer.bias.tolist() == [5, 6]
