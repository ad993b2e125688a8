"""Shapes and dtypes without data: the meta device and FakeTensorMode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from danling.tensors import NestedTensor

CALLS = {
    "padded": lambda x: x.tensor,
    "mask": lambda x: x.mask,
    "pointwise": lambda x: torch.relu(x) + 1,
    "cast": lambda x: x.to(torch.float64),
    "linear": lambda x: F.linear(x, x.new_empty(6, 4)),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "sum": lambda x: x.sum(1),
    "mean over everything": lambda x: x.mean(),
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "split": lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2),
    "cat": lambda x: torch.cat([x, x], -1),
    "loss": lambda x: F.mse_loss(x, x * 2),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.unflatten(-1, (2, 2)).transpose(1, 2)] * 3),
    "image": lambda x: NestedTensor([t.new_empty(2, n, 3) for t, n in ((x.concat, 4), (x.concat, 6))], ragged_dims=1),
}


def batch(device="cpu"):
    return NestedTensor([torch.ones(3, 4, device=device), torch.ones(5, 4, device=device)])


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_shapes_of_real_ones(name):
    expected = CALLS[name](batch())
    with FakeTensorMode():
        out = CALLS[name](batch())
    assert type(out) in (FakeTensor, NestedTensor)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert out.device == expected.device
    if isinstance(expected, NestedTensor):
        assert out.ragged_dims == expected.ragged_dims
        assert out.concat.shape == expected.concat.shape


@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention"])
def test_meta_results_have_the_shapes_of_real_ones(name):
    expected = CALLS[name](batch())
    out = CALLS[name](batch("meta"))
    assert out.device.type == "meta"
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype


def test_a_real_batch_becomes_a_fake_one_and_stays_real():
    x = batch()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert (fake * 2).tensor.shape == x.shape
    assert isinstance(fake.concat, FakeTensor)
    assert x.sum(1).eq(torch.tensor([[3.0], [5.0]])).all()
    assert type(x.structure.offsets) is torch.Tensor


def test_gradients_are_fake_too():
    with FakeTensorMode():
        module = nn.Linear(4, 2)
        x = NestedTensor([torch.ones(3, 4), torch.ones(5, 4)], requires_grad=True)
        module(x).sum().backward()
        assert module.weight.grad.shape == (2, 4)
        assert x.grad.shape == x.shape


def test_what_needs_real_lengths_says_so():
    with FakeTensorMode():
        x = batch()
        for call, name in (
            (lambda: x.unbind(), "unbind"),
            (lambda: x[:, 1:], "getitem"),
            (lambda: x.roll(1, 1), "roll"),
        ):
            with pytest.raises(DataDependentOutputException, match=name):
                call()
