"""Batches declared to have no ragged dim: what works inside the elements gives such batches again."""

import pytest
import torch
import torch.nn.functional as F

from danling.tensors import NestedTensor

W = torch.linspace(-1, 1, 12).view(3, 4)
CALLS = {
    "matmul": lambda x: x @ W,
    "matmul of two": lambda x: x @ x.mT,
    "einsum": lambda x: torch.einsum("...ld,de->...le", x, W),
    "einsum of two": lambda x: torch.einsum("...ld,...md->...lm", x, x),
    "tensordot": lambda x: torch.tensordot(x, W, 1),
    "kron": lambda x: torch.kron(x, torch.eye(2)),
    "cdist": lambda x: torch.cdist(x, x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "conv1d": lambda x: F.conv1d(x, torch.ones(4, 2, 1)),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
    "fft": lambda x: torch.fft.rfft(x, n=4),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(-1),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_stay_batches(name):
    torch.manual_seed(0)
    x = NestedTensor([torch.randn(2, 3), torch.randn(2, 3)], ragged_dims=())
    out = CALLS[name](x)
    assert isinstance(out, NestedTensor) and out.ragged_dims == ()
    for actual, element in zip(out, x, strict=True):
        torch.testing.assert_close(actual, CALLS[name](element))


def test_the_batch_goes_where_an_equation_puts_it():
    x = NestedTensor([torch.randn(2, 3), torch.randn(2, 3)], ragged_dims=())
    dense = x.tensor
    torch.testing.assert_close(torch.einsum("bld,de->le", x, W), torch.einsum("bld,de->le", dense, W))
    second = torch.einsum("bld,de->lbe", x, W)
    torch.testing.assert_close(second.tensor, torch.einsum("bld,de->lbe", dense, W))
