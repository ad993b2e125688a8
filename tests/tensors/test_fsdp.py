"""FSDP2 around models fed with NestedTensors, in real processes, against one process on the whole batch."""

from support.ranks import run_ranks

FSDP = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from danling.tensors import NestedTensor

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.gate = nn.Linear(8, 8)

    def forward(self, x, keep):
        x = self.layer(x)
        return {"hidden": x + self.gate(x).sigmoid(), "keep": keep}  # a NestedTensor inside a structure


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, x)["hidden"]
        return self.head(x)


torch.manual_seed(0)
net, twin = Net().double(), Net().double()
twin.load_state_dict(net.state_dict())
for block in net.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(net, mesh=mesh)
updates = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (net, twin)]
elements = [torch.linspace(-1, 2, 8 * n, dtype=torch.float64).view(n, 8) for n in (3, 1, 5)]
for step in range(3):
    parts = [[e + r + step for e in elements[: r + 2]] for r in range(world)]
    leaf = NestedTensor(parts[rank]).requires_grad_()
    out = net(leaf)
    assert type(out) is NestedTensor, type(out)
    out.concat.pow(2).sum().backward()
    mine = [NestedTensor(p).requires_grad_() for p in parts]
    (sum(twin(p).concat.pow(2).sum() for p in mine) / world).backward()
    torch.testing.assert_close(leaf.grad.concat / world, mine[rank].grad.concat)
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=lambda text: f"{name}: {text}")
    for update in updates:
        update.step()
        update.zero_grad()
for a, b in zip(net.parameters(), twin.parameters(), strict=True):
    torch.testing.assert_close(a.full_tensor(), b)
dist.barrier()
dist.destroy_process_group()
"""


def test_fsdp2_hooks_pass_gradients_of_nested_inputs_and_outputs():
    run_ranks(FSDP, 2)
