"""Gate b: packed to padded over a copy of the padded result."""

from __future__ import annotations

import pytest
import torch

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, OCCUPANCIES, SIZES, jagged, lengths_of, op, parts_of

pytestmark = MARKS


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("occupancy", OCCUPANCIES)
def test_packed_to_padded(board: Board, width: int, occupancy: float) -> None:
    elements, longest = SIZES[width]
    parts = parts_of(lengths_of(elements, longest, occupancy), width)
    batch, theirs = NestedTensor(parts), jagged(parts)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    assert batch.tensor.equal(padded)
    values, offsets = batch.concat, batch.structure.offsets
    to_padded = op("_jagged_to_padded_dense_forward")
    case, against = f"{elements} x {longest} x {width}, occupancy {occupancy}", "padded.clone()"
    stock = to_padded and (lambda: to_padded(values, [offsets], [longest], 0.0))
    board.peer("b", case, "torch._jagged_to_padded_dense_forward", against, stock, padded.clone)
    board.peer("b", case, "torch.nested to_padded_tensor", against, lambda: theirs.to_padded_tensor(0.0), padded.clone)
    board.peer(
        "b",
        case,
        "pad_sequence",
        against,
        lambda: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        padded.clone,
    )
    board.gate("b", case, "NestedTensor.tensor", against, 1.3, lambda: batch.tensor, padded.clone)
