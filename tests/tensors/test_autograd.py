"""Autograd around the op layer: leaves, hooks, custom functions, checkpointing, optimisers, DDP."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from danling.tensors import NestedTensor
from support.ranks import run_ranks

ELEMENTS = [
    torch.linspace(-1, 2, 12).view(3, 4),
    torch.linspace(0, 1, 4).view(1, 4),
    torch.linspace(-2, 1, 20).view(5, 4),
]


def leaf(**settings):
    return NestedTensor(ELEMENTS, requires_grad=True, **settings)


def packed():
    return torch.cat(ELEMENTS).requires_grad_()


class Double(torch.autograd.Function):
    """Sees NestedTensors in forward and backward."""

    seen: list = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        Double.seen.append((type(grad), type(x)))
        return grad * 2 + 0 * x


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_leaf_members():
    x, v = leaf(), packed()
    assert x.is_leaf and x.requires_grad and x.grad is None and x.grad_fn is None
    (x * x).concat.sum().backward()
    (v * v).sum().backward()
    assert isinstance(x.grad, NestedTensor) and x.grad.structure is x.structure
    torch.testing.assert_close(x.grad.concat, v.grad)
    (x * x).concat.sum().backward()
    torch.testing.assert_close(x.grad.concat, 2 * v.grad)
    x.grad = None
    assert x.grad is None
    with pytest.raises(ValueError, match="structure"):
        x.grad = NestedTensor(ELEMENTS[:2])
    y = x * 2
    assert not y.is_leaf and not y.detach().requires_grad and y.detach().is_leaf
    y.retain_grad()
    y.concat.sum().backward()
    torch.testing.assert_close(y.grad.concat, torch.ones(9, 4))
    y.detach_()
    assert not y.requires_grad and not x.data.requires_grad
    z = NestedTensor(ELEMENTS)
    z.requires_grad = True
    assert z.is_leaf and z.requires_grad


@pytest.mark.parametrize("dense", [True, False])
def test_backward_takes_nested_and_dense_gradients(dense):
    x = leaf()
    weight = torch.full((3, 5, 4), 3.0)
    (x * 2).backward(weight if dense else NestedTensor.from_padded(weight, [3, 1, 5]))
    torch.testing.assert_close(x.grad.concat, torch.full((9, 4), 6.0))
    with pytest.raises(ValueError, match="gradient"):
        (x * 2).backward(torch.ones(2, 2))


def test_autograd_grad_and_backward():
    x, w = leaf(), torch.ones(2, 4, requires_grad=True)
    y = F.linear(x, w)
    grads = torch.autograd.grad(y, [x, w], torch.ones_like(y), retain_graph=True)
    assert isinstance(grads[0], NestedTensor) and type(grads[1]) is torch.Tensor
    torch.autograd.backward([y], [torch.ones_like(y)])
    torch.testing.assert_close(x.grad.concat, grads[0].concat)
    torch.testing.assert_close(w.grad, grads[1])


def test_elements_stay_in_the_graph():
    parts = [e.clone().requires_grad_() for e in ELEMENTS]
    x = NestedTensor(parts)
    assert not x.is_leaf
    (x[1] * 3 + x.sum(1)[0]).sum().backward()
    torch.testing.assert_close(parts[1].grad, torch.full((1, 4), 3.0))
    assert not NestedTensor(parts, requires_grad=False).requires_grad


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x * 1, lambda x: x[:3], lambda x: x.relu() + 1])
@pytest.mark.parametrize("function", [Double, Identity])
def test_custom_function_on_leaves_and_untouched_intermediates(wrap, function):
    x, v = leaf(), packed()
    Double.seen.clear()
    out = function.apply(wrap(x))
    assert isinstance(out, NestedTensor) and out.requires_grad
    (out * out).concat.sum().backward()
    middle = v.relu() + 1 if wrap(x).concat.min() >= 1 else v * 1
    expected = (middle * 2).pow(2) if function is Double else middle.pow(2)
    (expected.sum() * (1 if function is Double else 3)).backward()
    torch.testing.assert_close(x.grad.concat, v.grad)
    assert all(kinds == (NestedTensor, NestedTensor) for kinds in Double.seen)


def test_custom_function_between_residuals():
    x, v = leaf(), packed()
    y = x.tanh()
    (y + Double.apply(y) + Double.apply(Double.apply(y).sin())).concat.sum().backward()
    u = v.tanh()
    (u + 2 * u + 2 * (2 * u).sin()).sum().backward()
    torch.testing.assert_close(x.grad.concat, v.grad)


def test_hooks():
    x = leaf()
    seen = []
    y = x * 2
    y.register_hook(lambda g: seen.append(g) or g * 10)
    done = []
    x.register_post_accumulate_grad_hook(lambda p: done.append(p.grad.concat.clone()))
    z = Double.apply(y)
    z.register_hook(lambda g: seen.append(g))
    z.concat.sum().backward()
    assert all(isinstance(g, NestedTensor) for g in seen) and len(seen) == 2
    torch.testing.assert_close(x.grad.concat, torch.full((9, 4), 40.0))
    torch.testing.assert_close(done[0], x.grad.concat)


def test_module_hooks_and_saved_tensor_hooks():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0], go[0])))
    module.register_forward_hook(lambda m, i, o: seen.append(o))
    x = leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = module(x)
    assert isinstance(out, NestedTensor)
    out.concat.sum().backward()
    assert isinstance(seen[0], NestedTensor) and len(seen) == 2
    v = packed()
    nn.Sequential(*module)(v).sum().backward()
    torch.testing.assert_close(x.grad.concat, v.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x, v = leaf(), packed()
    out = checkpoint(module, x * 1, use_reentrant=reentrant)
    (out * out).concat.sum().backward()
    mine = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(v).pow(2).sum().backward()
    torch.testing.assert_close(x.grad.concat, v.grad)
    for a, p in zip(mine, module.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_double_backward():
    x = NestedTensor([e.double() for e in ELEMENTS], requires_grad=True)
    v = torch.cat(ELEMENTS).double().requires_grad_()
    for a, first in ((x, lambda t: t.concat), (v, lambda t: t)):
        loss = first((a * a).sigmoid()).pow(2).sum()
        (g,) = torch.autograd.grad(loss, a, create_graph=True)
        first(g * g).sum().backward()
    torch.testing.assert_close(x.grad.concat, v.grad)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.softmax(x, 1),
        lambda x: x.sum(1),
        lambda x: x.mean(1),
        lambda x: x.amax(1),
        lambda x: x.logsumexp(1),
        lambda x: x.var(1, correction=0),
        lambda x: F.layer_norm(x, (2,)),
        lambda x: x.cumsum(1),
        lambda x: x.cumprod(1),
        lambda x: x.tensor,
        lambda x: x[:, 1:],
        lambda x: x @ x.mT,
        lambda x: torch.cat([x, x * 2], 1),
        lambda x: x * x.sum(1)[:, None],
    ],
)
def test_gradgradcheck(op):
    torch.manual_seed(0)
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def run(v):
        out = op(NestedTensor.from_lengths(v, [2, 1, 3]))
        return out.concat if isinstance(out, NestedTensor) else out

    assert torch.autograd.gradcheck(run, (values,)) and torch.autograd.gradgradcheck(run, (values,))


def test_in_place_ops():
    x, v = leaf(), packed()
    y, u = x * 2, v * 2
    y.mul_(3).sin_()
    u.mul_(3).sin_()
    y += 1
    u += 1
    (y * y).concat.sum().backward()
    (u * u).sum().backward()
    torch.testing.assert_close(x.grad.concat, v.grad)
    stale = x * 2
    square = stale * stale
    stale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.concat.sum().backward()
    with pytest.raises(RuntimeError, match="leaf"):
        x.add_(1)
    with pytest.raises(ValueError, match="structure"):
        NestedTensor(ELEMENTS[1:2]).mul_(NestedTensor(torch.ones(5, 4)))


def test_made_without_grad_mode_and_used_with_it():
    with torch.no_grad():
        x, buffer = leaf(), torch.zeros_like(leaf())
        late = NestedTensor(ELEMENTS).requires_grad_()
    buffer.add_(x)
    (Double.apply(buffer).concat.sum() + Double.apply(x).concat.sum() + Double.apply(late).concat.sum()).backward()
    torch.testing.assert_close(x.grad.concat, torch.full((9, 4), 4.0))
    torch.testing.assert_close(late.grad.concat, torch.full((9, 4), 2.0))


def test_a_resized_element_keeps_what_was_computed_before():
    x = leaf()
    y = x * 2
    z = Identity.apply(y)
    y[0] = torch.zeros(5, 4)
    (z.concat.sum() + y.concat.sum()).backward()
    torch.testing.assert_close(x.grad.concat, torch.cat([torch.full((3, 4), 6.0), torch.full((6, 4), 8.0)]))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("foreach", [True, False])
def test_optimisers_on_parameters(optimiser, foreach):
    p, q = nn.Parameter(NestedTensor(ELEMENTS)), nn.Parameter(torch.cat(ELEMENTS))
    assert isinstance(p, nn.Parameter) and isinstance(p, NestedTensor) and p.is_leaf
    for param, read in ((p, lambda t: t.concat), (q, lambda t: t)):
        opt = optimiser([param], lr=0.1, foreach=foreach)
        for _ in range(3):
            opt.zero_grad()
            read(param * param).sum().backward()
            nn.utils.clip_grad_norm_([param], 1.0)
            opt.step()
    torch.testing.assert_close(p.detach().concat, q.detach())


def test_module_with_nested_parameter():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(NestedTensor(ELEMENTS))
            self.register_buffer("scale", NestedTensor(ELEMENTS))

        def forward(self, x):
            return x + self.bias * self.scale

    module = Bias().double()
    assert module.bias.dtype == torch.float64 and module.bias.is_leaf
    state = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        module.bias.zero_()
    module.load_state_dict(state)
    torch.testing.assert_close(module.bias.detach().concat, torch.cat(ELEMENTS).double())
    module(leaf()).concat.sum().backward()
    assert isinstance(module.bias.grad, NestedTensor)


def test_autocast_and_grad_scaler():
    x = leaf()
    with torch.autocast("cpu", torch.bfloat16):
        out = F.linear(x, torch.ones(4, 4))
    assert out.dtype == torch.bfloat16
    p = nn.Parameter(NestedTensor(ELEMENTS))
    scaler = torch.amp.GradScaler("cpu")
    opt = torch.optim.SGD([p], lr=1.0)
    scaler.scale(p.concat.sum()).backward()
    scaler.unscale_(opt)
    torch.testing.assert_close(p.grad.concat, torch.ones(9, 4))
    scaler.step(opt)


DDP = """
import os
import sys
import torch
import torch.distributed as dist
import torch.nn as nn
from danling.tensors import NestedTensor

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
settings = {name: True for name in sys.argv[1:]}
torch.manual_seed(0)
net, twin = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
twin.load_state_dict(net.state_dict())
ddp = nn.parallel.DistributedDataParallel(net, **settings)
elements = [torch.linspace(-1, 2, 4 * n).view(n, 4) for n in (3, 1, 5)]
for step in range(3):
    parts = [[e + r + step for e in elements[: r + 2]] for r in range(world)]
    out = ddp(NestedTensor(parts[rank]))
    assert isinstance(out, NestedTensor)
    ddp.zero_grad()
    out.concat.pow(2).sum().backward()
    twin.zero_grad()
    (sum(twin(torch.cat(p)).pow(2).sum() for p in parts) / world).backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
