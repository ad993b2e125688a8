"""Split models against unsplit ones, on every rank of a gloo world: `plans_ranks.py scenario [scenario ...]`.

A scenario is `forward:axis=degree[,axis=degree]` (every case of `CASES`: outputs and gradients), `train:...` (20 updates of
a small language model) or another function below.
"""

from __future__ import annotations

import copy
import math
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from danling.backends.parallel import ParallelTopology
from danling.backends.parallel.context import ParallelContext
from danling.backends.parallel.parallelize import parallelize_part
from danling.backends.parallel.plans import (
    PackedShard,
    SplitCrossEntropy,
    apply_context_plan,
    apply_tensor_plan,
    packed_parameters,
    shard_context,
    split_columns,
    to_usual_order,
)
from danling.backends.parallel.sharding import data_mesh, shard_model
from danling.backends.torch.local import local_tensor
from danling.optim import OptimizerStep

WIDTH, HEADS, HIDDEN, LENGTH, BATCH = 8, 4, 12, 8, 2


def context_of(axes: dict[str, int]) -> ParallelContext:
    return ParallelContext(ParallelTopology(axes, dist.get_world_size(), dist.get_rank()), "cpu")


def split(model: nn.Module, ctx: ParallelContext) -> nn.Module:
    matched = [apply(model, ctx) for apply, axis in PLANS if ctx.degree(axis) > 1]
    assert all(matched)
    return model


PLANS = ((apply_tensor_plan, "tensor"), (apply_context_plan, "context"))


