"""The torch backend's small services: precision, EMA, activation checkpointing, compile, fp8, inference, profiling."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danling.backends.torch.activation import apply_activation_checkpointing, matching_modules
from danling.backends.torch.compiling import compile_arguments, compile_model, load_artifacts, save_artifacts
from danling.backends.torch.ema import EMASchedule, build_ema, ema_module
from danling.backends.torch.fp8 import choose_backend, convert_to_fp8, fits
from danling.backends.torch.infer import count_samples, merge_in_order, split_output
from danling.backends.torch.precision import Precision
from danling.backends.torch.profiling import StepProfiler
from danling.runners.errors import ConfigError

CPU = torch.device("cpu")


# Precision


@pytest.mark.parametrize("name", ["bf16", "BF16", "bfloat16", "fp8"])
def test_bf16_autocast_covers_the_forward_only(name: str) -> None:
    precision = Precision.resolve(name, CPU)
    layer = nn.Linear(4, 4)
    with precision.autocast():
        output = layer(torch.ones(2, 4))
    assert output.dtype is torch.bfloat16
    assert layer.weight.dtype is torch.float32
    assert precision.scaler() is None


def test_full_precision_has_no_autocast() -> None:
    for name in (None, "fp32", "float32"):
        precision = Precision.resolve(name, CPU)
        with precision.autocast():
            assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype is torch.float32
            assert not torch.is_autocast_enabled("cpu")


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs an accelerator.*bf16"):
        Precision.resolve("half", CPU)
    assert Precision.resolve("fp16", torch.device("cuda")).dtype is torch.float16


def test_an_unknown_precision_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="int3.*bf16"):
        Precision.resolve("int3", CPU)


def test_fp8_names_its_library() -> None:
    assert Precision.resolve("fp8", CPU).fp8_backend == "any"
    assert Precision.resolve("fp8_te", CPU).fp8_backend == "te"
    assert Precision.resolve("bf16", CPU).fp8_backend is None


# EMA


@given(decay=st.floats(0.01, 0.99), values=st.lists(st.floats(-10, 10), min_size=1, max_size=10))
def test_the_average_follows_its_recurrence(decay: float, values: list[float]) -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = build_ema(layer, decay)
    expected = None
    for value in values:
        nn.init.constant_(layer.weight, value)
        ema.update_parameters(layer)
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert ema.module.weight.item() == pytest.approx(expected, abs=1e-9)
    assert not ema.module.weight.requires_grad


def test_buffers_are_copied_and_low_precision_weights_are_averaged_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    ema = build_ema(model, 0.999)
    ema.update_parameters(model)
    before = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 3
        model[1].num_batches_tracked += 7
    ema.update_parameters(model)
    assert ema.module[0].weight.dtype is torch.float32
    change = (ema.module[0].weight - before).abs().mean()
    assert change == pytest.approx(1e-3, rel=0.05)
    assert torch.equal(ema.module[1].running_mean.float(), model[1].running_mean.float())
    assert ema.module[1].num_batches_tracked.item() == 7


def test_the_schedule_takes_either_method_and_refuses_neither() -> None:
    calls = []
    owner = type("Average", (), {"update": lambda self, model: calls.append(model)})()
    schedule = EMASchedule(owner, interval=3, start_step=4)
    assert [step for step in range(1, 12) if schedule.after_update(None, step)] == [4, 7, 10]
    assert len(calls) == 3
    with pytest.raises(TypeError, match="update_parameters.*update"):
        EMASchedule(object())


def test_the_module_to_evaluate_with() -> None:
    layer = nn.Linear(1, 1)
    assert ema_module(build_ema(layer, 0.5)).weight.shape == layer.weight.shape
    assert ema_module(layer) is layer
    with pytest.raises(TypeError, match="Module"):
        ema_module(object())


# Activation checkpointing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return nn.functional.dropout(torch.tanh(self.linear(x)), 0.5, self.training) * scale


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


@pytest.mark.parametrize("impl", ["no_reentrant", "reentrant"])
@pytest.mark.parametrize("classes", [["Block"], None])
def test_checkpointing_changes_memory_only(impl: str, classes) -> None:
    torch.manual_seed(0)
    plain = Stack()
    model = copy.deepcopy(plain)
    names = apply_activation_checkpointing(model, classes, impl)
    assert names == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.blocks[0], Block)
    x = torch.randn(4, 8, requires_grad=True)
    results = []
    for net in (plain, model):
        torch.manual_seed(1)
        loss = net(x).square().sum()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert model.blocks[0].calls == 2 and plain.blocks[0].calls == 1
    with torch.no_grad():
        model(x)
    assert model.blocks[0].calls == 3


def test_a_copy_checkpoints_its_own_weights() -> None:
    model = Stack()
    apply_activation_checkpointing(model, ["Block"])
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.blocks[2].linear.weight)
    nn.init.zeros_(twin.blocks[2].linear.bias)
    x = torch.randn(2, 8)
    assert twin(x).abs().sum() == 0 and model.eval()(x).abs().sum() > 0
    assert apply_activation_checkpointing(model, ["Block"]) and type(model.blocks[0]).__mro__.count(Block) == 1


def test_classes_that_do_not_occur_are_named() -> None:
    with pytest.raises(ConfigError, match="Blok.*Block"):
        matching_modules(Stack(), ["Blok"])
    with pytest.raises(ConfigError, match="no transformer layer.*Linear"):
        matching_modules(nn.Sequential(nn.Linear(1, 1)), None)
    with pytest.raises(ConfigError, match="no_reentrant"):
        apply_activation_checkpointing(Stack(), ["Block"], "fast")


def test_transformer_layers_are_found_without_naming_them() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert [name for name, _ in matching_modules(encoder, None)] == ["layers.0", "layers.1"]


# Compile


def test_compiling_keeps_names_and_results() -> None:
    model = Block().eval()
    names, x = list(model.state_dict()), torch.randn(2, 8)
    expected = model(x)
    compiled = compile_model(model, {"backend": "eager", "fullgraph": True})
    assert compiled is model and list(model.state_dict()) == names
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    pickle.loads(pickle.dumps(model))


def test_mode_and_options_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="mode.*options"):
        compile_arguments({"mode": "default", "options": {"x": 1}})
    assert compile_arguments({"options": {}, "dynamic": False}) == {"dynamic": False}


def test_artifacts_without_a_folder_or_a_file(tmp_path) -> None:
    assert not load_artifacts(None)
    assert not load_artifacts(tmp_path)
    assert save_artifacts(None) is None


# fp8


def test_a_missing_fp8_library_names_the_install() -> None:
    with pytest.raises(ImportError, match="pip install torchao or pip install transformer-engine"):
        choose_backend("any")
    with pytest.raises(ImportError, match="transformer_engine"):
        convert_to_fp8(nn.Linear(16, 16), "te", logging.getLogger(__name__))
    assert not fits(nn.Linear(8, 16))


# Inference

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor([[1.0], [2.0]]), [1.0, 2.0]),
        (torch.tensor([1, 2]), [1, 2]),
        (["a", "b"], ["a", "b"]),
        ({"x": torch.tensor([1.0, 2.0]), "name": "n"}, [{"x": 1.0, "name": "n"}, {"x": 2.0, "name": "n"}]),
        (Pair(torch.tensor([1.0, 2.0]), ["u", "v"]), [Pair(1.0, "u"), Pair(2.0, "v")]),
        ((torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])), [(1.0, 3.0), (2.0, 4.0)]),
        (torch.tensor(5.0), [5.0]),
        (None, [None]),
        (torch.tensor([1.0, 2.0, 3.0]), None),
    ],
)
def test_outputs_are_split_by_sample(output, expected) -> None:
    entries = split_output(output, 2)
    if expected is None:
        assert len(entries) == 1 and torch.equal(entries[0], output)
    else:
        assert entries == expected


def test_rows_are_detached_host_copies() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    rows = split_output(logits * 1, 3)
    assert len(rows) == 3 and not rows[0].requires_grad
    assert rows[0].untyped_storage().nbytes() == 4 * 4


def test_a_ragged_batch_gives_its_elements() -> None:
    tensors = pytest.importorskip("danling.tensors")
    batch = tensors.NestedTensor([torch.ones(2, 3), torch.zeros(4, 3)])
    first, second = split_output({"h": batch}, 2)
    assert first["h"].shape == (2, 3) and second["h"].shape == (4, 3)


def test_samples_are_counted() -> None:
    assert count_samples((torch.zeros(4, 2), torch.zeros(4))) == 4
    assert count_samples({"meta": "abc", "x": [torch.zeros(2)]}) == 2
    assert count_samples("abc") is None


@given(indices=st.permutations(range(7)), cut=st.integers(0, 7), repeats=st.lists(st.integers(0, 6), max_size=3))
def test_shares_of_ranks_merge_in_dataset_order(indices, cut, repeats) -> None:
    pairs = [(i, i * i) for i in indices] + [(i, -1) for i in repeats]
    assert merge_in_order([pairs[:cut], pairs[cut:7], pairs[7:]]) == [i * i for i in range(7)]


# Profiling


def test_a_trace_per_cycle(tmp_path) -> None:
    settings = {"wait": 1, "warmup": 1, "active": 1, "repeat": 2, "trace_dir": "profiles"}
    settings |= dict.fromkeys(["record_shapes", "profile_memory", "with_stack", "with_flops"], False)
    profiler = StepProfiler(settings, tmp_path, "20260101-000000-000000", rank=3)
    for _ in range(7):
        torch.ones(8).sum()
        profiler.step()
    profiler.close()
    profiler.close()
    folder = tmp_path / "profiles" / "20260101-000000-000000"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-3.1.json", "rank-3.json"]
    assert json.loads((folder / "rank-3.json").read_text())["traceEvents"]
