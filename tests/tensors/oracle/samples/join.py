"""Samples of joins and splits."""

import torch
from tensors.oracle.sample import FLOATS, STANDARD, Sample

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))
TWO = ("normal", "normal")
LONG = {"shapes": ((4, 3), (6, 3), (8, 3)), "ragged": (0,)}


def by_torch_names(name):
    """hstack and its kin are named after dims of one element."""
    func = getattr(torch, name)
    return Sample(lambda d, x, y: func([x, y]), TWO, ("sequences", "flat", "two_ragged", "batch_second"), FP32)


SAMPLES = {
    "cat": [
        Sample(lambda d, x, y: torch.cat([x, y], d(0)), TWO, dtypes=FLOATS),
        Sample(lambda d, x, y: torch.cat([x, y, x], d(-1)), TWO, dtypes=FP32),
        Sample(
            lambda d, x, y: torch.cat([x, y[..., :2]], d(-1)), TWO, ("sequences", "batch_second", "two_ragged"), FP32
        ),
        Sample(
            lambda d, x, y: list(torch.cat([x, y], x.structure.batch_dim).unbind()),
            TWO,
            ("sequences", "batch_second", "channel_first", "two_ragged", "empty_element"),
            FP32,
            reference=lambda d, xs, ys: [*xs, *ys],
        ),
    ],
    "stack": [
        Sample(lambda d, x, y: torch.stack([x, y], -1), TWO, dtypes=FP32),
        Sample(lambda d, x, y: torch.stack([x, y], -2), TWO, dtypes=FP32),
    ],
    "hstack": [by_torch_names("hstack")],
    "vstack": [by_torch_names("vstack")],
    "dstack": [by_torch_names("dstack")],
    "column_stack": [by_torch_names("column_stack")],
    "meshgrid": [
        Sample(lambda d, x, y: torch.meshgrid(x, y, indexing="ij"), TWO, ("flat",), FP32),
        Sample(lambda d, x, y: torch.meshgrid(x, torch.arange(3.0), y, indexing="xy"), TWO, ("flat",), FP32),
        Sample(
            lambda d, x, y: torch.meshgrid(x, y[..., :2], indexing="xy"),
            TWO,
            ("batch_second", "empty_batch"),
            FP32,
            shapes=((3,), (3,)),
            ragged=(),
        ),
        Sample(
            lambda d, x, y: torch.meshgrid([x, y], indexing="ij"), TWO, ("sequences",), FP32, shapes=((), ()), ragged=()
        ),
    ],
    "split": [
        Sample(lambda d, x: x.split(2, d(-1)), layouts=("sequences", "batch_second", "two_ragged"), dtypes=FP32),
        Sample(lambda d, x: x.split(2, d(0)), layouts=("equal", "single"), dtypes=FP32),
        Sample(
            lambda d, x: [list(p.unbind()) for p in x.split(2)],
            layouts=("sequences", "channel_first", "two_ragged"),
            dtypes=FP32,
            reference=lambda d, es: [es[:2], es[2:]],
        ),
    ],
    "split_with_sizes": [
        Sample(lambda d, x: x.split_with_sizes([1, 3], d(-1)), layouts=("sequences", "two_ragged"), dtypes=FP32),
    ],
    "chunk": [
        Sample(lambda d, x: x.chunk(2, d(-1)), layouts=("sequences", "two_ragged"), dtypes=FP32),
        Sample(lambda d, x: torch.chunk(x, 2, d(0)), layouts=("sequences", "single"), dtypes=FP32, **LONG),
    ],
    "tensor_split": [
        Sample(lambda d, x: torch.tensor_split(x, 3, d(0)), layouts=("sequences", "single"), dtypes=FP32, **LONG),
        Sample(lambda d, x: torch.tensor_split(x, [1, 2], d(0)), layouts=("sequences", "single"), dtypes=FP32, **LONG),
    ],
    "hsplit": [Sample(lambda d, x: torch.hsplit(x, [1, 3]), layouts=("sequences", "batch_second"), dtypes=FP32)],
    "vsplit": [Sample(lambda d, x: torch.vsplit(x, 2), layouts=("sequences", "single"), dtypes=FP32, **LONG)],
    "dsplit": [Sample(lambda d, x: torch.dsplit(x, 2), layouts=("two_ragged",), dtypes=FP32)],
    "unbind": [
        Sample(lambda d, x: torch.unbind(x, d(-1)), layouts=("sequences", "batch_second", "two_ragged"), dtypes=FP32),
        Sample(
            lambda d, x: list(torch.unbind(x, x.structure.batch_dim)),
            layouts=STANDARD[:6],
            dtypes=FP32,
            reference=lambda d, es: es,
        ),
    ],
}
