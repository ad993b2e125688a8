"""Models cut into pipeline stages over real processes, against the same models in one piece."""

from __future__ import annotations

import pytest

from support.ranks import run_ranks

SCRIPT = r"""
import copy, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from danling.backends.parallel.microbatches import take_rows
from danling.backends.parallel.pipeline import Pipeline, keep_rows, nothing
from danling.backends.parallel.schedule import count_stages, stage_indices
from danling.backends.parallel.stages import ModelPart, cut_by_names, sequential_names

warnings.simplefilter("error")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
group = dist.new_group(list(range(world)))
torch.set_default_dtype(torch.float64)


def build():
    torch.manual_seed(3)
    sizes = [6, 10, 7, 9, 12, 5, 8, 11, 6, 4]
    pairs = zip(sizes, sizes[1:])
    return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), nn.Tanh())][:-1])


def cut(model, name, per_rank=None):
    stages = count_stages(name, world, per_rank and per_rank * world)
    names = sequential_names(model, stages)
    return cut_by_names(model, names, stage_indices(name, rank, world, stages)), stages


def compare(parts, whole, what):
    expected = dict(whole.state_dict(keep_vars=True))
    found = 0
    for part in parts.values():
        for key, value in part.state_dict(keep_vars=True).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=lambda m: f"{what} {key}: {m}")
            if isinstance(value, nn.Parameter):
                grad = expected[key].grad
                assert (value.grad is None) == (grad is None), (what, key)
                if grad is not None:
                    torch.testing.assert_close(value.grad, grad, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what} {key}: {m}")
            found += 1
    counts = [None] * world
    dist.all_gather_object(counts, found, group=group)
    assert sum(counts) == len(expected), (counts, len(expected))


def criterion(output, target):
    return F.cross_entropy(output, target, ignore_index=-1)


def batches(count, rows, generator):
    for index in range(count):
        n = rows if index % 3 else max(1, rows - 1 - index % rows)  # every third batch is short
        target = torch.randint(0, 4, (n,), generator=generator)
        target[torch.rand(n, generator=generator) < 0.2] = -1
        if (target < 0).all():
            target[0] = 1
        yield torch.randn(n, 6, generator=generator), target


def train(name, *, rows=8, count=4, updates=20, adam=False, per_rank=None):
    whole = build()
    parts, stages = cut(copy.deepcopy(whole), name, per_rank)
    pipe = Pipeline(name, parts, stages, device=torch.device("cpu"), group=group, count=count)
    def optimizer(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW(parameters, lr=1e-2) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    mine = optimizer(p for part in parts.values() for p in part.parameters())
    reference = optimizer(whole.parameters())
    generator = torch.Generator().manual_seed(5)
    accumulate = 2  # two batches a window, weighted by the targets that count
    data = list(batches(updates * accumulate, rows, generator))
    for update in range(updates):
        window = data[update * accumulate : (update + 1) * accumulate]
        weights = [(target >= 0).sum().item() for _, target in window]
        expected_loss = 0.0
        for (source, target), weight in zip(window, weights):
            output = whole(source)
            loss = criterion(output, target)
            (loss * weight / sum(weights)).backward()

            def step(index, piece, plan):
                kept = keep_rows(piece, plan, index)
                labels = take_rows(target, plan.rows, index * plan.size, min(plan.rows, (index + 1) * plan.size))
                own = (labels >= 0).sum().item() if kept is not None else 0
                if not own:
                    return nothing(piece), kept, None
                plain = criterion(kept, labels)
                return plain * own / sum(weights), kept, plain.detach() * own / weight

            first, last = pipe.has_first, pipe.has_last
            merged, losses, _ = pipe.train(
                source if first else None, rows, len(source) if first else None, step, synchronise=True
            )
            if last:
                torch.testing.assert_close(merged, output, rtol=1e-9, atol=1e-12)
                total = sum(x for x in losses if x is not None)
                torch.testing.assert_close(total, loss.detach(), rtol=1e-9, atol=1e-12)
            else:
                assert merged is None and losses == []
        compare(parts, whole, (name, update, "before"))
        for o in (mine, reference):
            o.step()
            o.zero_grad()
        if update % 7 == 0:  # evaluation between updates, on a batch of another size
            with torch.inference_mode():
                source = torch.randn(rows - 3, 6, generator=torch.Generator().manual_seed(update))
                merged, _ = pipe.forward(source if first else None, rows, len(source) if first else None)
                if last:
                    torch.testing.assert_close(merged, whole(source), rtol=1e-9, atol=1e-12)
    compare(parts, whole, (name, "end"))
"""