dist.barrier()
dist.destroy_process_group()
"""


RAGGED_WEIGHT = """
import torch
import torch.distributed as dist
import torch.nn as nn
from danling.tensors import NestedTensor

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.ones(5, 4) * (rank + 1))

    def forward(self, x):
        return x * NestedTensor.from_lengths(self.values, [2, 3])


ddp = nn.parallel.DistributedDataParallel(Tables())
x = NestedTensor(torch.ones(2, 4), torch.ones(3, 4)) * (rank + 1)
ddp(x).sum().backward()
torch.testing.assert_close(ddp.module.values, torch.ones(5, 4))
torch.testing.assert_close(ddp.module.values.grad, torch.full((5, 4), 1.5))
whole = nn.ParameterList([nn.Parameter(NestedTensor(torch.ones(2), torch.ones(3)))])
try:
    nn.parallel.DistributedDataParallel(whole)
except RuntimeError as error:
    assert "leaf" in str(error)
else:
    raise AssertionError("gradients of a NestedTensor parameter would not be synchronised")
dist.barrier()
dist.destroy_process_group()
"""


def test_ddp_takes_ragged_weights_as_packed_ones():
    assert [r.returncode for r in run_ranks(RAGGED_WEIGHT, 2)] == [0, 0]


@pytest.mark.parametrize("settings", [(), ("find_unused_parameters",), ("static_graph",)])
def test_ddp(settings):
    assert [r.returncode for r in run_ranks(DDP, 2, settings)] == [0, 0]
