"""The step of the weights on several ranks: one norm, one verdict, one scale."""

import pytest

from support.ranks import run_ranks

COMMON = """
import math, os, sys
import torch
import torch.distributed as dist
from torch import nn
from danling.optim import OptimizerStep

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
every_max = lambda flag: dist.all_reduce(flag, op=dist.ReduceOp.MAX)


def same_everywhere(value):
    value = torch.as_tensor(value, dtype=torch.float64).reshape(-1)
    gathered = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(gathered, value)
    assert all(torch.equal(gathered[0], other) for other in gathered), gathered


def gradients(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]
"""

HALVES = (
    COMMON
    + """
shapes = [(4, 3), (3,), (5, 2)]
halves = [gradients(0, shapes), gradients(1, shapes[:2])]  # as pipeline stages hold them
everything = [grad for half in halves for grad in half]

for order in (1.0, 2.0, 3.0, math.inf):
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in halves[rank]]
    for param, grad in zip(params, halves[rank]):
        param.grad = grad.clone()
    reference = [nn.Parameter(torch.zeros_like(grad)) for grad in everything]
    for param, grad in zip(reference, everything):
        param.grad = grad.clone()
    reduce_norm = every_max if order == math.inf else dist.all_reduce
    update = OptimizerStep(
        torch.optim.SGD(params, lr=0.1), clip_norm=0.5, norm_type=order, skip_nonfinite=True,
        reduce_norm=reduce_norm, reduce_flag=every_max,
    )
    result = update.step(zero_grad=False)
    norm = nn.utils.clip_grad_norm_(reference, 0.5, order)
    torch.testing.assert_close(result.grad_norm, norm)
    same_everywhere(result.grad_norm)
    mine = reference[: len(halves[0])] if rank == 0 else reference[len(halves[0]) :]
    for param, other in zip(params, mine):
        torch.testing.assert_close(param.grad, other.grad)

# One bad rank skips on all, with and without a norm that carries the verdict, with and without a scaler.
for options in ({}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "clip_value": 1.0}):
    for scaled in (False, True):
        params = [nn.Parameter(torch.ones(3))]
        params[0].grad = torch.ones(3)
        if rank == 1:
            params[0].grad[2] = math.nan
        if "clip_norm" in options:
            options["reduce_norm"] = dist.all_reduce
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        if scaled:
            scaler.scale(torch.ones(()))
        update = OptimizerStep(
            torch.optim.SGD(params, lr=0.1), skip_nonfinite=not scaled, scaler=scaler, reduce_flag=every_max, **options
        )
        result = update.step()
        assert not result.stepped and update.skipped == 1
        assert torch.equal(params[0].detach(), torch.ones(3)) and params[0].grad is None
        if scaled:
            assert scaler.get_scale() == 4.0
        params[0].grad = torch.ones(3)
        assert update.step().stepped
"""
)

MESH = (
    COMMON
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.fsdp import fully_shard

sizes = tuple(int(size) for size in sys.argv[1].split("x"))
mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes):])
if len(sizes) == 1:
    layouts = [[Shard(0)], [Replicate()], [Shard(1)]]
else:
    layouts = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Replicate()]]
shapes = [(5, 4), (4, 6), (3, 3), (2, 7), (1, 4)]  # (1, 4): some ranks hold nothing of it
layouts = [layouts[i % len(layouts)] for i in range(len(shapes) - 1)] + [layouts[0]]
grads = gradients(0, [*shapes, (4,)])

calls = []
real = dist.all_reduce
def counted(*args, **kwargs):
    calls.append(1)
    return real(*args, **kwargs)

for order in (2.0, 3.0, math.inf):
    params = []
    for grad, layout in zip(grads, layouts):
        param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, layout))
        param.grad = distribute_tensor(grad, mesh, layout)
        params.append(param)
    plain = nn.Parameter(torch.zeros(4))  # an ordinary tensor beside them, the same on all ranks
    plain.grad = grads[-1].clone()
    params.append(plain)
    reference = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(reference, grads):
        param.grad = grad.clone()
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False)
    update = OptimizerStep(optimizer, clip_norm=0.5, norm_type=order)
    calls.clear()
    dist.all_reduce = counted
    result = update.step(zero_grad=False)
    dist.all_reduce = real
    assert len(calls) == len(sizes), len(calls)  # once per mesh and dimension, however many parameters
    norm = nn.utils.clip_grad_norm_(reference, 0.5, order)
    torch.testing.assert_close(result.grad_norm, norm)
    same_everywhere(result.grad_norm)
    for param, other in zip(params, reference):
        grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        torch.testing.assert_close(grad, other.grad)

# A gradient that is still a sum over ranks is added up before its norm is taken.
param = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()] * len(sizes)))
param.grad = DTensor.from_local(torch.full((3,), float(rank + 1)), mesh, [Partial()] * len(sizes))
update = OptimizerStep(torch.optim.SGD([param], lr=0.1, foreach=False), clip_norm=math.inf)
total = world * (world + 1) / 2
torch.testing.assert_close(update.clip_gradients(), torch.tensor(total * math.sqrt(3)))

# FSDP2: a bad element in one rank's shard skips on all ranks without reduce_flag, whichever check finds it.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
alone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
alone.load_state_dict(model.state_dict())
fully_shard(model, mesh=mesh)
data = torch.randn(6, 8)
for options in ({"clip_norm": 0.1}, {}, {"clip_norm": 0.1, "clip_value": 0.05}):
    for bad in (False, True):
        updates = []
        for net in (model, alone):
            net.zero_grad()
            net(data).square().sum().backward()
            updates.append(OptimizerStep(torch.optim.SGD(net.parameters(), lr=0.01), skip_nonfinite=True, **options))
        if bad:
            shard = next(model.parameters()).grad.to_local()
            if rank == world - 1 and shard.numel():
                shard.view(-1)[0] = math.inf
            before = [param.full_tensor().clone() for param in model.parameters()]
            result = updates[0].step()
            assert not result.stepped and updates[0].skipped == 1
            for param, old in zip(model.parameters(), before):
                assert torch.equal(param.full_tensor(), old)
            continue
        mine, theirs = updates[0].step(), updates[1].step()
        assert mine.stepped
        if options:
            torch.testing.assert_close(mine.grad_norm, theirs.grad_norm)
        for param, other in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(param.full_tensor(), other)
"""
)


def test_halves_on_two_ranks_are_one_model():
    run_ranks(HALVES, 2)


def test_a_sharded_model_has_the_norm_of_the_whole():
    run_ranks(MESH, 2, ["2"])


@pytest.mark.slow
def test_a_model_sharded_in_two_dimensions_has_the_norm_of_the_whole():
    run_ranks(MESH, 4, ["2x2"])
