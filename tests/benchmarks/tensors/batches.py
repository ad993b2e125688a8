"""Seeded ragged batches, and the ways other libraries hold them."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import Tensor

from danling.tensors import kernels

MARKS = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore"),  # peers warn of being prototypes
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not kernels.info()["cpu"]["loaded"], reason=kernels.info()["reason"]),
]
OCCUPANCIES = [0.2, 0.5, 0.8]
SIZES = {1: (4096, 512), 8: (1024, 512), 64: (128, 512), 256: (32, 512)}
"""By width: elements and the longest of them. A copy takes milliseconds, not microseconds, in each."""


def lengths_of(elements: int, longest: int, occupancy: float) -> list[int]:
    """Lengths whose mean is about `occupancy` times the longest, which is among them."""
    draw = random.Random(0)
    low, high = (0.0, 2 * occupancy) if occupancy <= 0.5 else (2 * occupancy - 1, 1.0)
    return [longest, *(max(1, round(draw.uniform(low, high) * longest)) for _ in range(elements - 1))]


def parts_of(lengths: list[int], *static: int, seed: int = 0) -> list[Tensor]:
    """Random elements of these lengths, each in memory of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *static, generator=generator) for n in lengths]


def jagged(parts: list[Tensor]) -> Tensor:
    """torch's own nested tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(parts, layout=torch.jagged)


def op(name: str) -> object:
    """A private op of torch, or `None` where it is not there."""
    return getattr(torch.ops.aten, name, None)
