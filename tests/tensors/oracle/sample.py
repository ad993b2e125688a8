"""How sample arguments of an op are declared.

A sample says how to call the op on any batch or element, and what kind of data each operand holds:

    SAMPLES = {
        "softmax": [Sample(lambda d, x: torch.softmax(x, d(0))), Sample(lambda d, x: torch.softmax(x, d(-1)))],
        "add": [Sample(lambda d, x, y: x + y, ("normal", "normal"))],
        "sqrt": [Sample(lambda d, x: torch.sqrt(x), ("positive",))],
    }

`d` translates an element dim (negative ones count from the element's end): for a NestedTensor to the dim of `.shape`, for
one element to itself. The oracle calls the sample on a whole batch and on every element and compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
INTS = (torch.int64,)

LAYOUTS: dict[str, dict[str, Any]] = {
    "sequences": {"shapes": [(3, 4), (1, 4), (5, 4)], "ragged": (0,)},
    "batch_second": {"shapes": [(3, 4), (1, 4), (5, 4)], "ragged": (0,), "batch_first": False},
    "channel_first": {"shapes": [(4, 3), (4, 5), (4, 2)], "ragged": (1,)},
    "two_ragged": {"shapes": [(2, 3, 4), (4, 1, 4), (3, 3, 4)], "ragged": (0, 1)},
    "single": {"shapes": [(3, 4)], "ragged": (0,)},
    "equal": {"shapes": [(4, 4), (4, 4)], "ragged": (0,)},
    "empty_element": {"shapes": [(2, 4), (0, 4), (3, 4)], "ragged": (0,)},
    "empty_batch": {"shapes": [], "ragged": (0,), "static": (4,)},
    "flat": {"shapes": [(3,), (1,), (5,)], "ragged": (0,)},
}
"""Element shapes, ragged element dims and batch order of the batches every op runs on."""

STANDARD = (
    "sequences",
    "batch_second",
    "channel_first",
    "two_ragged",
    "single",
    "equal",
    "empty_element",
    "empty_batch",
)

Data = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(-4, 9, shape, dtype=dtype)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _scaled(low: float, high: float) -> Data:
    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            return torch.rand(shape) > 0.5
        if not dtype.is_floating_point:
            return torch.randint(int(max(low, 1)), int(max(high, 2)) + 2, shape, dtype=dtype)
        return (low + (high - low) * torch.rand(shape, dtype=torch.float64)).to(dtype)

    return make


def _fixed(dtype: torch.dtype, make: Callable[[tuple[int, ...]], Tensor]) -> Data:
    return lambda shape, _: make(shape).to(dtype)


def _distinct(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(torch.Size(shape).numel())
    return (torch.randperm(count).to(torch.float64) / 4 - count / 8).reshape(shape).to(dtype)


KINDS: dict[str, Data] = {
    "normal": _normal,
    "positive": _scaled(0.5, 3.0),
    "above_one": _scaled(1.1, 4.0),
    "unit": _scaled(0.05, 0.95),
    "signed_unit": _scaled(-0.95, 0.95),
    "distinct": _distinct,
    "bool": _fixed(torch.bool, lambda shape: torch.rand(shape) > 0.4),
    "index": _fixed(torch.int64, lambda shape: torch.randint(0, 4, shape)),
    "bits": _fixed(torch.int64, lambda shape: torch.randint(0, 60, shape)),
    "complex": _fixed(torch.complex128, lambda shape: torch.randn(shape, dtype=torch.complex128)),
}
"""What an operand holds. `distinct` has no ties; `bool`, `index`, `bits` and `complex` fix the dtype."""


@dataclass(frozen=True)
class Sample:
    """One way to call an op.

    Attributes:
        call: `call(d, *operands)`; `d` translates element dims.
        operands: For each operand a kind of `KINDS`, or a `Data` function. All have the shapes of the layout.
        layouts: Names in `LAYOUTS` this sample makes sense for.
        dtypes: Value dtypes to run; gradients are always checked in float64.
        grad: Whether to compare gradients.
        reference: For ops that look at the whole batch (reductions over the batch, batch norm): `reference(d, *lists)`
            gets one list of elements per operand, and gives what the call on the batch must return.
        isolated: Whether a value of one element can influence nothing else (False for batch statistics).
        shapes: Element shapes to use instead of the layout's, with `ragged`.
        tolerance: Relative tolerance in float64 and float32; bfloat16 is always 2e-2.
    """

    call: Callable[..., Any]
    operands: tuple[str | Data, ...] = ("normal",)
    layouts: tuple[str, ...] = STANDARD
    dtypes: tuple[torch.dtype, ...] = FLOATS
    grad: bool = True
    reference: Callable[..., Any] | None = None
    isolated: bool = True
    shapes: tuple[tuple[int, ...], ...] | None = None
    ragged: tuple[int, ...] | None = None
    tolerance: float = 1e-5
