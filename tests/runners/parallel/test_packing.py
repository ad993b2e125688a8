"""Rows of packed parameters: rank order and back, and the places of any piece of them."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from danling.backends.parallel.plans import packed_parameters, to_rank_order, to_usual_order
from danling.backends.parallel.plans.packing import mark_packed, runs_of

layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))


@given(layouts, st.integers(0, 2))
def test_orders_are_inverse_and_give_each_rank_its_part_of_every_matrix(layout, columns) -> None:
    blocks, degree, piece = layout
    whole = torch.arange(blocks * degree * piece)
    if columns:
        whole = whole[:, None] * 10 + torch.arange(columns)
    ranked = to_rank_order(whole, blocks, degree)
    assert torch.equal(to_usual_order(ranked, blocks, degree), whole)
    for rank, mine in enumerate(ranked.chunk(degree)):
        assert torch.equal(mine, torch.cat([block.chunk(degree)[rank] for block in whole.chunk(blocks)]))


@given(layouts, st.data())
def test_runs_are_where_the_rows_are(layout, data) -> None:
    blocks, degree, piece = layout
    rows = blocks * degree * piece
    start = data.draw(st.integers(0, rows))
    length = data.draw(st.integers(0, rows - start))
    whole = torch.arange(rows)
    here = to_rank_order(whole, blocks, degree)[start : start + length]
    runs = runs_of(rows, start, length, blocks, degree)
    assert sum(run.length for run in runs) == length
    for run in runs:
        assert torch.equal(here[run.local : run.local + run.length], whole[run.row : run.row + run.length])


def test_names_of_packed_parameters_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(1, 1))
    assert packed_parameters(model) == {}
    mark_packed(model[0], "in_proj_weight", 3, 2)
    assert packed_parameters(model) == {"0.in_proj_weight": (3, 2)}
    assert packed_parameters(model[0]) == {"in_proj_weight": (3, 2)}
    assert packed_parameters(copy.deepcopy(model)) == {"0.in_proj_weight": (3, 2)}
