"""Gate d: what a call on a NestedTensor takes more than the same call on its packed values, in microseconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, jagged, parts_of

pytestmark = MARKS
LENGTHS = [16, 3, 9, 12, 7, 16, 1, 5]
WIDTH = 32
LINEAR, NORM = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "x + y": lambda x: x + x,
    "linear": LINEAR,
    "layer_norm": NORM,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["inference", "grad"])
def test_call(board: Board, name: str, mode: str) -> None:
    call, parts = CALLS[name], parts_of(LENGTHS, WIDTH)
    batch, theirs = NestedTensor(parts), jagged(parts)
    values = batch.concat.detach().clone()
    if mode == "grad":
        batch.requires_grad_()
        values.requires_grad_()
        theirs.requires_grad_()
    case, against = f"{name}, {mode} mode", "the call on packed values"
    with torch.inference_mode(mode == "inference"):
        torch.testing.assert_close(call(batch).concat, call(values))
        board.peer(
            "d", case, "torch.nested (jagged)", against, lambda: call(theirs), lambda: call(values), difference=True
        )
        board.gate("d", case, "NestedTensor", against, 5.0, lambda: call(batch), lambda: call(values), difference=True)
