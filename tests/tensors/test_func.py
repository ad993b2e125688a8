"""torch.func over NestedTensor data: what is derived with respect to dense tensors works, the rest is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from danling.tensors import NestedTensor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of its forward mode


@pytest.fixture
def data():
    torch.manual_seed(0)
    return NestedTensor([torch.randn(3, 4), torch.randn(5, 4)]), torch.randn(4, 4)


def pooled(x):
    return lambda weight: (x @ weight).softmax(1).amax(1).sum() + F.layer_norm(x @ weight, (4,)).std(1).sum()


def attention(x):
    def loss(weight):
        q = (x @ weight).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).sin().sum()

    return loss


@pytest.mark.parametrize("make", [pooled, attention])
def test_grad_of_weights(data, make):
    x, weight = data
    leaf = weight.clone().requires_grad_()
    make(x)(leaf).backward()
    torch.testing.assert_close(grad(make(x))(weight), leaf.grad)


def test_functional_call(data):
    x, _ = data
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8))
    found = grad(lambda p: functional_call(model, p, (x,)).pow(2).mean())(dict(model.named_parameters()))
    model(x).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_vjp_and_jvp_are_transposes(data):
    x, weight = data
    tangent, cotangent = torch.randn(4, 4), torch.randn(2, 5, 4)

    def padded(w):
        return ((x @ w).softmax(1) - (x @ w).mean(1, keepdim=True)).tensor

    out, pull = vjp(padded, weight)
    same, push = jvp(padded, (weight,), (tangent,))
    torch.testing.assert_close(out, same)
    torch.testing.assert_close((pull(cotangent)[0] * tangent).sum(), (cotangent * push).sum())


def test_hessian(data):
    x, weight = data
    hessian = jacrev(grad(lambda w: (x @ w).sin().sum()))(weight)
    rows = x.concat
    second = torch.einsum("rj,ri,rk->jik", -(rows @ weight).sin(), rows, rows)
    for j in range(4):
        torch.testing.assert_close(hessian[:, j, :, j], second[j])


def test_packed_values_can_be_derived(data):
    x, _ = data
    found = grad(lambda values: NestedTensor.from_lengths(values, x.lengths).softmax(1).amax(1).sum())(x.concat)
    y = x.detach().requires_grad_()
    y.softmax(1).amax(1).sum().backward()
    torch.testing.assert_close(found, y.grad.concat)


REFUSED = {
    "grad": lambda x, w: grad(lambda x: x.pow(2).sum())(x),
    "grad with a nested argument": lambda x, w: grad(lambda w, x: (x @ w).sum())(w, x),
    "vjp": lambda x, w: vjp(lambda x: x.pow(2), x),
    "jvp": lambda x, w: jvp(lambda x: x.pow(2), (x,), (x,)),
    "vmap over": lambda x, w: vmap(lambda t: t.sum())(x),
    "vmap around": lambda x, w: vmap(lambda s: x * s)(torch.randn(3)),
    "vmap with a nested argument": lambda x, w: vmap(lambda s, x: (x * s).sum(), in_dims=(0, None))(torch.randn(3), x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_the_structure_is_refused(name, data):
    with pytest.raises(NotImplementedError, match=r"\.concat"):
        REFUSED[name](*data)