def whole(value: Tensor, layout: tuple[int, int] | None) -> Tensor:
    """The unsplit tensor, in its usual order."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value if layout is None else to_usual_order(value, *layout)


def close(found: Any, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"rank {dist.get_rank()}: {what}: {text}"
    )


# ---------------------------------------------------------------- outputs and gradients

Cut = Callable[[Tensor, int], Tensor]


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, **options)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, **options)


def stack(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def causal(x: Tensor, dim: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[dim], dtype=x.dtype)


def padding(rows: int = BATCH, keys: int = LENGTH) -> Tensor:
    mask = torch.zeros(rows, keys, dtype=torch.bool)
    mask[0, -3:] = mask[-1, 1] = True
    return mask


class Case:
    """One way to call a layer: `call(model, sources, cut)` returns tensors whose sequence dimension is `dim`."""

    def __init__(self, build: Any, call: Any, shapes: tuple[tuple[int, ...], ...], dim: int = 1) -> None:
        self.build, self.call, self.shapes, self.dim = build, call, shapes, dim


BLE, LBE = (BATCH, LENGTH, WIDTH), (LENGTH, BATCH, WIDTH)
BSE, SBE = (BATCH, 2 * LENGTH, WIDTH), (2 * LENGTH, BATCH, WIDTH)


def attend(**options: Any) -> Callable[[Any, Any, Cut], Any]:
    """Self-attention of a batch-first layer; options that are functions get the cut."""

    def call(model: Any, sources: Any, cut: Cut) -> Any:
        x = cut(sources[0], 1)
        given = {name: value(cut, x) if callable(value) else value for name, value in options.items()}
        out, weights = model(x, x, x, **given)
        return (out,) if weights is None else (out, weights.movedim(-2, 1))

    return call


def cross(model: Any, sources: Any, cut: Cut) -> Any:
    q, k, v = (cut(source, 0) for source in sources)
    return model(q, k, v, key_padding_mask=cut(padding(keys=2 * LENGTH), 1), need_weights=False)[:1]


def unbatched(model: Any, sources: Any, cut: Cut) -> Any:
    x = cut(sources[0], 0)
    out, weights = model(x, x, x, attn_mask=torch.ones(LENGTH, LENGTH).triu(1).bool(), average_attn_weights=False)
    return out, weights.movedim(1, 0)


def decode(model: Any, sources: Any, cut: Cut) -> Any:
    y, memory = cut(sources[0], 1), cut(sources[1], 1)
    return (
        model(
            y,
            memory,
            tgt_mask=causal(y, 1),
            tgt_key_padding_mask=cut(padding(), 1).to(y.dtype) * -1e3,
            memory_key_padding_mask=padding(keys=2 * LENGTH).to(y.dtype) * -1e3,
        ),
    )


def seq_to_seq(model: Any, sources: Any, cut: Cut) -> Any:
    x, y = cut(sources[0], 0), cut(sources[1], 0)
    return (
        model(
            x,
            y,
            tgt_mask=causal(y, 0),
            tgt_is_causal=True,
            src_key_padding_mask=cut(padding(keys=2 * LENGTH).to(x.dtype) * -1e3, 1),
        ),
    )


def full_mask(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})


CASES = {
    "causal encoder": Case(
        lambda: stack(encoder_layer(batch_first=True, activation="gelu", norm_first=True)),
        lambda model, sources, cut: (model((x := cut(sources[0], 1)), mask=causal(x, 1)),),
        (BLE,),
    ),
    "encoder, padded": Case(
        lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 1),
        lambda model, sources, cut: (model(cut(sources[0], 1), src_key_padding_mask=cut(padding(), 1)),),
        (BLE,),
    ),
    "encoder layer, whole mask": Case(
        lambda: encoder_layer(bias=False, activation=nn.Tanh()),
        lambda model, sources, cut: (model(cut(sources[0], 0), src_mask=full_mask(LENGTH, LENGTH)),),
        (LBE,),
        0,
    ),
    "decoder": Case(lambda: nn.TransformerDecoder(decoder_layer(batch_first=True), 2), decode, (BLE, BSE)),
    "transformer": Case(
        lambda: nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, 0.0, batch_first=False), seq_to_seq, (SBE, LBE), 0
    ),
    "attention with weights": Case(attention(), attend(key_padding_mask=padding()), (BLE,)),
    "attention with weights by head": Case(
        attention(add_bias_kv=True),
        attend(average_attn_weights=False, attn_mask=full_mask(BATCH * HEADS, LENGTH, LENGTH)),
        (BLE,),
    ),
    "learned and zero keys": Case(
        attention(add_bias_kv=True, add_zero_attn=True),
        attend(
            need_weights=False,
            is_causal=True,
            attn_mask=lambda cut, x: causal(x, 1).bool(),
            key_padding_mask=lambda cut, x: cut(padding(), 1),
        ),
        (BLE,),
    ),
    "unlike inputs": Case(
        attention(kdim=6, vdim=10, batch_first=False), cross, (LBE, (2 * LENGTH, BATCH, 6), (2 * LENGTH, BATCH, 10)), 0
    ),
    "one tensor as keys and values": Case(
        attention(bias=False),
        lambda model, sources, cut: model(cut(sources[0], 1), (m := cut(sources[1], 1)), m, need_weights=False)[:1],
        (BLE, BSE),
    ),
    "unbatched": Case(attention(), unbatched, ((LENGTH, WIDTH),), 0),
}  # fmt: skip


def forward(axes: dict[str, int]) -> None:
    ctx = context_of(axes)
    degree, rank = ctx.degree("context"), ctx.rank("context")

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(degree, dim)[rank]

    for name, case in CASES.items():
        torch.manual_seed(3)
        model = case.build().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        sources = [torch.randn(shape, dtype=torch.float64) for shape in case.shapes]
        mine = split(copy.deepcopy(model), ctx)
        assert list(mine.state_dict()) == list(model.state_dict())
        wanted = [source.clone().requires_grad_() for source in sources]
        expected = case.call(model, wanted, lambda tensor, dim: tensor)
        factors = [torch.randn_like(output) for output in expected]
        sum((output * factor).sum() for output, factor in zip(expected, factors)).backward()
        given = [source.clone().requires_grad_() for source in sources]
        found = case.call(mine, given, cut)
        dims = [case.dim, *[1 if len(case.shapes[0]) == 3 else 0] * (len(found) - 1)]
        for output, reference, dim in zip(found, expected, dims, strict=True):
            close(output, cut(reference, dim), f"{name}: output")
        sum((out * cut(factor, dim)).sum() for out, factor, dim in zip(found, factors, dims)).backward()
        layouts = packed_parameters(mine)
        reference_grads = {key: value.grad for key, value in model.named_parameters()}
        for key, value in mine.named_parameters():
            assert value.shape == model.get_parameter(key).shape
            close(whole(value.detach(), layouts.get(key)), model.get_parameter(key).detach(), f"{name}: {key}")
            gradient = whole(value.grad, layouts.get(key))
            close(ctx.all_reduce(gradient.clone(), "context"), reference_grads[key], f"{name}: gradient of {key}")
        for index, (source, reference) in enumerate(zip(given, wanted)):
            close(ctx.all_reduce(source.grad, "context"), reference.grad, f"{name}: gradient of input {index}")
        model.eval(), mine.eval()
        with torch.no_grad():  # where torch would take its fused path
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            expected = case.call(model, sources, lambda tensor, dim: tensor)
            torch.backends.mha.set_fastpath_enabled(before)
            close(case.call(mine, sources, cut)[0], cut(expected[0], case.dim), f"{name}: evaluated output")


# ---------------------------------------------------------------- training

VOCABULARY, UPDATES = 11, 20
FSDP = dict.fromkeys(("module_classes", "reshard_after_forward", "mp_policy", "offload_policy"))


class Language(nn.Module):
    """A causal language model whose positions count from where the part of this rank begins."""

    def __init__(self) -> None:
        super().__init__()
        self.ctx: Any = None
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.encoder = stack(encoder_layer(batch_first=True, norm_first=True))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def parallelize(self, ctx: Any) -> nn.Module:
        self.ctx = ctx  # where parts of sequences begin; layers are left to the built-in plans
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        start = 0 if self.ctx is None else self.ctx.context_offset
        places = torch.arange(start, start + tokens.shape[1])
        x = self.embed(tokens) + self.positions(places)
        logits = self.head(self.encoder(x, mask=causal(x, 1), is_causal=True))
        return logits.transpose(1, 2).contiguous()


def batches(rows: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        text = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator)
        target = text[:, 1:].clone()
        target[0, :3] = -100  # the ranks' parts have unequal numbers of targets
        yield text[:, :-1], target


def optimizers(model: nn.Module, ctx: Any, index: int) -> OptimizerStep:
    parameters = list(model.parameters())
    made = (
        lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        lambda: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    )[index]()
    return OptimizerStep(made, clip_norm=(0.5, math.inf)[index])


def mixtures() -> nn.Module:
    """The example of the docs: it has a hook for its experts."""
    path = Path(__file__).parents[3] / "docs" / "examples" / "experts.py"
    return runpy.run_path(str(path))["Language"](VOCABULARY, WIDTH, HEADS, 4, HIDDEN)


def experts(axes: dict[str, int]) -> None:
    train(axes, mixtures)


def train(axes: dict[str, int], build: Callable[[], nn.Module] = Language) -> None:
    ctx = context_of(axes)
    ranks, rank = ctx.degree("data"), ctx.rank("data")
    for index in (0, 1):
        torch.manual_seed(1)
        model = build().double()
        mine = parallelize_part(copy.deepcopy(model), ctx)
        sharded = ctx.degree("shard") > 1
        if sharded:
            shard_model(mine, data_mesh(ctx), FSDP)
        reference, update = optimizers(model, None, index), optimizers(mine, ctx, index)
        layouts = packed_parameters(mine)
        criterion = nn.CrossEntropyLoss(reduction="sum")
        for tokens, target in batches(2 * ranks):
            total = (target != -100).sum()
            loss = criterion(model(tokens), target) / total
            loss.backward()
            expected = reference.step()
            part = shard_context((tokens.chunk(ranks)[rank], target.chunk(ranks)[rank]), ctx)
            mine_loss = criterion(mine(part[0]), part[1]) / total
            (mine_loss * (ctx.degree("loss") if sharded else 1)).backward()
            if not sharded:  # FSDP2 averages over the `loss` domain; without it the sum is taken here
                for parameter in mine.parameters():
                    gradient = parameter.grad
                    ctx.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient, "loss")
            result = update.step()
            close(ctx.all_reduce(mine_loss.detach(), "loss"), loss.detach(), "loss")
            close(result.grad_norm, expected.grad_norm, "gradient norm", 1e-6)
        assert [name for name, _ in mine.named_parameters()] == [name for name, _ in model.named_parameters()]
        for name, value in mine.named_parameters():
            close(
                whole(value.detach(), layouts.get(name)), model.get_parameter(name).detach(), f"{name} after training"
            )


def ragged() -> None:
    """Layers split over tensor ranks take ragged batches as whole ones do, packed."""
    import danling.tensors
    from danling.tensors import NestedTensor

    ctx = context_of({"tensor": 2})
    torch.manual_seed(2)
    model = encoder_layer(batch_first=True).double()
    mine = split(copy.deepcopy(model), ctx)
    rows = [torch.randn(length, WIDTH, dtype=torch.float64) for length in (3, 5, 1)]
    results = []
    with danling.tensors.strict():
        for layer in (model, mine):
            sources = [row.clone().requires_grad_() for row in rows]
            output = layer(NestedTensor(*sources)).concat
            output.square().sum().backward()
            results.append([output.detach(), *(source.grad for source in sources)])
    for expected, found in zip(*results, strict=True):
        close(found, expected, "ragged")
    layouts = packed_parameters(mine)
    for name, value in mine.named_parameters():
        close(whole(value.grad, layouts.get(name)), model.get_parameter(name).grad, f"ragged: gradient of {name}")


class Plain(nn.Module):
    """Linear layers, split by styles of torch's that the model names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def build_parallel_plan(self, ctx: Any) -> dict[str, Any]:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.one_hot(tokens % WIDTH, WIDTH).to(self.up.weight.dtype)
        return self.down(self.up(x).relu()).transpose(1, 2).contiguous()


