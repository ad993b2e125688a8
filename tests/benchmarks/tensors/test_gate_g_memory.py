"""Gate g: memory follows the packed size, also where one element is 4,096 times as long as all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tensors.oracle.laws import Batch, translate_element, translate_for
from tensors.oracle.sample import KINDS
from tensors.oracle.samples import load
from torch import Tensor

from danling.tensors import NestedTensor, strict, supported_ops
from support.memory import peak_bytes
from support.ratios import Board

from .batches import MARKS, lengths_of, parts_of
from .test_gate_f_transformer import BATCH, LONGEST, WIDTH, encoder, step

pytestmark = MARKS
LENGTHS = [4096] + [1] * 255
PACKED = {name for name, _, path in supported_ops() if path == "packed"}
SAMPLES = {name: samples for name, samples in load().items() if name in PACKED}


def nested_of(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, NestedTensor):
        yield tree._values
    elif isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from nested_of(item)


def size_of(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in nested_of(tree))


def usable(sample: Any) -> bool:
    return sample.shapes is None and "sequences" in sample.layouts and torch.float32 in sample.dtypes


@pytest.mark.parametrize("name", sorted(name for name, samples in SAMPLES.items() if any(map(usable, samples))))
def test_packed_op(board: Board, name: str) -> None:
    torch.manual_seed(0)
    spec = {"shapes": [(n, 4) for n in LENGTHS], "ragged": (0,)}
    peaks, of_torch = [], [4.0]
    for sample in filter(usable, SAMPLES[name]):
        data = [KINDS[kind] if isinstance(kind, str) else kind for kind in sample.operands]
        operands = [
            Batch([make(shape, torch.float32) for shape in spec["shapes"]], spec, torch.float32).nested()
            for make in data
        ]

        def call(operands: Any, d: Any, sample: Any = sample) -> Any:
            with strict(), torch.no_grad():
                return sample.call(d, *operands)

        d = translate_for(operands[0])
        try:
            result = call(operands, d)  # also builds index maps that are kept with the structure
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue  # torch raises for such elements too, or the sample takes gradients
        total = size_of(operands) + size_of(result)
        peaks.append(peak_bytes(partial(call, operands, d)) / total)
        try:  # what torch's own op takes on the packed values
            rows = [x.concat for x in operands]
            total = size_of(rows) + size_of(call(rows, translate_element))
            of_torch.append(peak_bytes(partial(call, rows, translate_element)) / total)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            pass
    if not peaks:
        pytest.skip("every sample takes gradients or sizes of its own")
    board.number("g", name, "peak of the call", "operands + result", max(peaks), max(of_torch))


def test_from_padded(board: Board) -> None:
    batch = NestedTensor(parts_of(LENGTHS, 4))
    padded, lengths = batch.tensor, batch.lengths
    total = size_of(batch.concat)
    peak = peak_bytes(lambda: NestedTensor.from_padded(padded, lengths))
    board.number("g", "from_padded", "peak of the call", "result", peak / total, 4.0)


@pytest.mark.parametrize("occupancy", [0.2, 0.4, 0.8])
def test_training_step(board: Board, occupancy: float) -> None:
    batch = NestedTensor(parts_of(lengths_of(BATCH, LONGEST, occupancy), WIDTH))
    padded, mask = batch.tensor_mask
    model = encoder().train()
    parameters = size_of(list(model.parameters()))

    def peak(forward: Callable[[], Tensor]) -> int:
        step(model, forward)
        model.zero_grad(set_to_none=True)
        return peak_bytes(lambda: step(model, forward)) - parameters

    ours = peak(lambda: model(batch).concat)
    theirs = peak(lambda: model(padded, src_key_padding_mask=~mask)[mask])
    p = batch.occupancy
    case = f"encoder, train, occupancy {p:.2f}"
    board.number("g", case, "peak of the step", "padded, with key padding mask", ours / theirs, 1.15 * p + 0.05)
