"""torch.compile: one graph for any lengths, results and gradients of eager mode, NestedTensors in, out and across."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from danling.tensors import NestedTensor

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
WIDTH = 8
LENGTHS = ([3, 5], [2, 7], [4, 4, 6], [9, 1, 2, 3], [5, 5], [8, 2, 3])
"""Six sets of lengths in three batch sizes."""


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sequences(lengths, requires_grad=True):
    return NestedTensor([torch.randn(n, WIDTH) for n in lengths], requires_grad=requires_grad)


def labels(lengths):
    return NestedTensor([torch.randint(0, WIDTH, (n,)) for n in lengths])


def packed(x):
    return x.concat if isinstance(x, NestedTensor) else x


def heads(x):
    return x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)


def agree(function, makers, parameters=(), backend="aot_eager", lengths=LENGTHS):
    """Compare compiled with eager over all lengths, in results and gradients; gives the number of graphs."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in lengths:
        args = [make(n) for make in makers]
        out, expected = compiled(*args), function(*args)
        assert type(out) is type(expected)
        assert out.shape == expected.shape
        assert out.dtype == expected.dtype
        torch.testing.assert_close(packed(out), packed(expected), equal_nan=True)
        assert out.requires_grad == expected.requires_grad
        if not expected.requires_grad:
            continue
        leaves = [a for a in args if a.requires_grad] + list(parameters)
        weight = torch.randn_like(packed(expected))
        found, wanted = (torch.autograd.grad(packed(y), leaves, weight, allow_unused=True) for y in (out, expected))
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(packed(a), packed(b), equal_nan=True)
    return counter.frame_count


ONE = (sequences,)
TWO = (sequences, sequences)
OPS = {
    "pointwise": (lambda x: torch.relu(x) * 2 + x.sigmoid(), ONE),
    "two operands": (lambda x, y: torch.where(x > 0, x * y, y), TWO),
    "sum, mean, std": (lambda x: x.sum(1) + x.mean(1) + x.std((1, 2))[:, None], ONE),
    "max": (lambda x: x.max(1).values + x.amax(1), ONE),
    "batch": (lambda x: x.sum(0), ONE),
    "all": (lambda x: x.mean() + x.sum((0, 1)).max(), ONE),
    "softmax": (lambda x: x.softmax(1) + F.log_softmax(x, -1) + x.cumsum(1), ONE),
    "per element": (lambda x: x - x.mean(1, keepdim=True) + x.sum(1)[:, None], ONE),
    "positions": (lambda x: x[:, 0] + x[:, -1] + x[:, [0, -1]].sum(1), ONE),
    "shape": (lambda x: x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) * len(x), ONE),
    "join": (lambda x, y: torch.cat([torch.cat([x, y], -1), x.new_zeros(x.shape[0], 1, 2 * WIDTH)], 1), TWO),
    "batches": (lambda x, y: torch.cat([x, y]), TWO),
    "padded": (lambda x: (x * 2).tensor * (x * 2).mask[..., None], ONE),
    "padded input": (lambda x: x.tensor.sum(1) / x.lengths[:, None] + x.mask.sum(1, keepdim=True), ONE),
    "from padded": (lambda x: x.nested_like((x * 2).tensor.exp()), ONE),
    "packed": (lambda x: x.concat.cumsum(0) + x.flatten(0, 1), ONE),
    "attention": (lambda x, y: F.scaled_dot_product_attention(heads(x), heads(y), heads(y)), TWO),
    "causal": (lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3, is_causal=True), ONE),
    "losses": (lambda x, y: F.mse_loss(x, y) + F.binary_cross_entropy_with_logits(x, y.sigmoid()), TWO),
    "labels": (lambda x, y: F.cross_entropy(x, y) + F.nll_loss(x.log_softmax(-1), y), (sequences, labels)),
    "no gradient": (lambda y: F.one_hot(y, WIDTH).sum(1) + y.amax(1, keepdim=True), (labels,)),
    "itself": (lambda x: x, ONE),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_have_one_graph_for_any_lengths(name):
    assert agree(*OPS[name]) == 1