def styles(axes: dict[str, int]) -> None:
    train(axes, Plain)


def vocabulary() -> None:
    """Losses and gradients of a head whose classes are split are those of the whole head."""
    ctx = context_of({"tensor": 2})
    torch.manual_seed(2)
    x, target = torch.randn(3, 5, WIDTH, dtype=torch.float64), torch.randint(12, (3, 5))
    target[0, :2] = -100
    target[1, 0] = 7
    for options in (
        {},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"weight": torch.rand(12).double(), "ignore_index": 7},
    ):
        if options.get("ignore_index") == 7:
            target = target.clamp(min=0)
        head = nn.Linear(WIDTH, 12).double()
        mine = split_columns(copy.deepcopy(head), ctx)
        results = []
        for module, criterion in (
            (head, nn.CrossEntropyLoss(**options)),
            (mine, SplitCrossEntropy(ctx, **options)),
        ):
            source = x.clone().requires_grad_()
            loss = criterion(module(source).transpose(1, 2), target)
            loss.square().sum().backward()
            gradients = [whole(value.grad, None) for value in module.parameters()]
            results.append([loss.detach(), source.grad, *gradients])
        for index, (expected, found) in enumerate(zip(*results, strict=True)):
            close(found, expected, f"{options}: value {index}")


# ---------------------------------------------------------------- checkpoints


