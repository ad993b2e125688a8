"""State captured, written and read back: exact, tied, by name, and without running code."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from danling.backends.torch.payload import (
    EMA,
    MODEL,
    OPTIMIZER,
    clean_name,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    rank_file,
    read_payload,
    read_weights,
    strip_prefixes,
    unwrap,
)
from danling.backends.torch.snapshot import HostBuffers, TorchSnapshot, map_state, read_file, restore_arrays, write_file
from danling.runners import CheckpointError, CheckpointStore, ResumeError


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(
                left.cpu().contiguous().view(-1).view(torch.uint8), right.cpu().contiguous().view(-1).view(torch.uint8)
            )
        )
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and left.keys() == right.keys() and all(same(v, right[k]) for k, v in left.items())
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def round_trip(state, tmp_path):
    write_file(tmp_path / "x.pt", HostBuffers().copy(state))
    return read_file(tmp_path / "x.pt")


# -------------------------------------------------------------------- capture


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    values = (torch.randn(3, 5) * 3).to(dtype)
    state = {
        "matrix": values,
        "turned": values.t(),
        "scalar": values[0, 0],
        "empty": values[:0],
        "part": values[1:, ::2],
    }
    assert same(round_trip(state, tmp_path), state)


def test_everything_plain_comes_back(tmp_path):
    state = {
        "numbers": [1, -0.0, float("inf"), 1j, True, None, 2**80],
        "text": "ä",
        "bytes": b"\0\1",
        "tuple": (1, ("a",)),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "set": {1, 2},
        3: "integer key",
        ("a", 1): "tuple key",
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "arrays": (np.float32([1.5]), [np.array(True)]),
        "milestones": Counter({3: 1}),
    }
    back = round_trip(state, tmp_path)
    assert same(back, state)
    assert isinstance(back["milestones"], Counter)


def test_python_and_numpy_scalars_lose_their_subclass(tmp_path):
    class Text(str):
        pass

    back = round_trip({"a": np.float64(0.1), "b": np.int32(3), "c": Text("x"), "d": OrderedDict(z=1)}, tmp_path)
    assert back == {"a": 0.1, "b": 3, "c": "x", "d": {"z": 1}} and type(back["d"]) is dict and type(back["c"]) is str


@pytest.mark.parametrize("value", [object(), lambda: 0, Path("x"), np.array(["text"]), nn.Linear(1, 1), range(3)])
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(value):
    with pytest.raises(TypeError, match=r"/scheduler/last/1 is a .*state_dict\(\) return"):
        HostBuffers().copy({"scheduler": {"last": [0, value]}})


def test_copies_do_not_change_with_live_state_and_reuse_their_memory():
    model = nn.Linear(4, 4)
    buffers = HostBuffers()
    first = buffers.copy(model_state(model))
    kept = first["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(first["weight"], kept)
    second = buffers.copy(model_state(model))
    assert second["weight"].data_ptr() == first["weight"].data_ptr() and not second["weight"].any()
    assert not second["weight"].requires_grad
    wider = buffers.copy({"weight": torch.ones(9), "bias": torch.ones(4)})
    assert torch.equal(wider["weight"], torch.ones(9)) and wider["bias"].data_ptr() == first["bias"].data_ptr()


def test_a_layout_in_memory_survives():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    buffers = HostBuffers()
    for _ in range(2):
        copy = buffers.copy({"x": image})["x"]
        assert torch.equal(copy, image) and copy.is_contiguous(memory_format=torch.channels_last)
    turned = buffers.copy({"x": image.contiguous()})["x"]
    assert torch.equal(turned, image) and turned.is_contiguous()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    state = HostBuffers().copy(model_state(Tied()))
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    write_file(tmp_path / "x.pt", state)
    back = read_file(tmp_path / "x.pt")
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert (tmp_path / "x.pt").stat().st_size < 3000


def test_an_asynchronous_save_holds_the_weights_of_the_step_it_names(tmp_path):
    model = nn.Linear(64, 64)
    buffers = HostBuffers()
    store = CheckpointStore(tmp_path)
    expected = {}
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        snapshot = TorchSnapshot({MODEL: model_state(model), rank_file(0): {"step": step}}, buffers)
        store.save(f"step-{step}", snapshot, {"kind": "full", "global_step": step})
        expected[step] = float(step)
        with torch.no_grad():
            model.weight.fill_(-1.0)  # while the writer is at work
    assert store.close() and store.health["saves"] == 5
    for step, value in expected.items():
        weight = read_weights(tmp_path / f"step-{step}")["weight"]
        assert torch.equal(weight, torch.full((64, 64), value))
        assert read_payload(tmp_path / f"step-{step}")["step"] == step


def test_live_state_can_be_written_without_a_copy(tmp_path):
    model = nn.Linear(2, 2)
    snapshot = TorchSnapshot({MODEL: model_state(model)})
    snapshot.capture()
    assert snapshot.write(tmp_path) == [MODEL]
    assert same(read_file(tmp_path / MODEL), dict(model.state_dict()))


# ---------------------------------------------------------------------- names


def test_names_of_wrappers_do_not_reach_the_file():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    plain = dict(model.state_dict())
    model[1] = torch.compile(model[1], backend="eager")
    assert set(model_state(torch.compile(model, backend="eager"))) == set(plain)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert unwrap(averaged) is averaged.module and set(model_state(averaged)) == set(plain)
    load_model_state(torch.compile(model, backend="eager"), {name: torch.ones_like(plain[name]) for name in plain})
    assert all(bool((value == 1).all()) for value in plain.values())
    assert same(model_state(model), plain)  # the tensors in `plain` are those of the model


def test_prefixes_are_stripped_unless_the_module_has_them():
    assert strip_prefixes({"module.a": 1, "_orig_mod.b._orig_mod.c": 2}) == {"a": 1, "b.c": 2}
    assert clean_name("module.module.a") == "module.a"

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(1, 1)

    odd = Odd()
    load_model_state(odd, {"module.weight": torch.ones(1, 1), "module.bias": torch.zeros(1)})
    assert odd.module.weight.item() == 1
    load_model_state(odd, {"module.module.weight": torch.zeros(1, 1), "module.module.bias": torch.zeros(1)})
    assert odd.module.weight.item() == 0


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {**before, "0.weight": torch.zeros(5, 2), "9.weight": torch.zeros(1)}
    state = {name: torch.zeros_like(value) for name, value in state.items() if name != "1.bias"}
    with pytest.raises(ResumeError) as caught:
        load_model_state(model, state)
    message = str(caught.value)
    assert "missing: 1.bias" in message and "unexpected: 9.weight" in message
    assert "wrong shapes: 0.weight (5, 2) instead of (3, 2)" in message
    assert same(dict(model.state_dict()), before)
    with pytest.raises(CheckpointError, match="w.safetensors do not fit the model; wrong shapes"):
        load_model_state(model, state, strict=False, error=CheckpointError, source="w.safetensors")
    del state["0.weight"]
    load_model_state(model, state, strict=False)
    assert not model[1].weight.any() and torch.equal(model[0].weight, before["0.weight"])
    load_model_state(model, before, skip=["1.weight"])
    assert not model[1].weight.any()


def test_many_names_are_cut_short():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(ResumeError, match=r"missing: 0\.weight, .* and 12 more"):
        load_model_state(model, {})


# ------------------------------------------------------------------ optimizer


def make(order=("a", "b", "c"), groups=True, cls=torch.optim.AdamW):
    parameters = {name: nn.Parameter(torch.full((2,), float(ord(name)))) for name in order}
    first, rest = parameters["a"], [value for name, value in parameters.items() if name != "a"]
    if groups:
        return parameters, cls([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)
    return parameters, cls([first, *rest], lr=0.1)


def update(parameters, optimizer):
    for name, value in parameters.items():
        value.grad = torch.full_like(value, ord(name) / 7.0)
    optimizer.step()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizer_state_goes_by_name(tmp_path, cls):
    parameters, optimizer = make(cls=cls)
    for _ in range(3):
        update(parameters, optimizer)
    optimizer.param_groups[1]["lr"] = 0.025
    state = round_trip(optimizer_state(optimizer, parameters.items()), tmp_path)
    assert [group["params"] for group in state["param_groups"]] == [["a"], ["b", "c"]]
    other, restored = make(order=("c", "b", "a"), cls=cls)
    for name, value in other.items():
        value.data.copy_(parameters[name])
    load_optimizer_state(restored, state, other.items())
    assert restored.param_groups[1]["lr"] == 0.025 and restored.param_groups[0]["lr"] == 0.5
    for _ in range(2):
        update(parameters, optimizer)
        update(other, restored)
    assert all(torch.equal(parameters[name], other[name]) for name in parameters)


def test_optimizer_state_that_does_not_fit():
    parameters, optimizer = make()
    update(parameters, optimizer)
    state = optimizer_state(optimizer, parameters.items())
    other, fewer = make(order=("a", "b"))
    with pytest.raises(ResumeError, match="missing: nothing; unexpected: c.*exclude_from_loading"):
        load_optimizer_state(fewer, state, other.items())
    same_names, regrouped = make(groups=False)
    with pytest.raises(ResumeError, match="split into 2 groups there and into 1 here"):
        load_optimizer_state(regrouped, state, same_names.items())
    fresh, partly = make()
    load_optimizer_state(partly, state, fresh.items(), skip=["b"])
    assert set(partly.state) == {fresh["a"], fresh["c"]}


def test_an_optimizer_over_foreign_parameters():
    parameters, optimizer = make()
    with pytest.raises(ValueError, match=r"shape \(2,\) that is not part of the model"):
        optimizer_state(optimizer, [("a", parameters["a"])])


# ----------------------------------------------------------------- bad files


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [MODEL, EMA, OPTIMIZER, rank_file(0)])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, name):
    checkpoint = tmp_path / "epoch-1"
    (checkpoint / "ranks").mkdir(parents=True)
    torch.save({"weight": Evil(tmp_path / "owned")}, checkpoint / name)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*runs no code from a file"):
        read_payload(checkpoint)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_plain_pickle_is_refused(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps({"weight": Evil(tmp_path / "owned")}))
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not (tmp_path / "owned").exists()


def test_a_whole_module_is_refused_with_the_class_named(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*save a state_dict"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        read_file(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.pt")


def test_a_truncated_file_is_named(tmp_path):
    write_file(tmp_path / "w.pt", {"w": torch.randn(1000)})
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[:-200])
    with pytest.raises(CheckpointError, match=r"w\.pt is damaged"):
        read_file(tmp_path / "w.pt")


# ---------------------------------------------------------------- weight files


@pytest.mark.parametrize("nest", [None, "model", "module", "state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dict_files(tmp_path, nest, suffix):
    state = {"module.weight": torch.ones(2)}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / f"w{suffix}")
    assert same(read_weights(tmp_path / f"w{suffix}"), {"weight": torch.ones(2)})


def test_what_holds_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pt"):
        read_weights(tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match="holds no model.pt"):
        read_weights(tmp_path)


def test_the_average_is_preferred(tmp_path):
    write_file(tmp_path / MODEL, {"w": torch.zeros(1)})
    write_file(tmp_path / EMA, {"w": torch.ones(1)})
    assert read_weights(tmp_path)["w"].item() == 1 and read_weights(tmp_path, ema=False)["w"].item() == 0


# ------------------------------------------------------------------ full disk


def test_a_full_disk_is_an_os_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError) as caught:
            write_file(disk / "w.pt", {"w": torch.zeros(1_000_000)})
        assert caught.value.errno == errno.ENOSPC
        store = CheckpointStore(disk / "checkpoints", asynchronous=False)
        small, large = {MODEL: {"w": torch.zeros(10_000)}}, {MODEL: {"w": torch.zeros(1_000_000)}}
        (disk / "w.pt").unlink()
        store.save("step-1", TorchSnapshot(small), {"kind": "full", "global_step": 1}, final=True)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save("step-2", TorchSnapshot(large), {"kind": "full", "global_step": 2}, final=True)
        assert store.newest() == disk / "checkpoints" / "step-1"
        assert not list((disk / "checkpoints").glob(".tmp-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_arrays_are_found_in_every_container():
    tree = {"a": [np.arange(2), (np.zeros(1),)], "b": {"c": {"d": np.ones((1, 1))}}}
    assert same(restore_arrays(map_state(tree, lambda tensor, path: tensor)), tree)
