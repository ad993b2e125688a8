"""Gate e: reductions over the ragged dim over one pass through the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, jagged, lengths_of, parts_of

pytestmark = MARKS
REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.max(1),
    "amax": lambda x: x.amax(1),
}
ELEMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0)[0],
    "amax": lambda x: x.amax(0),
}
MASKED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "sum": lambda x, mask, lengths: (x * mask).sum(1),
    "mean": lambda x, mask, lengths: (x * mask).sum(1) / lengths,
    "max": lambda x, mask, lengths: x.masked_fill(~mask, -torch.inf).max(1),
    "amax": lambda x, mask, lengths: x.masked_fill(~mask, -torch.inf).amax(1),
}


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("elements", [32, 256])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(board: Board, name: str, elements: int, width: int) -> None:
    call, parts = REDUCTIONS[name], parts_of(lengths_of(elements, 256, 0.5), width)
    batch, theirs = NestedTensor(parts), jagged(parts)
    values, (padded, mask) = batch.concat, batch.tensor_mask
    mask, lengths = mask[..., None], batch.lengths[:, None]
    result = call(batch)
    expected = torch.stack([ELEMENT[name](part) for part in parts])
    # Both round as they add up, each in its own order.
    torch.testing.assert_close(result[0] if name == "max" else result, expected, rtol=1e-5, atol=1e-4)
    case, against = f"{name}, {elements} x 256 x {width}", "values.sum(-1)"

    def one_pass() -> Tensor:
        return values.sum(-1)

    board.peer("e", case, "torch.nested (jagged)", against, lambda: call(theirs), one_pass)
    board.peer("e", case, "padded with mask", against, lambda: MASKED[name](padded, mask, lengths), one_pass)
    board.gate("e", case, "NestedTensor", against, 1.5, lambda: call(batch), one_pass)


@pytest.mark.parametrize("width", [1, 64, 256])
def test_softmax_is_reported(board: Board, width: int) -> None:
    elements, longest = (4096, 512) if width == 1 else (256, 256)
    parts = parts_of(lengths_of(elements, longest, 0.5), width)
    batch, theirs = NestedTensor(parts), jagged(parts)
    padded, mask = batch.tensor_mask
    hidden = padded.masked_fill(~mask[..., None], -torch.inf)
    expected = torch.cat([part.softmax(0) for part in parts])
    torch.testing.assert_close(batch.softmax(1).concat, expected)
    case, against = f"softmax, {elements} x {longest} x {width}", "softmax of the padded values"
    board.peer("e", case, "torch.nested (jagged)", against, lambda: theirs.softmax(1), lambda: hidden.softmax(1))
    board.gate("e", case, "NestedTensor", against, None, lambda: batch.softmax(1), lambda: hidden.softmax(1))
