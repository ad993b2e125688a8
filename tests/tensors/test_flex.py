"""Flex attention over ragged sequences against torch's own, element by element."""

import math
import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from danling.tensors import NestedTensor, create_block_mask, flex_attention, strict

LENGTHS = [5, 5, 1, 9, 3]
HEADS, DIM = 4, 8


def operand(seed, heads=HEADS, lengths=LENGTHS, dim=DIM, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return NestedTensor(
        *[torch.randn(heads, n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in lengths],
        ragged_dims=(1,),
    )


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q - k).abs() <= 2


def by_head(b, h, q, k):
    return (q >= k) | (h % 2 == 0)


def by_element(b, h, q, k):
    return (k <= q) | (b == 3)


def nothing_first(b, h, q, k):
    return (k <= q) & (q > 0)


def alibi(score, b, h, q, k):
    return score - (h + 1) * 0.1 * (q - k).abs()


def by_batch(score, b, h, q, k):
    return score * (1 + 0.5 * b)


def soft_cap(score, b, h, q, k):
    return 3.0 * torch.tanh(score / 3.0)


def masked_by_score(score, b, h, q, k):
    return torch.where(q >= k, score, -math.inf)


def reference(q, k, v, score_mod=None, mask_mod=None, scale=None, enable_gqa=False):
    """torch's unfused flex attention on each element, with `b` set to the element."""
    outs, sums = [], []
    for i, (x, y, z) in enumerate(zip(q.unbind(), k.unbind(), v.unbind(), strict=True)):
        mod = None if score_mod is None else (lambda s, b, h, r, c, i=i: score_mod(s, b + i, h, r, c))
        mask = None
        if mask_mod is not None:
            mask = torch_flex.create_block_mask(
                lambda b, h, r, c, i=i: mask_mod(b + i, h, r, c), 1, HEADS, x.shape[-2], y.shape[-2], device="cpu"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that its flex attention is slow without torch.compile
            out, lse = torch_flex.flex_attention(
                x[None], y[None], z[None], mod, mask, scale, enable_gqa, return_lse=True
            )
        outs.append(out[0])
        sums.append(lse[0])
    return outs, sums


MASKS = [None, causal, window, by_head, by_element, nothing_first]
SCORES = [None, alibi, by_batch, soft_cap, masked_by_score]


@pytest.mark.parametrize(
    ("score_mod", "mask_mod"), [*[(alibi, mask) for mask in MASKS], *[(score, causal) for score in SCORES]]
)
def test_matches_torch_on_each_element(score_mod, mask_mod):
    q, k, v = operand(1), operand(2), operand(3, dim=6)
    mask = None
    if mask_mod is not None:
        mask = create_block_mask(mask_mod, q, H=HEADS if mask_mod is by_head else None, BLOCK_SIZE=2)
    with strict():
        out, lse = flex_attention(q, k, v, score_mod, mask, return_lse=True)
    assert out.structure == v.structure and lse[3].shape == (HEADS, 9)
    want, sums = reference(q.detach(), k, v, score_mod, mask_mod)
    for i in range(len(LENGTHS)):
        torch.testing.assert_close(out[i], want[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse[i], sums[i].to(lse.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask_mod", [None, window, nothing_first])
def test_gradients_reach_operands_and_captured_tensors(mask_mod):
    q, k, v = (operand(seed).requires_grad_() for seed in (1, 2, 3))
    bias = torch.randn(20, dtype=torch.float64, requires_grad=True)
    mask = None if mask_mod is None else create_block_mask(mask_mod, q, BLOCK_SIZE=2)
    out = flex_attention(q, k, v, lambda s, b, h, r, c: s + bias[r - c + 10], mask)
    weight = torch.linspace(-1, 1, out.concat.numel(), dtype=torch.float64).view_as(out.concat)
    got = torch.autograd.grad((out.concat * weight).sum(), [q, k, v, bias])

    parts = []
    for i, n in enumerate(LENGTHS):
        r, c = torch.arange(n)[:, None], torch.arange(n)[None]
        scores = q[i] @ k[i].mT / math.sqrt(DIM) + bias[r - c + 10]
        if mask_mod is not None:
            allowed = mask_mod(i, 0, r, c).expand(n, n)
            scores = scores.masked_fill(~allowed, -1e300)
            weights = scores.softmax(-1) * allowed.any(-1, keepdim=True)
        else:
            weights = scores.softmax(-1)
        parts.append((weights @ v[i]).movedim(0, 1))
    want = torch.autograd.grad((torch.cat(parts) * weight.view(sum(LENGTHS), HEADS, DIM)).sum(), [q, k, v, bias])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(getattr(a, "concat", a), getattr(b, "concat", b))
        assert not getattr(a, "concat", a).isnan().any()


def test_cross_attention_grouped_heads_scale_and_half():
    q, k, v = operand(1), operand(2, 2, [3, 1, 4, 4, 7]), operand(3, 2, [3, 1, 4, 4, 7])
    mask = create_block_mask(window, q, k, BLOCK_SIZE=(4, 2))
    got = flex_attention(q, k, v, alibi, mask, scale=0.3, enable_gqa=True)
    want, _ = reference(q, k, v, alibi, window, scale=0.3, enable_gqa=True)
    for i in range(5):
        torch.testing.assert_close(got[i], want[i], rtol=1e-9, atol=1e-9)
    half = flex_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), alibi, mask, scale=0.3, enable_gqa=True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double().concat, got.concat, rtol=0.05, atol=0.05)


def test_dense_operands_count_as_equal_lengths():
    torch.manual_seed(0)
    dense = torch.randn(2, HEADS, 6, DIM)
    nested = NestedTensor(*dense, ragged_dims=(1,))
    mask = create_block_mask(causal, dense)
    out, lse = flex_attention(dense, dense, dense, None, mask, return_lse=True)
    assert type(out) is torch.Tensor and out.shape == dense.shape and lse.shape == (2, HEADS, 6)
    want = torch.nn.functional.scaled_dot_product_attention(dense, dense, dense, is_causal=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(flex_attention(nested, nested, nested, None, mask).tensor, want)


def test_long_sequences_run_in_blocks():
    q = operand(1, 1, [2500, 3, 1100], dtype=torch.float32)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    plain = flex_attention(q, q, q, masked_by_score)
    skipped = flex_attention(q, q, q, None, create_block_mask(causal, q))
    torch.testing.assert_close(plain.concat, want.concat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(skipped.concat, want.concat, rtol=1e-4, atol=1e-5)


def test_block_mask_counts_what_it_skips():
    q = operand(1, 1, [256, 128], dtype=torch.float32)
    assert create_block_mask(causal, q, BLOCK_SIZE=64).sparsity() == pytest.approx(35.0)  # 13 of 20 blocks are seen
    assert create_block_mask(lambda b, h, q, k: q < 0, q).sparsity() == 100.0
    everything = create_block_mask(lambda b, h, q, k: q >= 0, q)
    assert everything.sparsity() == 0.0
    assert not any(masked for *_, masked in everything.spans([0]))  # full blocks are not asked again


def test_empty_elements_and_batches():
    q, k = operand(1, lengths=[2, 0, 3]), operand(2, lengths=[0, 2, 3])
    out, lse = flex_attention(q, k, k, None, create_block_mask(causal, q, k), return_lse=True)
    assert [tuple(x.shape) for x in out.unbind()] == [(HEADS, n, DIM) for n in (2, 0, 3)]
    assert torch.equal(out[0], torch.zeros(HEADS, 2, DIM, dtype=torch.float64)) and (lse[0] == -math.inf).all()
    nothing = operand(1, lengths=[0, 0])
    assert flex_attention(nothing, nothing, nothing).concat.shape == (0, HEADS, DIM)


def test_errors_say_what_differs():
    q, other = operand(1), operand(2, lengths=[5, 5, 1, 9, 4])
    with pytest.raises(ValueError, match=r"made for query lengths \[5, 5, 1, 9, 3\], got \[5, 5, 1, 9, 4\]"):
        flex_attention(other, other, other, block_mask=create_block_mask(causal, q))
    with pytest.raises(ValueError, match="made for 2 heads, query has 4"):
        flex_attention(q, q, q, block_mask=create_block_mask(causal, q, H=2))
    with pytest.raises(TypeError, match=r"danling\.tensors\.create_block_mask, got BlockMask"):
        torch_mask = torch_flex.create_block_mask(causal, 1, 1, 8, 8, device="cpu")
        flex_attention(q, q, q, block_mask=torch_mask)
    with pytest.raises(ValueError, match="query has 4 heads and key 2"):
        flex_attention(q, operand(2, 2), operand(3, 2))
    with pytest.raises(ValueError, match="query has 4 heads and key 3"):
        flex_attention(q, operand(2, 3), operand(3, 3), enable_gqa=True)
    with pytest.raises(ValueError, match="key and value must have the same lengths"):
        flex_attention(q, q, other)
    with pytest.raises(ValueError, match=r"elements \(H, L, D\), got 2"):
        flex_attention(operand(1, 1).squeeze(1), q, q)
    with pytest.raises(TypeError, match=r"mask_mod must give bools, got torch\.int64"):
        create_block_mask(lambda b, h, q, k: q - k, q)
    with pytest.raises(ValueError, match="BLOCK_SIZE must be positive, got 0"):
        create_block_mask(causal, q, BLOCK_SIZE=0)
