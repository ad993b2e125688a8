"""How models are cut into stages and batches into microbatches, and what is refused; no processes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danling.backends.parallel.microbatches import (
    Plan,
    merge_outputs,
    plan_microbatches,
    signature,
    take_rows,
)
from danling.backends.parallel.schedule import (
    SCHEDULES,
    check_microbatch_count,
    count_stages,
    schedule_name,
    stage_indices,
)
from danling.backends.parallel.stages import check_stages, cut_by_names, even_split, sequential_names, state_names
from danling.backends.torch.data import build_dataloader
from danling.backends.torch.sampler import build_sampler
from danling.runners.errors import ConfigError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_an_even_split_is_the_best_there_is(sizes, parts):
    filled = sum(size > 0 for size in sizes)
    if filled < parts:
        with pytest.raises(ConfigError, match="too few for"):
            even_split(sizes, parts)
        return
    split = even_split(sizes, parts)
    assert [index for part in split for index in part] == list(range(len(sizes)))
    sums = [sum(sizes[index] for index in part) for part in split]
    assert all(sums)
    best = min(
        max(sum(sizes[a:b]) for a, b in zip((0, *cuts), (*cuts, len(sizes)), strict=True))
        for cuts in combinations(range(1, len(sizes)), parts - 1)
    )
    assert max(sums) == best


def test_an_even_split_keeps_what_has_no_parameters_with_what_precedes_it():
    layers = [nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(), nn.ReLU()]
    assert sequential_names(nn.Sequential(*layers), 2) == [["0", "1", "2"], ["3", "4", "5"]]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_microbatches_together_are_the_batch(rows, count, size):
    full = max(rows, count * size)
    plan = plan_microbatches(rows, None if full % count else full, count, 1)
    batch = {"x": torch.arange(rows * 2).view(rows, 2), "ids": [str(i) for i in range(rows)], "scale": 2.0}
    pieces = [take_rows(batch, rows, i * plan.size, (i + 1) * plan.size) for i in range(plan.count)]
    assert all(len(piece["x"]) == len(piece["ids"]) == plan.size and piece["scale"] == 2.0 for piece in pieces)
    assert sum(plan.kept(i) for i in range(plan.count)) == rows
    kept = [
        (take_rows(piece, plan.size, 0, plan.kept(i)), plan.kept(i)) for i, piece in enumerate(pieces) if plan.kept(i)
    ]
    merged = merge_outputs([{**piece, "mean": piece["x"].double().mean()} for piece, _ in kept], [n for _, n in kept])
    assert torch.equal(merged["x"], batch["x"]) and merged["ids"] == batch["ids"] and merged["scale"] == 2.0
    torch.testing.assert_close(merged["mean"], batch["x"].double().mean())


def test_outputs_keep_their_structure():
    class Pair(dict):
        pass

    halves = [Pair(a=(torch.full((2, 1), float(i)), [torch.ones(2, 3)]), name="x") for i in range(2)]
    merged = merge_outputs(halves, [2, 2])
    assert type(merged) is Pair and merged["name"] == "x"
    assert merged["a"][0].tolist() == [[0.0], [0.0], [1.0], [1.0]] and merged["a"][1][0].shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((7, 8, 3, 1), "8 rows.*pipeline_n_microbatches = 3"), ((7, 8, None, 3), "8 rows.*pipeline_microbatch_size = 3")],
)
def test_batches_that_cannot_be_cut(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan_microbatches(*arguments)


def test_signatures_tell_shapes_apart():
    x = torch.zeros(2, 3)
    different = [x, x[:, :2], x.long(), (x,), {"x": x}, {"y": x}, (x, x), (x, None)]
    assert len({signature(value) for value in different}) == len(different)
    assert Plan(4, 2, 5).kept(2) == 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5, bias=False)
        self.register_buffer("scale", torch.ones(()))


def test_parts_keep_the_names_of_the_whole_model():
    model = Model()
    parts = cut_by_names(model, [["embed", "layers.0"], ["layers.1", "layers.2", "head"]], [1])
    assert list(parts) == [1] and isinstance(parts[1].layers, nn.ModuleList)
    assert state_names(parts[1]) == [
        "layers.1.weight",
        "layers.1.bias",
        "layers.2.weight",
        "layers.2.bias",
        "head.weight",
    ]
    assert parts[1].get_parameter("layers.1.weight") is model.layers[1].weight
    x = torch.randn(2, 4)
    assert torch.equal(parts[1](x), model.head(model.layers[2](model.layers[1](x))))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([["embed"], []], "stage 1 is empty"),
        ([["embed"], ["laters.0"]], "'laters.0'.*did you mean 'layers.0'"),
        ([["embed", "head"], ["head"]], "'head' of stage 1 overlaps with 'head' of stage 0"),
        ([["layers"], ["layers.1"]], "'layers.1' of stage 1 overlaps with 'layers' of stage 0"),
    ],
)
def test_named_parts_that_do_not_fit(names, message):
    with pytest.raises(ConfigError, match=message):
        cut_by_names(Model(), names, [0, 1])


WHOLE = ["a.weight", "a.bias", "b.weight"]


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ({0: WHOLE, 1: []}, {}, "stage 1 of 2 is empty"),
        ({0: ["a.weight"], 1: ["b.weight"]}, {"whole": WHOLE}, "no pipeline stage holds 'a'"),
        ({0: WHOLE, 1: ["0.weight"]}, {"whole": WHOLE}, "stage 1 stores '0.weight'"),
        ({0: WHOLE, 1: ["b.weight"]}, {"whole": WHOLE}, "'b.weight' would be trained apart on pipeline stages 0, 1"),
        (
            {0: WHOLE[:2], 1: WHOLE[2:]},
            {"whole": WHOLE, "shared": [{"a.weight", "b.weight"}]},
            "'a.weight' and 'b.weight' would be trained apart.*_tied_weights_keys",
        ),
    ],
)
def test_stages_that_do_not_hold_the_model_once(stages, options, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(stages, **options)


def test_declared_ties():
    assert check_stages({0: WHOLE, 1: ["b.weight"]}, whole=WHOLE, tied=["b.weight"]) == [{0: "b.weight", 1: "b.weight"}]
    assert check_stages({0: WHOLE[:2], 1: WHOLE[2:]}, shared=[{"a.weight", "a.bias"}]) == []  # on one stage


def test_schedules_by_name():
    for name in SCHEDULES:
        assert schedule_name(name.upper()) == name
    with pytest.raises(ConfigError, match="'PipeDream'.*1F1B, GPipe, .*DualPipeV"):
        schedule_name("PipeDream")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_every_stage_has_one_rank(name, degree):
    count = count_stages(name, degree)
    found = [stage for rank in range(degree) for stage in stage_indices(name, rank, degree, count)]
    assert sorted(found) == list(range(count)) and count in (degree, 2 * degree)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("LoopedBFS", 2, 3), "3 stages, no multiple of the 2 ranks"),
        (("1F1B", 2, 4), "4 stages for 2 ranks, but the schedule 1F1B runs one stage per rank"),
        (("DualPipeV", 2, 6), "6 stages for 2 ranks, but the schedule DualPipeV runs two stages per rank"),
    ],
)
def test_numbers_of_stages_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        count_stages(*arguments)


def test_numbers_of_microbatches():
    with pytest.raises(ConfigError, match="DualPipeV needs at least.*3 microbatches, 4 stages"):
        check_microbatch_count("DualPipeV", 3, 4, 2)
    with pytest.raises(ConfigError, match="Interleaved1F1B.*2 rounds, but 5 microbatches"):
        check_microbatch_count("Interleaved1F1B", 5, 4, 2)
    assert "bubbles" in check_microbatch_count("GPipe", 3, 4, 4)
    assert check_microbatch_count("GPipe", 4, 4, 4) is None


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index + torch.rand(2), torch.rand(())


class NoisyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(index + torch.rand(2), torch.rand(())) for index in torch.randperm(6)])


def mixed(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x + torch.rand(()), y


@pytest.mark.parametrize("data", [Noisy(), NoisyStream()], ids=["map-style", "iterable"])
@pytest.mark.parametrize("workers", [0, 1])
def test_whoever_reads_the_same_batch_augments_it_alike(workers, data):
    """In the process, whose generators stay as they are, as in workers."""

    def read(workers, seed):
        torch.manual_seed(seed)
        common = {"seed": 1, "train": True}
        sampler, options, collate = None, {"num_workers": workers, "batch_size": 2}, None
        if isinstance(data, Noisy):
            options.pop("batch_size")
            collate = mixed
            sampler = build_sampler(
                data, "train", shuffle=True, drop_last=False, batch_size=2, data_rank=0, data_ranks=1, **common
            )
        loader = build_dataloader(data, "train", options, sampler, collate, shared=True, **common)
        batches = [torch.cat([x.flatten(), y]).tolist() for x, y in loader]
        return batches, torch.rand(1).item()

    batches, drawn = read(workers, seed=5)
    again, other = read(workers if isinstance(data, NoisyStream) else 0, seed=6)  # each worker has its part of a stream
    torch.manual_seed(5)
    assert batches == again and len({tuple(batch) for batch in batches}) == 3
    assert drawn == torch.rand(1).item() != other
