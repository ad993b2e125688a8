"""What plans refuse, and what they say; no processes needed."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danling.backends.parallel import ParallelTopology
from danling.backends.parallel.context import ParallelContext
from danling.backends.parallel.parallelize import NoPlanError, parallelize_part
from danling.backends.parallel.plans import (
    SplitCrossEntropy,
    apply_context_plan,
    apply_tensor_plan,
    shard_context,
    split_columns,
    split_rows,
)
from danling.runners.errors import ConfigError


class Context(ParallelContext):
    """A context without processes: plans that refuse come before anything that needs them."""

    def __init__(self, rank: int = 0, **degrees: int) -> None:
        self.topology = ParallelTopology(degrees, torch.tensor(list(degrees.values())).prod().item(), rank)
        self.mesh: Any = None
        self.context_offset, self.sequence_dim = 0, None
        self._taken: set[str] = set()

    def group(self, domain: str) -> Any:
        return None


def layer(width: int = 8, heads: int = 4, hidden: int = 12, **options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, heads, hidden, **options)


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def tied() -> nn.Module:
    model = nn.ModuleDict({"layer": layer(), "other": nn.Linear(8, 12)})
    model["other"].weight = model["layer"].linear1.weight
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(layer(heads=2)), ("0.self_attn", "2 heads", "4 ranks")),
        (lambda: layer(hidden=10), ("TransformerEncoderLayer", "10 hidden units", "4 ranks")),
        (lambda: nn.MultiheadAttention(9, 3), ("MultiheadAttention", "3 heads", "4 ranks")),
        (lambda: layer(activation=Mixing()), ("activation", "mixes hidden units", "parallelize")),
        (lambda: layer(activation=nn.PReLU()), ("activation", "parameters", "parallelize")),
        (lambda: layer(activation=nn.Softmax(-1)), ("activation", "parallelize")),
        (tied, ("other.weight", "tied")),
    ],
)
def test_layers_that_do_not_divide(build: Any, words: tuple[str, ...]) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError) as refused:
        apply_tensor_plan(model, Context(tensor=4))
    for word in ("parallel.axes.tensor", *words):
        assert word in str(refused.value)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_that_a_model_splits_itself() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.axes\.tensor: 4 does not divide the 6 output features"):
        split_columns(nn.Linear(8, 6), Context(tensor=4))
    with pytest.raises(ConfigError, match=r"parallel\.axes\.expert_tensor: 3 does not divide the 8 input features"):
        split_rows(nn.Linear(8, 6), Context(expert_tensor=3), "expert_tensor")
    with pytest.raises(ValueError, match="not both"):
        SplitCrossEntropy(Context(tensor=2), weight=torch.ones(4), label_smoothing=0.1)


def test_split_linear_layers_keep_out_of_fp8() -> None:
    from danling.backends.parallel.plans.linear import Columns
    from danling.backends.parallel.plans.modules import become
    from danling.backends.torch.fp8 import fits

    linear = nn.Linear(32, 32)
    assert fits(linear)
    become(linear, Columns)
    assert isinstance(linear, nn.Linear) and not fits(linear)


def test_nothing_to_split() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert not apply_tensor_plan(model, Context(tensor=2))
    assert not apply_context_plan(model, Context(context=2))


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.GRU(8, 8), ("GRU",)),
        (nn.Conv1d(8, 8, 3), ("Conv1d",)),
        (Own(8, 2), ("Own",)),
        (nn.MultiheadAttention(8, 2, batch_first=True), ("batch_first",)),
    ],
)
def test_layers_that_mix_positions(other: nn.Module, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        apply_context_plan(nn.ModuleDict({"layer": layer(), "other": other}), Context(context=2))
    for word in ("parallel.axes.context", "other", *words):
        assert word in str(refused.value)


def test_convolutions_of_one_position_and_embeddings_are_fine() -> None:
    ctx = Context(context=2)
    assert apply_context_plan(nn.ModuleList([nn.Conv1d(8, 8, 1), nn.Embedding(3, 8), layer(batch_first=True)]), ctx)
    assert ctx.sequence_dim == 1


# ---------------------------------------------------------------- the model's hook


class Hooked(nn.Module):
    """A model whose hook does what it is told."""

    def __init__(self, took: tuple[str, ...] = (), result: Any = None) -> None:
        super().__init__()
        self.layer = layer(batch_first=True)
        self.took, self.result = took, result

    def parallelize(self, ctx: ParallelContext) -> Any:
        ctx.took(*self.took)
        return self if self.result is None else self.result


class Styled(nn.Module):
    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.linear, self.plan = nn.Linear(4, 4), plan

    def build_parallel_plan(self, ctx: ParallelContext) -> Any:
        return self.plan


def test_a_hook_that_returns_no_module() -> None:
    with pytest.raises(TypeError, match=r"Hooked\.parallelize\(ctx\) must return a torch\.nn\.Module, got str"):
        parallelize_part(Hooked(("tensor",), "model"), Context(tensor=2))
    with pytest.raises(TypeError, match="mapping of names to styles, got list"):
        parallelize_part(Styled(["linear"]), Context(tensor=2))


@pytest.mark.parametrize("axis", ["tensor", "context", "expert", "expert_tensor"])
def test_an_axis_that_nothing_takes(axis: str) -> None:
    for model in (nn.Linear(2, 2), Styled({})):
        with pytest.raises(NoPlanError) as refused:
            parallelize_part(model, Context(**{axis: 2}))
        assert isinstance(refused.value, ConfigError) and isinstance(refused.value, NotImplementedError)
        assert f"parallel.axes.{axis}: 2" in str(refused.value) and "parallelize(ctx)" in str(refused.value)


def test_a_hook_reports_what_it_took_and_plans_do_the_rest() -> None:
    model, ctx = Hooked(("expert", "tensor")), Context(expert=2, tensor=2)
    assert parallelize_part(model, ctx) is model and ctx.taken == {"expert", "tensor"}
    assert type(model.layer.self_attn) is nn.MultiheadAttention  # the hook's own business
    model, ctx = Hooked(), Context(context=2)
    assert parallelize_part(model, ctx) is model and ctx.taken == {"context"}
    assert type(model.layer.self_attn) is not nn.MultiheadAttention


def test_stages_of_one_rank_are_each_split() -> None:
    ctx = Context(context=2, pipeline=2)
    stages = [Hooked(), nn.Linear(2, 2), Hooked()]
    for stage in stages:
        parallelize_part(stage, ctx)  # a stage without layers to split is fine: another one has them
    assert type(stages[0].layer.self_attn) is type(stages[2].layer.self_attn) is not nn.MultiheadAttention


# ---------------------------------------------------------------- batches

Pair = collections.namedtuple("Pair", "left right")


def numbers(*shape: int) -> Tensor:
    return torch.arange(torch.tensor(shape).prod().item()).view(shape)


def test_batches_are_cut_where_the_sequence_is() -> None:
    ctx = Context(rank=1, context=2)
    ctx.sequence_dim = 1
    tokens, target = numbers(3, 8), numbers(3, 8, 2)
    cut = shard_context((tokens, target, numbers(3)), ctx)
    assert type(cut) is tuple and ctx.context_offset == 4
    assert torch.equal(cut[0], tokens[:, 4:]) and torch.equal(cut[1], target[:, 4:]) and cut[2].shape == (3,)
    cut = shard_context({"input": {"tokens": tokens, "name": "x"}, "target": None, "more": tokens}, ctx)
    assert torch.equal(cut["input"]["tokens"], tokens[:, 4:]) and cut["input"]["name"] == "x"
    assert cut["target"] is None and cut["more"] is tokens
    cut = shard_context([Pair(tokens, [target]), target], ctx)
    assert type(cut) is list and type(cut[0]) is Pair and torch.equal(cut[0].right[0], target[:, 4:])
    ctx.sequence_dim = 0
    assert torch.equal(shard_context(numbers(6, 2), ctx), numbers(6, 2)[3:]) and ctx.context_offset == 3
    assert shard_context((tokens, target), Context(replicate=2))[0] is tokens


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((numbers(2, 7), numbers(2, 7)), ("input", "7 positions", "parallel.axes.context: 2")),
        ((numbers(2, 8), numbers(2, 5)), ("target", "5 positions")),
        ((numbers(2, 8), numbers(2)), ("target", "shape (2,)", "shard_context")),
        ({"input": {"a": numbers(2, 8), "b": numbers(8)}}, ("input.b", "shape (8,)")),
    ],
)
def test_batches_that_cannot_be_cut(batch: Any, words: tuple[str, ...]) -> None:
    ctx = Context(context=2)
    ctx.sequence_dim = 1
    with pytest.raises(ValueError) as refused:
        shard_context(batch, ctx)
    for word in words:
        assert word in str(refused.value)


def test_ragged_batches_cannot_be_cut() -> None:
    from danling.tensors import NestedTensor

    with pytest.raises(ValueError, match="input is ragged"):
        shard_context((NestedTensor(torch.ones(3), torch.ones(5)), None), Context(context=2))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"attn_mask": torch.zeros(3, 5)}, ("attn_mask", "(3, 5)", "4 queries", "4 keys")),
        ({"attn_mask": torch.zeros(5, 4, 4)}, ("5", "4")),
        ({"key_padding_mask": torch.zeros(2, 3)}, ("key_padding_mask", "(2, 3)", "2 sequences", "4 keys")),
        ({"is_causal": True}, ("is_causal", "attn_mask")),
        ({"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}, ("boolean", "int64")),
    ],
)
def test_masks_of_other_shapes(masks: dict[str, Any], words: tuple[str, ...]) -> None:
    from danling.backends.parallel.plans import attention
    from danling.backends.parallel.plans.modules import become

    model = nn.MultiheadAttention(8, 4, batch_first=True)
    become(model, attention.Split)
    x = torch.ones(2, 4, 8)
    with pytest.raises((ValueError, RuntimeError, TypeError)) as refused:
        model(x, x, x, **masks)
    for word in words:
        assert word in str(refused.value)
