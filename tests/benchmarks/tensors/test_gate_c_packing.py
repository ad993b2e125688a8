"""Gates c1 and c2: padded to packed, by lengths and by mask, over a copy of the packed result."""

from __future__ import annotations

import pytest
import torch

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, OCCUPANCIES, SIZES, lengths_of, op, parts_of

pytestmark = MARKS


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("occupancy", OCCUPANCIES)
def test_padded_to_packed(board: Board, width: int, occupancy: float) -> None:
    elements, longest = SIZES[width]
    numbers = lengths_of(elements, longest, occupancy)
    parts = parts_of(numbers, width)
    batch, lengths = NestedTensor(parts), torch.tensor(numbers)
    padded, mask = batch.tensor_mask
    values, offsets, rows = batch.concat, batch.structure.offsets, batch.structure.rows
    assert NestedTensor.from_padded(padded, lengths).concat.equal(values)
    assert NestedTensor.from_tensor_mask(padded, mask).concat.equal(values)
    case = f"{elements} x {longest} x {width}, occupancy {occupancy}"
    to_jagged = op("_padded_dense_to_jagged_forward")
    stock = to_jagged and (lambda: to_jagged(padded, [offsets], rows))
    against = "values.clone()"
    board.peer("c1", case, "torch._padded_dense_to_jagged_forward", against, stock, values.clone)
    board.peer("c1", case, "padded[mask]", against, lambda: padded[mask], values.clone)

    def counted() -> tuple[torch.Tensor, torch.Tensor]:
        return mask.sum(), values.clone()

    failures = []
    for gate, limit, what, call, than, base in (
        ("c1", 1.3, "from_padded", lambda: NestedTensor.from_padded(padded, lengths), against, values.clone),
        (
            "c2",
            1.5,
            "from_tensor_mask",
            lambda: NestedTensor.from_tensor_mask(padded, mask),
            "mask.sum() + values.clone()",
            counted,
        ),
    ):
        try:
            board.gate(gate, case, what, than, limit, call, base)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, failures