class Save(DefaultSavePlanner):
    """Looks up parts of objects that are no tensors."""

    def lookup_object(self, index: Any) -> Any:
        value = self.state_dict[index.fqn]
        return super().lookup_object(index) if isinstance(value, Tensor) else value.__get_tensor_shard__(index)


class Load(DefaultLoadPlanner):
    """Looks up parts of objects that are no tensors, and keeps them: DCP's own replaces what it does not know by None."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: Any) -> Any:
        value = self.state_dict[index.fqn]
        return super().lookup_tensor(index) if isinstance(value, Tensor) else value.__get_tensor_shard__(index)


def checkpoint(axes: dict[str, int]) -> None:
    """DCP writes the unsplit model's names, shapes and order, and reads them back into any split."""
    ctx = context_of(axes)
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(path)

    def build(seed: int, sharded: bool) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(seed)
        model = Language()
        mine = split(copy.deepcopy(model), ctx)
        if sharded:
            shard_model(mine, data_mesh(ctx), FSDP)
        return model, mine

    def state_of(model: nn.Module) -> dict[str, Any]:
        layouts = packed_parameters(model)
        return {
            name: PackedShard(value, *layouts[name]) if name in layouts else value
            for name, value in model.state_dict().items()
        }

    model, mine = build(1, ctx.degree("shard") > 1)
    assert len(packed_parameters(mine)) == 4
    dcp.save(state_of(mine), checkpoint_id=path[0], planner=Save())
    torch.manual_seed(2)
    unsplit = Language()
    dcp.load(unsplit.state_dict(), checkpoint_id=path[0])
    for name, value in unsplit.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    _, other = build(3, True)
    dcp.load(state_of(other), checkpoint_id=path[0], planner=Load())
    layouts = packed_parameters(other)
    for name, value in other.state_dict().items():
        assert torch.equal(whole(value, layouts.get(name)), model.state_dict()[name]), name


