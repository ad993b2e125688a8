"""What has no rule runs element by element: right, differentiable, said once, and forbidden under strict()."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from danling.tensors import NestedTensor, NestedTensorFallbackError, NestedTensorFallbackWarning, strict, supported_ops
from danling.tensors.ops import table


def batch():
    torch.manual_seed(0)
    return NestedTensor([torch.randn(n, 4) for n in (3, 2, 5)])


def test_an_unknown_op_runs_per_element_and_says_so_once():
    table._warned.discard("cov")
    x = NestedTensor([e.requires_grad_() for e in batch()])
    with pytest.warns(NestedTensorFallbackWarning, match="cov runs per element"):
        out = torch.cov(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.cov(x)
    assert isinstance(out, NestedTensor)
    for a, e in zip(out, x, strict=True):
        torch.testing.assert_close(a, torch.cov(e))
    assert out.requires_grad


def test_strict_is_nestable_local_and_a_decorator():
    x = batch()
    with strict():
        with strict():
            pass
        with pytest.raises(NestedTensorFallbackError, match="strict"):
            torch.cov(x)
        F.relu(x)

    @strict()
    def inside():
        return torch.cov(x)

    with pytest.raises(NestedTensorFallbackError):
        inside()
    assert not table._strict.get()


@pytest.mark.filterwarnings("ignore::danling.tensors.NestedTensorFallbackWarning")
def test_errors_and_results_of_the_fallback():
    x = batch()
    assert torch.renorm(x, 2, dim=1, maxnorm=0.5).ragged_dims == (0,)
    by_name = torch.renorm(x, 2, dim=1, maxnorm=0.5)
    for by_place in (torch.renorm(x, 2, 1, 0.5), x.renorm(2, -2, 0.5)):  # a dim is one of .shape, wherever it is given
        assert by_place.structure == by_name.structure
        torch.testing.assert_close(by_place.concat, by_name.concat)
        torch.testing.assert_close(by_place[0], torch.renorm(x[0], 2, 0, 0.5))
    with pytest.raises(ValueError, match="batch dim 0"):
        torch.renorm(x, 2, 0, 0.5)
    with pytest.raises(ValueError, match="batch size 3 and 2"):
        torch.block_diag(x, x[:2])
    with pytest.raises(ValueError, match="empty batch"):
        torch.cov(x[3:])


def test_supported_ops_is_sorted_and_true():
    rows = supported_ops()
    assert rows == sorted(rows) and len({name for name, _, _ in rows}) == len(rows) and len(rows) > 500
    assert {path for _, _, path in rows} <= set(table.PATHS)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout])
def test_dropout_draws_for_real_values_only(p, drop):
    x = NestedTensor([torch.ones(n, 4) for n in (3, 2, 5)])
    torch.manual_seed(1)
    out = drop(x, p)
    torch.manual_seed(1)
    torch.testing.assert_close(out.concat, drop(torch.ones(10, 4), p))
    assert drop(x, p, training=False).concat is x.concat or torch.equal(drop(x, p, False).concat, x.concat)


def test_dropout1d_drops_whole_channels():
    x = NestedTensor([torch.ones(8, n) for n in (3, 2, 5)], ragged_dims=1)
    out = F.dropout1d(x, 0.5)
    for e in out:
        assert all(row.eq(0).all() or row.eq(2).all() for row in e)
    assert {float(v) for v in out.concat.unique()} == {0.0, 2.0}


HEADS = [torch.randn(4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 5)]


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_with_grouped_heads(causal):
    q = NestedTensor(HEADS, ragged_dims=1)
    keys = [torch.randn(2, n, 8) for n in (2, 4, 6)]
    k = NestedTensor(keys, ragged_dims=1)
    out = F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)
    assert out.structure == q.structure
    for o, a, b in zip(out, HEADS, keys, strict=True):
        wide = b.repeat_interleave(2, 0)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(a, wide, wide, is_causal=causal))


def test_attention_masks_read_real_positions():
    q = NestedTensor(HEADS, ragged_dims=1)
    bias = torch.randn(3, 1, 5, 5)
    hole = bias.clone()
    for i, e in enumerate(HEADS):
        hole[i, :, e.shape[1] :] = hole[i, :, :, e.shape[1] :] = float("nan")
    nested = NestedTensor([bias[i, 0, : e.shape[1], : e.shape[1]] for i, e in enumerate(HEADS)], ragged_dims=(0, 1))
    expected = [
        F.scaled_dot_product_attention(e, e, e, attn_mask=bias[i, :, : e.shape[1], : e.shape[1]])
        for i, e in enumerate(HEADS)
    ]
    for mask in (bias, hole, nested):
        for o, e in zip(F.scaled_dot_product_attention(q, q, q, attn_mask=mask), expected, strict=True):
            torch.testing.assert_close(o, e)


def test_dense_operands_count_as_equal_lengths():
    q = torch.randn(3, 4, 6, 8)
    k = NestedTensor(HEADS, ragged_dims=1)
    out = F.scaled_dot_product_attention(q, k, k)
    assert type(out) is torch.Tensor
    for i, e in enumerate(HEADS):
        torch.testing.assert_close(out[i], F.scaled_dot_product_attention(q[i], e, e))


def test_attention_refuses_what_does_not_fit():
    q = NestedTensor(HEADS, ragged_dims=1)
    with pytest.raises(ValueError, match="same lengths"):
        F.scaled_dot_product_attention(q, q, q[:, :, :1])
    with pytest.raises(ValueError, match="batch size"):
        F.scaled_dot_product_attention(q, q[:2], q[:2])
    with pytest.raises(ValueError, match="does not broadcast"):
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(4, 4))
