"""Packed to padded and back, and the segment sums, over one copy of (or pass over) the same bytes.

Each case is a ratio of alternating runs in one process on one thread; a gate fails only if the whole 95 % interval of the
median ratio lies above it. Run with `-s` to see the table. Sizes are those where a copy takes longer than calling it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from danling.tensors import kernels

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not kernels.info()["cpu"]["loaded"], reason=kernels.info()["reason"]),
]
PAIRS = 40


@contextmanager
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def paired(case: Callable[[], object], base: Callable[[], object]) -> tuple[float, float, float]:
    """Median ratio of the pairs and its bootstrap 95 % interval."""
    ratios = []
    with quiet():
        for pair in range(PAIRS + 5):
            start = time.perf_counter()
            case()
            middle = time.perf_counter()
            base()
            end = time.perf_counter()
            if pair >= 5:
                ratios.append((middle - start) / (end - middle))
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=PAIRS)) for _ in range(1000))
    return statistics.median(ratios), medians[25], medians[974]


def batch(elements: int, longest: int, occupancy: float) -> list[int]:
    draw = random.Random(0)
    low, high = (0.0, 2 * occupancy) if occupancy <= 0.5 else (2 * occupancy - 1, 1.0)
    return [longest, *(max(1, round(draw.uniform(low, high) * longest)) for _ in range(elements - 1))]


def gate(name: str, limit: float, case: Callable[[], Tensor], base: Callable[[], Tensor]) -> None:
    ratio, low, high = paired(case, base)
    print(f"| {name} | {ratio:.2f} | {low:.2f} to {high:.2f} | {limit} |")
    assert low <= limit, f"{name}: {ratio:.2f} ({low:.2f} to {high:.2f}) is above {limit}"


SIZES = {1: (4096, 512), 8: (1024, 512), 64: (128, 512), 256: (32, 512)}


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("occupancy", [0.2, 0.5, 0.8])
def test_packed_to_padded_and_back(width: int, occupancy: float) -> None:
    lengths = batch(*SIZES[width], occupancy)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values, fill, longest = torch.randn(sum(lengths), width), torch.zeros(()), max(lengths)
    padded = kernels.pad(values, offsets, None, [longest], fill)
    assert padded.equal(torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True))
    assert kernels.unpad(padded, offsets, None, len(values)).equal(values)
    size = f"{len(lengths)} x {longest} x {width}, occupancy {occupancy}"
    gate(f"pad {size}", 1.3, lambda: kernels.pad(values, offsets, None, [longest], fill), padded.clone)
    gate(f"unpad {size}", 1.3, lambda: kernels.unpad(padded, offsets, None, len(values)), values.clone)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("elements", [32, 256])
@pytest.mark.parametrize("name", ["segment_sum", "segment_mean"])
def test_sums(name: str, elements: int, width: int) -> None:
    lengths = batch(elements, 256, 0.5)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values, kernel = torch.randn(sum(lengths), width), getattr(kernels, name)
    expected = torch.stack([getattr(part, name[8:])(0) for part in values.split(lengths)])
    torch.testing.assert_close(kernel(values, offsets), expected, rtol=1e-4, atol=1e-4)
    gate(f"{name} {elements} x 256 x {width}", 1.5, lambda: kernel(values, offsets), lambda: values.sum(-1))
