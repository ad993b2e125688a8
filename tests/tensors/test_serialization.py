"""Pickle, torch.save, copies, shared memory; what is broken is refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from danling.tensors import NestedTensor
from danling.tensors.serialization import VERSION, rebuild


def batches() -> dict[str, NestedTensor]:
    return {
        "sequences": NestedTensor([torch.randn(3, 4), torch.randn(1, 4)], padding_value=-1, mask_value=True),
        "channel_first": NestedTensor([torch.randn(2, 5)], ragged_dims=1),
        "two_ragged": NestedTensor([torch.randn(2, 3), torch.randn(4, 1)], batch_first=False),
        "scalars": NestedTensor([1, 2, 3]),
        "static": NestedTensor([torch.randn(2), torch.randn(2)], ragged_dims=()),
        "empty": NestedTensor([]),
        "empty_element": NestedTensor([torch.randn(0, 2), torch.randn(2, 2)], dtype=torch.bfloat16),
    }


NAMES = list(batches())


def assert_same(a: NestedTensor, b: NestedTensor) -> None:
    assert type(a) is NestedTensor
    assert a.structure == b.structure and a.dtype == b.dtype
    assert torch.equal(a.concat, b.concat)
    assert (a.padding_value, a.mask_value, a.requires_grad) == (b.padding_value, b.mask_value, b.requires_grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_round_trips(name: str, grad: bool) -> None:
    x = batches()[name]
    if grad:
        if not x.dtype.is_floating_point:
            pytest.skip("integers have no gradient")
        x.requires_grad_()
    assert_same(pickle.loads(pickle.dumps(x)), x)
    assert_same(copy.deepcopy(x), x)
    buffer = io.BytesIO()
    torch.save({"x": x, "list": [x]}, buffer)
    for weights_only in (True, False):
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=weights_only, map_location="cpu")
        assert_same(loaded["x"], x)
        assert loaded["x"].concat.data_ptr() == loaded["list"][0].concat.data_ptr() or x.numel() == 0


def test_a_fresh_process_reads_it(tmp_path) -> None:
    torch.save(batches()["sequences"], tmp_path / "x.pt")
    code = f"""
import torch, danling.tensors
x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
print(x.shape, x.padding_value, x.mask_value)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "torch.Size([2, 3, 4]) -1 True"


class Holder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(NestedTensor([torch.randn(2), torch.randn(3)]))
        self.register_buffer("steps", NestedTensor([1, 2], [3]))


def test_parameters_and_modules() -> None:
    a, b = Holder(0), Holder(1)
    assert isinstance(a.weight, nn.Parameter) and a.weight.requires_grad
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(a.weight.concat, b.weight.concat)
    for twin in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert isinstance(twin.weight, nn.Parameter) and torch.equal(twin.weight.concat, a.weight.concat)
        assert twin.weight.concat.data_ptr() != a.weight.concat.data_ptr()


def test_copies_share_or_do_not() -> None:
    x = batches()["sequences"].requires_grad_()
    assert copy.copy(x).concat.data_ptr() == x.concat.data_ptr()
    memo: dict = {}
    y = copy.deepcopy(x, memo)
    assert copy.deepcopy(x, memo) is y and y.concat.data_ptr() != x.concat.data_ptr()
    x.sum().backward()
    z = copy.deepcopy(x)
    assert torch.equal(z.grad.concat, x.grad.concat) and z.grad.concat.data_ptr() != x.grad.concat.data_ptr()
    with pytest.raises(RuntimeError, match="leaves"):
        copy.deepcopy(x * 2)


def test_shared_memory_is_passed_without_a_copy() -> None:
    x = batches()["sequences"]
    assert not x.is_shared()
    assert x.share_memory_() is x and x.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=_add_one, args=(there, back))
    process.start()
    there.put(x)
    assert back.get() == "done"
    process.join(30)
    assert process.exitcode == 0
    assert (x.concat == 1).all()


def _add_one(there, back) -> None:
    x = there.get()
    x.concat.fill_(1.0)
    back.put("done")


def state() -> list:
    return list(batches()["sequences"].__reduce_ex__(2)[1])


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, VERSION + 1, "version"),
        (0, "x", "version"),
        (1, torch.zeros(3, 4), "3"),
        (1, "values", "tensors"),
        (2, torch.zeros(2, 1), "int64"),
        (2, torch.tensor([[5], [-1]]), "negative"),
        (2, torch.zeros(2, 2, dtype=torch.int64), "columns"),
        (3, (1, 0), "ascending|columns"),
        (3, (7,), "ragged_dims"),
        (4, (-4,), "static_sizes"),
        (5, 1, "batch_first"),
        (6, "zero", "padding_value"),
    ],
)
def test_a_broken_state_is_refused(position: int, value, words: str) -> None:
    parts = state()
    parts[position] = value
    with pytest.raises(ValueError, match=words):
        rebuild(*parts)


def test_a_short_state_is_refused() -> None:
    with pytest.raises(ValueError, match="parts"):
        rebuild(*state()[:-2])
