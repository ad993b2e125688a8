"""Gates a1 and a2: `NestedTensor(list)` over `torch.cat(list)`."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from danling.tensors import NestedTensor
from support.ratios import Board

from .batches import MARKS, jagged, parts_of

pytestmark = MARKS


def construct(board: Board, gate: str, case: str, limit: float, parts: list[Tensor]) -> None:
    expected = torch.cat(parts)
    assert NestedTensor(parts).concat.equal(expected)
    against = "torch.cat(list)"

    def base() -> Tensor:
        return torch.cat(parts)

    board.peer(gate, case, "torch.nested (jagged)", against, lambda: jagged(parts), base)
    board.peer(gate, case, "torch.nested (strided)", against, lambda: torch.nested.nested_tensor(parts), base)
    board.peer(
        gate, case, "pad_sequence", against, lambda: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), base
    )
    board.gate(gate, case, "NestedTensor(list)", against, limit, lambda: NestedTensor(parts), base)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("elements", [32, 256])
@pytest.mark.parametrize("rows", [(64, 64), (64, 256), (256, 256)], ids=["short", "mixed", "long"])
def test_sequences(board: Board, elements: int, width: int, rows: tuple[int, int]) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(*rows) for _ in range(elements)]
    span = str(rows[0]) if rows[0] == rows[1] else f"{rows[0]} to {rows[1]}"
    construct(board, "a1", f"{elements} sequences, {span} x {width}", 1.5, parts_of(lengths, width))


def test_many_small_sequences(board: Board) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(4, 12) for _ in range(4096)]
    construct(board, "a2", "4096 sequences, about 8 x 8", 3.0, parts_of(lengths, 8))