class Attention(nn.Module):
    """A block written by hand: embedding, positions, attention with dropout off, pooling, a classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.position = nn.Parameter(torch.randn(32, WIDTH))
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.position[: x.shape[1]]
        q, k, v = self.project(x).chunk(3, -1)
        x = self.norm(x + F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(-2))
        weights = self.score(x).softmax(1)
        return (x * weights).sum(1)


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.0), nn.Linear(16, WIDTH))


def encoder():
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)


MODELS = {"mlp": (mlp, sequences), "encoder": (encoder, sequences), "attention": (Attention, labels)}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_at_most_two_graphs(name):
    make, data = MODELS[name]
    model = make()
    assert agree(model, (data,), list(model.parameters())) <= 2


def test_a_training_step_with_its_loss_is_one_graph():
    model = mlp()

    def loss(x, y):
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    assert agree(loss, (sequences, labels), list(model.parameters())) == 1


def test_a_model_trains_as_in_eager_mode():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = encoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for n in LENGTHS:
            x = sequences(n, requires_grad=False)
            F.mse_loss(forward(x), x * 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_cross_both_borders():
    model = torch.compile(mlp(), backend="aot_eager", fullgraph=True)
    grads = []
    for forward in (model, model._orig_mod):
        torch.manual_seed(1)
        x = sequences([3, 5])
        y = forward(x * 2) * 3
        assert y.requires_grad
        y.backward(NestedTensor([torch.ones(3, WIDTH), torch.ones(5, WIDTH)]))
        grads.append(x.grad)
    assert isinstance(grads[0], NestedTensor)
    torch.testing.assert_close(grads[0].concat, grads[1].concat)


def test_results_share_the_structure_of_the_input():
    compiled = torch.compile(lambda x: {"y": [x * 2], "z": x.sum(-1)}, backend="aot_eager", fullgraph=True)
    x = sequences([3, 5])
    out = compiled(x)
    y, z = out["y"][0], out["z"]
    assert y.structure == x.structure
    assert y.structure.segments is x.structure.segments  # no offsets are read again
    assert (y + x).shape == (2, 5, WIDTH)
    assert z.tolist() == [t.sum(-1).tolist() for t in x]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_structures_that_differ_are_told_when_the_code_runs(backend):
    compiled = torch.compile(lambda x, y: x + y, backend=backend, fullgraph=True)
    x = sequences([3, 5])
    torch.testing.assert_close(compiled(x, x * 2).concat, x.concat * 3)
    torch.testing.assert_close(compiled(x, sequences([3, 5]) * 0).concat, x.concat)
    with pytest.raises((RuntimeError, ValueError), match="different lengths|has sizes"):
        compiled(x, sequences([5, 3]))


def test_what_needs_the_lengths_is_named():
    x = sequences([3, 5])
    for call, name in ((lambda x: x.unbind(), "unbind"), (lambda x: x[:, 1:], "__getitem__")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=name):
            torch.compile(call, backend="eager", fullgraph=True)(x)
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="need_weights=True"):
        torch.compile(lambda x: attention(x, x, x)[0], backend="eager", fullgraph=True)(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give a list"):
        torch.compile(lambda v, n: NestedTensor.from_lengths(v, n), backend="eager", fullgraph=True)(
            x.concat, x.lengths
        )


def test_without_fullgraph_it_is_one_break():
    def tail(x):
        return (x * 2)[:, 1:].sum(1) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tail, backend=counter)
    for n in LENGTHS:
        x = sequences([m + 1 for m in n])
        out, expected = compiled(x), tail(x)
        torch.testing.assert_close(out, expected)
        found, wanted = (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected))
        torch.testing.assert_close(found.concat, wanted.concat)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) >= 1
    assert counter.frame_count <= 4  # a graph before and one after the break, whatever the lengths


def test_building_from_tensors_of_the_graph():
    def build(a, b):
        return (NestedTensor([a, b * 2]) * 2).sum(1)

    compiled = torch.compile(build, backend="aot_eager", fullgraph=True)
    a, b = torch.randn(3, WIDTH, requires_grad=True), torch.randn(5, WIDTH)
    torch.testing.assert_close(compiled(a, b), build(a, b))
    assert torch.autograd.grad(compiled(a, b).sum(), a)[0].shape == a.shape
    padded = torch.randn(2, 5, WIDTH)
    compiled = torch.compile(lambda x: NestedTensor.from_padded(x, [3, 5]) * 2, backend="aot_eager", fullgraph=True)
    assert compiled(padded).concat.equal(NestedTensor.from_padded(padded, [3, 5]).concat * 2)
    compiled = torch.compile(lambda x: NestedTensor.from_offsets(x, [0, 3, 8]), backend="aot_eager", fullgraph=True)
    assert compiled(padded.flatten(0, 1)[:8]).lengths.tolist() == [3, 5]


def test_an_empty_element_without_identity_raises_when_the_code_runs():
    compiled = torch.compile(lambda x: x.amax(1), backend="aot_eager", fullgraph=True)
    assert compiled(sequences([3, 5])).shape == (2, WIDTH)
    with pytest.raises(RuntimeError, match="no identity"):
        compiled(sequences([0, 5]))


def test_sizes_of_zero_and_one():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: torch.relu(x).sum(1), backend=counter, fullgraph=True)
    for n in ([3, 5], [0, 4], [1], [1, 1], [0], [6, 2]):
        x = sequences(n)
        torch.testing.assert_close(compiled(x), torch.relu(x).sum(1))
    assert counter.frame_count <= 4


def test_other_structures():
    signals = NestedTensor([torch.randn(2, 5), torch.randn(2, 3)], ragged_dims=1, requires_grad=True)
    images = NestedTensor([torch.randn(3, 4, 6), torch.randn(3, 5, 2)], ragged_dims=(1, 2), requires_grad=True)
    second = NestedTensor([torch.randn(5, 2), torch.randn(3, 2)], batch_first=False, padding_value=float("nan"))
    static = NestedTensor(torch.randn(3, 4), torch.randn(3, 4), ragged_dims=())

    def double(x):
        return (x * 2).relu()

    for x in (signals, images, second, static):
        out = torch.compile(double, backend="aot_eager", fullgraph=True)(x)
        assert out.structure == double(x).structure
        torch.testing.assert_close(out.tensor, double(x).tensor, equal_nan=True)
    out = torch.compile(lambda x: (x * 2).tensor, backend="aot_eager", fullgraph=True)(images)
    torch.autograd.backward(out, torch.ones_like(out))
    assert images.grad.concat.eq(2).all()


def test_a_nested_parameter_and_buffer():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(sequences([3, 5], False))
            self.register_buffer("shift", sequences([3, 5], False))

        def forward(self, x):
            return (x * self.scale + self.shift).sum()

    module, x = Scale(), sequences([3, 5], False)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(module.scale.grad.concat, x.concat)


def test_an_input_written_in_place():
    def double(x):
        x.mul_(2)
        return x.sum(1)

    x = sequences([3, 5], False)
    expected = x.concat * 2
    out = torch.compile(double, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(x.concat, expected)
    torch.testing.assert_close(out, x.sum(1))


def test_dropout_draws_the_same_forward_and_backward():
    def attend(x):
        return F.scaled_dot_product_attention(*[heads(x)] * 3, dropout_p=0.5)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    eye = NestedTensor([torch.randn(6, WIDTH)], requires_grad=True)
    torch.manual_seed(3)
    out = compiled(eye)
    direction = torch.randn_like(eye.concat)
    (grad,) = torch.autograd.grad(out.concat.sum(), eye)
    step = 1e-3
    torch.manual_seed(3)
    moved = compiled(NestedTensor([eye.concat.detach() + step * direction], requires_grad=True))
    slope = (moved.concat.sum() - out.concat.sum()) / step
    torch.testing.assert_close(slope.detach(), (grad.concat * direction).sum(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("grad", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_encoder_in_evaluation(grad):
    layers = nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False).eval()
    x = sequences([3, 5], False)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[:, 1] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for masks in ({}, {"src_key_padding_mask": hidden}, {"mask": causal}):
            torch.testing.assert_close(compiled(x, **masks).concat, layers(x, **masks).concat)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor(name):
    make, data = MODELS[name]
    model = make()
    assert agree(model, (data,), list(model.parameters()), "inductor") <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_with_losses_and_borders():
    model = mlp()

    def loss(x, y):
        x = model(x)
        pooled = x.tensor.sum(1) / x.lengths[:, None]
        return F.cross_entropy(x, y) + F.mse_loss(pooled, x.mean(1)) + x.softmax(1).std()

    assert agree(loss, (sequences, labels), list(model.parameters()), "inductor") == 1