SHAPES = r"""
class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 3, 1)

    def forward(self, x, skip):
        return {"steps": self.conv(x), "mean": (skip.mean(), [x.mean((1, 2))])}


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.BatchNorm1d(6)

    def forward(self, tokens, scale):
        x = self.norm(self.embed(tokens).transpose(1, 2))
        return torch.tanh(x) * scale[:, None, None], x


def structured(name):
    # keyword inputs, two tensors between stages, outputs with structure, batch statistics, lengths that change
    torch.manual_seed(4)
    whole = nn.ModuleDict({"first": First(), "last": Last()})
    mine = copy.deepcopy(whole)
    parts = {rank: ModelPart({"first": mine["first"]} if rank == 0 else {"last": mine["last"]})}
    pipe = Pipeline(name, parts, 2, device=torch.device("cpu"), group=group, size=2)
    generator = torch.Generator().manual_seed(2)
    for step in range(12):
        rows, length = (4, 3 + step % 4) if step != 5 else (3, 7)
        tokens = torch.randint(0, 9, (rows, length), generator=generator)
        source = {"tokens": tokens, "scale": torch.rand(rows, generator=generator)}
        target = torch.randn(rows, 3, length, generator=generator)
        outputs = []
        for start in range(0, 4, 2):
            piece = take_rows(source, rows, start, start + 2)
            output = whole["last"](*whole["first"](**piece))
            kept = min(2, rows - start)
            F.mse_loss(output["steps"][:kept], target[start : start + kept]).mul(kept / rows).backward()
            outputs.append(output["steps"][:kept])

        def step_loss(index, piece, plan):
            kept = keep_rows(piece, plan, index)
            own = plan.kept(index)
            plain = F.mse_loss(kept["steps"], target[2 * index : 2 * index + own])
            return plain * (own / rows), kept, plain.detach()

        merged, _, plan = pipe.train(source if rank == 0 else None, 4, rows if rank == 0 else None, step_loss, synchronise=True)
        assert tuple(plan) == (2, 2, rows)
        compare(parts, whole, (name, "structured", step))
        if pipe.has_last:
            torch.testing.assert_close(merged["steps"], torch.cat(outputs), rtol=1e-9, atol=1e-12)
            assert merged["mean"][0].dim() == 0 and merged["mean"][1][0].shape == (rows,)
        for part in parts.values():
            part.zero_grad()
        whole.zero_grad()
    parts[rank].eval(), whole.eval()
    with torch.inference_mode():
        merged, _ = pipe.forward(source if rank == 0 else None, 4, rows if rank == 0 else None)
        if pipe.has_last:
            expected = whole["last"](*whole["first"](**source))["steps"]
            torch.testing.assert_close(merged["steps"], expected, rtol=1e-9, atol=1e-12)


for name in ("1F1B", "GPipe") if world == 2 else ():
    structured(name)
    print("done", name, "structured", flush=True)


class Wrong(nn.Module):
    def forward(self, x):
        return {"x": x}


# what a stage in the middle may not return
if world == 2:
    bad = {rank: nn.Sequential(nn.Linear(2, 2), Wrong()) if rank == 0 else nn.Linear(2, 2)}
    pipe = Pipeline("GPipe", bad, 2, device=torch.device("cpu"), group=group)
    try:
        with torch.inference_mode():
            pipe.forward(torch.zeros(2, 2) if rank == 0 else None, 2, 2)
    except TypeError as error:
        assert rank == 0 and "stage 0 returns dict" in str(error), error
        print("done refused", flush=True)
    except RuntimeError:  # the other rank is gone
        assert rank == 1
"""

SCHEDULES = r"""
for name, options in [
    ("1F1B", {}), ("1F1B", dict(count=1, updates=3)), ("GPipe", dict(adam=True)), ("Interleaved1F1B", dict(adam=True)),
    ("LoopedBFS", {}), ("InterleavedZeroBubble", {}), ("ZBVZeroBubble", {}), ("DualPipeV", dict(count=8)),
    *([("Interleaved1F1B", dict(per_rank=3))] if world == 2 else []),
]:
    train(name, **options)
    if rank == 0:
        print("done", name, options, flush=True)
"""


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_schedule_equals_the_whole_model(nproc):
    results = run_ranks(SCRIPT + SCHEDULES + SHAPES, nproc, timeout=150)
    assert results[0].output.count("done") == (12 if nproc == 2 else 8)
