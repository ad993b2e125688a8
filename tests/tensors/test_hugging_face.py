"""A Hugging Face BERT with random weights, unchanged, on sequences of different lengths against the padded run with a mask."""

import pytest
import torch

from danling.tensors import NestedTensor, strict

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 9, 1, 3)


@pytest.fixture(params=["eager", "sdpa"])
def bert(request):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=request.param,
    )
    return transformers.BertModel(config).double()


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(1)
    return NestedTensor([torch.randint(1, 99, (n,), generator=generator) for n in LENGTHS])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_embeddings_and_encoder_stay_packed_and_equal_the_padded_run(bert, ids):
    mask = ids.mask
    padded = bert(input_ids=ids.tensor, attention_mask=mask.long()).last_hidden_state
    want = gradients(bert, padded[mask].square().sum())
    with strict():  # no fallback: nothing is padded and nothing runs element by element
        packed = bert.encoder(bert.embeddings(input_ids=ids)).last_hidden_state
    assert isinstance(packed, NestedTensor) and packed.lengths.tolist() == list(LENGTHS)
    torch.testing.assert_close(packed.concat, padded[mask])
    got = gradients(bert, packed.concat.square().sum())
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_whole_model_takes_packed_ids(bert, ids):
    want = bert(input_ids=ids.tensor, attention_mask=ids.mask.long())
    got = bert(input_ids=ids)
    torch.testing.assert_close(got.last_hidden_state.concat, want.last_hidden_state[ids.mask])
    torch.testing.assert_close(got.pooler_output, want.pooler_output)
