"""Weights as safetensors: names, ties, casts, and files that are no such thing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from danling.backends.torch import TorchRunner
from danling.backends.torch.export import cast_floating, read_safetensors, write_safetensors
from danling.backends.torch.payload import EMA, MODEL, model_state, read_weights
from danling.backends.torch.snapshot import write_file
from danling.runners import CheckpointError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float), ("fp16", torch.half), ("BF16", torch.bfloat16), ("fp64", torch.double)]
)
def test_only_floating_tensors_are_cast(tmp_path, dtype, expected):
    model = Tied()
    path = tmp_path / "w.safetensors"
    write_safetensors(path, model_state(torch.compile(model, backend="eager")), dtype=dtype, metadata={"step": "3"})
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert json.loads(metadata["aliases"]) == {"head.weight": "embed.weight"} and metadata["step"] == "3"
    assert names == set(model.state_dict()) - {"head.weight"}
    state = read_safetensors(path)
    assert set(state) == set(model.state_dict())
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert state["norm.num_batches_tracked"].dtype == torch.int64 and state["mask"].dtype == torch.bool
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value.to(expected) if value.is_floating_point() else value)
    other = Tied()
    other.load_state_dict(state)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_an_average_is_exported_when_there_is_one(tmp_path):
    write_file(tmp_path / MODEL, {"w": torch.zeros(1)})
    write_file(tmp_path / EMA, {"w": torch.ones(1)})
    TorchRunner.export_checkpoint(tmp_path, tmp_path / "a.safetensors")
    TorchRunner.export_checkpoint(tmp_path, tmp_path / "b.safetensors", ema=False, dtype="fp16")
    assert read_weights(tmp_path / "a.safetensors")["w"].item() == 1
    plain = read_weights(tmp_path / "b.safetensors")["w"]
    assert plain.item() == 0 and plain.dtype == torch.float16


def test_parts_of_one_storage_are_tensors_of_their_own(tmp_path):
    base = torch.arange(6.0)
    write_safetensors(tmp_path / "w.safetensors", {"a": base[:3], "b": base[3:], "t": base.view(2, 3).t(), "all": base})
    state = read_safetensors(tmp_path / "w.safetensors")
    assert torch.equal(state["b"], base[3:]) and torch.equal(state["t"], base.view(2, 3).t()) and len(state) == 4


def test_tied_tensors_stay_tied_when_cast():
    weight = torch.ones(2)
    cast = cast_floating({"a": weight, "b": weight, "n": torch.tensor(1)}, "bf16")
    assert cast["a"] is cast["b"] and cast["n"].dtype == torch.int64


def test_an_unknown_dtype():
    with pytest.raises(ValueError, match="bf16.*got 'int8'"):
        cast_floating({}, "int8")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="dtype"):
        write_safetensors(path, {"a": torch.zeros(1)}, dtype="int8")
    with pytest.raises(TypeError):
        write_safetensors(path, {"a": torch.zeros(1)}, metadata={"a": 1})
    assert read_safetensors(path)["a"].item() == 1 and os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    if content.startswith(b"\x08"):
        assert read_safetensors(path) == {}
        return
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged or not a safetensors file"):
        read_safetensors(path)


def test_an_alias_of_nothing_and_a_missing_file(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, metadata=None)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"aliases": '{"b": "c"}'})
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none.safetensors")
