"""nn.MultiheadAttention and the transformer modules equal their padded runs with masks, in outputs and gradients."""

import copy

import pytest
import torch
import torch.nn as nn

from danling.tensors import NestedTensor, strict

LENGTHS = {"mixed": [5, 2, 7], "single": [6], "equal_heads": [4, 4, 4], "with_one": [1, 3]}


def elements(lengths, width=16):
    torch.manual_seed(1)
    return [torch.randn(n, width) for n in lengths]


def compare(module, padded_call, nested_call, parts):
    """Run both ways and compare outputs, parameter gradients and input gradients at real positions."""
    twin = copy.deepcopy(module)
    mine = [e.clone().requires_grad_() for e in parts]
    theirs = [e.clone().requires_grad_() for e in parts]
    x, reference = NestedTensor(mine), NestedTensor(theirs)
    with strict():
        out = nested_call(module, x)
    expected = padded_call(twin, reference.tensor, ~reference.mask)
    torch.manual_seed(2)
    weights = [torch.randn_like(o) for o in out]
    for i, part in enumerate(parts):
        torch.testing.assert_close(out[i], expected[i, : len(part)], rtol=1e-4, atol=1e-5)
    sum((o * w).sum() for o, w in zip(out, weights, strict=True)).backward()
    sum((expected[i, : len(p)] * weights[i]).sum() for i, p in enumerate(parts)).backward()
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def additive(mask):
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, float("-inf"))


def encoder(norm_first=False, activation="relu"):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation=activation, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("train", [True, False])
def test_encoder(lengths, train):
    compare(encoder().train(train), lambda m, p, k: m(p, src_key_padding_mask=k), lambda m, x: m(x), elements(lengths))


@pytest.mark.parametrize(("norm_first", "activation"), [(True, "relu"), (False, "gelu"), (True, "gelu")])
def test_encoder_variants(norm_first, activation):
    module = encoder(norm_first, activation)
    compare(module, lambda m, p, k: m(p, src_key_padding_mask=k), lambda m, x: m(x), elements([5, 2, 7]))


@pytest.mark.parametrize("hint", [True, None])
def test_causal_encoder(hint):
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    compare(
        encoder(),
        lambda m, p, k: m(p, mask=mask, src_key_padding_mask=additive(k)),
        lambda m, x: m(x, mask=mask, is_causal=hint),
        elements([5, 2, 7]),
    )


def test_key_padding_mask_hides_further_keys():
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[:, 1] = True
    compare(
        encoder(),
        lambda m, p, k: m(p, src_key_padding_mask=k | hidden),
        lambda m, x: m(x, src_key_padding_mask=hidden),
        elements([5, 2, 7]),
    )


def test_encoder_with_its_own_nested_fast_path_enabled():
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).eval()
    x = NestedTensor(elements([5, 2, 7]))
    with torch.no_grad(), strict():
        plain, masked = module(x), module(x, src_key_padding_mask=~x.mask)
    torch.testing.assert_close(plain.concat, masked.concat)


def test_decoder_with_nested_and_dense_memory():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True)
    module = nn.TransformerDecoder(layer, 2)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    memory = NestedTensor([torch.randn(n, 16) for n in (3, 6, 4)])
    compare(
        module,
        lambda m, p, k: m(
            p, memory.tensor, tgt_mask=mask, tgt_key_padding_mask=additive(k), memory_key_padding_mask=~memory.mask
        ),
        lambda m, x: m(x, memory, tgt_mask=mask, tgt_is_causal=True),
        elements([5, 2, 7]),
    )
    module.zero_grad()
    dense = torch.randn(3, 4, 16)
    compare(module, lambda m, p, k: m(p, dense, tgt_key_padding_mask=k), lambda m, x: m(x, dense), elements([5, 2, 7]))


def test_transformer():
    torch.manual_seed(0)
    compare(
        nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True),
        lambda m, p, k: m(p, p, src_key_padding_mask=k, tgt_key_padding_mask=k, memory_key_padding_mask=k),
        lambda m, x: m(x, x),
        elements([5, 2, 7]),
    )


@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 16, "vdim": 16}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(settings, need_weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True, **settings)
    compare(
        module,
        lambda m, p, k: m(p, p, p, key_padding_mask=k, need_weights=need_weights)[0],
        lambda m, x: m(x, x, x, need_weights=need_weights)[0],
        elements([5, 2, 7]),
    )


@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("average", [True, False])
def test_attention_weights(settings, average):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True, **settings)
    x = NestedTensor(elements([5, 2, 7]))
    weights = module(x, x, x, average_attn_weights=average)[1]
    padded = module(x.tensor, x.tensor, x.tensor, key_padding_mask=~x.mask, average_attn_weights=average)[1]
    more = len(settings)
    assert weights.ragged_dims == ((0, 1) if average else (1, 2))
    for i, n in enumerate([5, 2, 7]):
        wide = padded[i][..., :n, :]
        torch.testing.assert_close(weights[i], torch.cat([wide[..., :n], wide[..., wide.shape[-1] - more :]], -1))


def test_three_dimensional_and_nested_masks():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = NestedTensor(elements([5, 2, 7]))
    bias = torch.randn(12, 7, 7)
    ragged = NestedTensor([bias[4 * i : 4 * i + 4, :n, :n] for i, n in enumerate([5, 2, 7])], ragged_dims=(1, 2))
    one = module(x, x, x, attn_mask=bias, need_weights=False)[0]
    two = module(x, x, x, attn_mask=ragged, need_weights=False)[0]
    pad = additive(~x.mask)
    padded = module(x.tensor, x.tensor, x.tensor, attn_mask=bias, key_padding_mask=pad, need_weights=False)[0]
    for i, n in enumerate([5, 2, 7]):
        torch.testing.assert_close(one[i], padded[i, :n])
        torch.testing.assert_close(two[i], padded[i, :n])


@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_first_must_agree(batch_first):
    module = nn.MultiheadAttention(16, 4, batch_first=not batch_first)
    x = NestedTensor(elements([5, 2]), batch_first=batch_first)
    with pytest.raises(ValueError, match="batch_first of the module and of the NestedTensor differ"):
        module(x, x, x)
    same = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    assert same(x, x, x)[0].shape == x.shape


def test_empty_element_gives_an_empty_output():
    x = NestedTensor(elements([3, 0, 2]))
    assert [len(o) for o in encoder()(x)] == [3, 0, 2]


def test_mask_of_a_wrong_shape():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = NestedTensor(elements([5, 2]))
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        module(x, x, x, attn_mask=torch.zeros(4, 5))
    with pytest.raises(RuntimeError, match="key_padding_mask"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
