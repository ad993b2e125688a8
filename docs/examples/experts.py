"""A small language model whose feed-forward layers are mixtures of experts, split over the ranks by a hook of its own.

torchrun --nproc-per-node 2 experts.py --stack parallel --parallel.axes.expert 2
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import danling as dl
from danling.backends.parallel.plans import Axis, copy_in, exchange, join, sum_out, take_part


class Experts(nn.Module):
    """`count` feed-forward layers, their weights stacked; ranks hold some of the experts, and of these some hidden units."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, hidden, width) / hidden**0.5)
        self.units = None

    def split(self, ctx) -> None:
        self.units = Axis.of(ctx, "expert_tensor")
        mesh = ctx.mesh["expert", "expert_tensor"]
        for name, dim in (("up", 2), ("down", 1)):
            whole = getattr(self, name).detach()
            mine = whole.chunk(ctx.degree("expert"), 0)[ctx.rank("expert")].chunk(self.units.degree, dim)[
                self.units.rank
            ]
            part = DTensor.from_local(
                mine.contiguous(),
                mesh,
                [Shard(0), Shard(dim)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            setattr(self, name, nn.Parameter(part))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Map `(rows, width)`, the rows of the first expert here before those of the second, and so on."""
        up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.up, self.down))
        if self.units is not None:
            rows = copy_in(rows, self.units)
        parts = [F.relu(part @ up[i]) @ down[i] for i, part in enumerate(rows.split(counts))]
        return torch.cat(parts) if self.units is None else sum_out(torch.cat(parts), self.units)


class Mixture(nn.Module):
    """Each position goes to the `top` experts its router prefers, and gets their outputs weighted by its preference."""

    def __init__(self, count: int, width: int, hidden: int, top: int = 2):
        super().__init__()
        self.count, self.top = count, top
        self.router = nn.Linear(width, count, bias=False)
        self.experts = Experts(count, width, hidden)
        self.axis = None

    def split(self, ctx) -> None:
        if self.count % ctx.degree("expert"):
            raise ValueError(
                f"{self.count} experts cannot be shared equally by parallel.axes.expert: {ctx.degree('expert')}"
            )
        self.axis = Axis.of(ctx, "expert")
        self.experts.split(ctx)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        # All ranks of the expert axis hold the same tokens and route all of them, so the router's gradient is whole on each.
        preference, choice = self.router(tokens).softmax(-1).topk(self.top)
        outputs = self.local(tokens, choice) if self.axis is None else self.routed(tokens, choice)
        return (preference.unsqueeze(-1) * outputs).sum(1).view_as(x)

    def local(self, tokens: Tensor, choice: Tensor) -> Tensor:
        """Outputs of the chosen experts, `(tokens, top, width)`, when all are here."""
        order = choice.flatten().argsort(stable=True)
        rows = tokens.repeat_interleave(self.top, 0)[order]
        outputs = self.experts(rows, choice.flatten().bincount(minlength=self.count).tolist())
        return outputs[order.argsort()].unflatten(0, choice.shape)

    def routed(self, tokens: Tensor, choice: Tensor) -> Tensor:
        """The same when ranks hold some experts: each sends its share of the tokens to where their experts are.

        A token's gradient then comes from the one rank that sent it, and an expert's from all the tokens it was sent, so
        neither is counted twice nor needs a factor.
        """
        ranks = self.axis.degree
        padding = -len(tokens) % ranks  # rows that are sent along so that shares are equal, and cut off at the end
        mine, chosen = (take_part(F.pad(t, (0, 0, 0, padding)), self.axis, 0) for t in (tokens, choice))
        order = chosen.flatten().argsort(stable=True)
        rows = mine.repeat_interleave(self.top, 0)[order]
        sent = chosen.flatten().bincount(minlength=self.count)  # rows for each expert, ranks one after the other
        here = self.count // ranks
        received = exchange(sent, self.axis, [here] * ranks, [here] * ranks).view(ranks, here)
        to, back = sent.view(ranks, here).sum(1).tolist(), received.sum(1).tolist()
        arrived = exchange(rows, self.axis, to, back)
        expert = torch.arange(here, device=rows.device).repeat(ranks).repeat_interleave(received.flatten())
        by_expert = expert.argsort(stable=True)
        outputs = self.experts(arrived[by_expert], received.sum(0).tolist())[by_expert.argsort()]
        returned = exchange(outputs, self.axis, back, to)[order.argsort()].unflatten(0, chosen.shape)
        return join(returned, self.axis, 0)[: len(tokens)]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, experts: int, hidden: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mixture = Mixture(experts, width, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
        return x + self.mixture(self.norms[1](x))


class Language(nn.Module):
    def __init__(
        self, symbols: int = 12, width: int = 16, heads: int = 2, experts: int = 4, hidden: int = 32, depth: int = 2
    ):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.blocks = nn.ModuleList(Block(width, heads, experts, hidden) for _ in range(depth))
        self.head = nn.Linear(width, symbols)

    def parallelize(self, ctx) -> nn.Module:
        """Split the experts; `tensor` and `context` are left to the built-in plans, which cover the attention."""
        for block in self.blocks:
            block.mixture.split(ctx)
        ctx.took("expert", "expert_tensor")
        return self

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x).transpose(1, 2).contiguous()


class Steps(torch.utils.data.Dataset):
    """Sequences that go up by a step of their own: the next symbol follows from the last two."""

    def __init__(self, count: int, symbols: int = 12, length: int = 16):
        start, step = torch.arange(count) % symbols, 1 + torch.arange(count) // symbols % (symbols - 1)
        self.rows = (start[:, None] + step[:, None] * torch.arange(length + 1)) % symbols

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index, :-1], self.rows[index, 1:]


class Trainer(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model = Language()
        self.criterion = nn.CrossEntropyLoss()
        self.datasets.train = Steps(132)


if __name__ == "__main__":
    config = {
        "experiment": "experts",
        "epochs": 5,
        "optim": {"type": "adamw", "lr": 1e-2},
        "dataloader": {"batch_size": 12},
    }
    Trainer(dl.RunnerConfig(config).parse()).train()