# ---------------------------------------------------------------- random numbers


def equal_on_all_ranks(value: Tensor) -> bool:
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value.contiguous())
    return all(torch.equal(other, value) for other in gathered)


def dropout() -> None:
    """Masks of split activations differ between tensor ranks, those of replicated ones and the generators do not."""
    ctx = context_of({"tensor": 2})
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(64, HEADS, 256, 0.5, batch_first=True).double()
    split(layer, ctx)
    x = torch.randn(4, 16, 64, dtype=torch.float64)
    hidden = torch.ones(64, 128)
    torch.manual_seed(5)
    kept = layer.dropout(hidden)
    assert not equal_on_all_ranks(kept) and 0.4 < (kept > 0).double().mean() < 0.6
    assert equal_on_all_ranks(torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(layer.dropout(hidden), kept)
    assert not torch.equal(layer.dropout(hidden), kept)
    _, weights = layer.self_attn(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    assert equal_on_all_ranks(dropped) and 0.4 < dropped.double().mean() < 0.6
    assert not torch.equal(dropped[:, 0], dropped[:, HEADS // 2])
    outputs = []
    for checkpointed in (False, True):
        torch.manual_seed(6)
        source = x.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(layer, source, use_reentrant=False) if checkpointed else layer(source)
        out.square().sum().backward()
        assert equal_on_all_ranks(out.detach()) and equal_on_all_ranks(source.grad)
        outputs.append((out.detach(), source.grad))
    for plain, again in zip(*outputs, strict=True):
        close(again, plain, "a layer that is computed again")
    layer.eval()
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- torch's ring attention, compile


def ring() -> None:
    """torch's ring attention, with the kernels that it has on this device, gives what gathered keys give."""
    from danling.backends.parallel.plans import attention
    from danling.backends.parallel.plans.ring import ring_applies

    ctx = context_of({"context": 2})
    for is_causal in (False, True):
        torch.manual_seed(7)
        model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        x = torch.randn(BATCH, LENGTH, WIDTH).chunk(2, 1)[ctx.rank("context")].contiguous()
        apply_context_plan(model, ctx)
        results = []
        for applies in (ring_applies, lambda *args: True):
            attention.ring_applies = applies
            source = x.clone().requires_grad_()
            mask = causal(x, 1) if is_causal else None
            out = model(source, source, source, attn_mask=mask, is_causal=is_causal, need_weights=False)[0]
            out.square().sum().backward()
            results.append([out.detach(), source.grad, *(value.grad.clone() for value in model.parameters())])
            model.zero_grad()
        attention.ring_applies = ring_applies
        for index, (gathered, passed_round) in enumerate(zip(*results, strict=True)):
            close(passed_round, gathered, f"causal {is_causal}, value {index}", 2e-5)


def compiled(axes: dict[str, int]) -> None:
    """A split model compiles, and computes what it computes without, dropout included."""
    ctx = context_of(axes)
    torch.manual_seed(8)
    model = Language().double()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.25
        elif isinstance(module, nn.Dropout):
            module.p = 0.25
    model = parallelize_part(model, ctx)
    tokens, target = shard_context(next(batches(2)), ctx)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(9)
        loss = nn.functional.cross_entropy(run(tokens), target)
        loss.backward()
        results.append([loss.detach(), *(local_tensor(value.grad).clone() for value in model.parameters())])
    for eager, again in zip(*results, strict=True):
        close(again, eager, "compiled")


# ---------------------------------------------------------------- running


def parse(text: str) -> dict[str, int]:
    return {axis: int(degree) for axis, _, degree in (item.partition("=") for item in text.split(",") if item)}


def main(scenarios: list[str]) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for scenario in scenarios:
        name, _, options = scenario.partition(":")
        globals()[name](*[parse(options)] if options else [])
        dist.barrier()
        print("passed", scenario, flush=True)
        print(f"{time.process_time():.1f} s of CPU", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
