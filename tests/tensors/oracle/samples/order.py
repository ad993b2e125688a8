"""Samples of scans, sorting, order statistics and whole-tensor ops."""

import torch
from tensors.oracle.sample import INTS, STANDARD, Sample

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))


def both(call, kind="normal", layouts=STANDARD, dtypes=FP32, tolerance=1e-4, grad=True):
    return [
        Sample(lambda d, x: call(x, d(0)), (kind,), layouts, dtypes, grad, tolerance=tolerance),
        Sample(lambda d, x: call(x, d(-1)), (kind,), layouts, dtypes, grad, tolerance=tolerance),
    ]


def flat(elements):
    return torch.cat([e.flatten() for e in elements])


SAMPLES = {
    "cumsum": both(torch.cumsum, dtypes=(*FP32, *INTS)),
    "cumprod": both(torch.cumprod, dtypes=(*FP32, *INTS)),
    "logcumsumexp": both(torch.logcumsumexp),
    "cummax": both(torch.cummax),
    "cummin": both(torch.cummin),
    "sort": [
        *both(lambda x, dim: torch.sort(x, dim=dim), "distinct"),
        *both(lambda x, dim: torch.sort(x, dim=dim, descending=True, stable=True)),
    ],
    "argsort": both(lambda x, dim: torch.argsort(x, dim=dim, descending=True), "distinct"),
    "msort": [Sample(lambda d, x: torch.msort(x), dtypes=FP32)],
    "topk": [
        *both(lambda x, dim: torch.topk(x, 2, dim), "distinct", FULL),
        *both(lambda x, dim: torch.topk(x, 1, dim, largest=False), "distinct", FULL),
    ],
    "kthvalue": both(lambda x, dim: torch.kthvalue(x, 1, dim), "distinct", FULL),
    "median": [
        *both(lambda x, dim: torch.median(x, dim), "distinct"),
        *both(lambda x, dim: torch.median(x, dim, keepdim=True), "distinct", FULL),
        Sample(
            lambda d, x: torch.median(x),
            ("distinct",),
            FULL,
            FP32,
            grad=False,
            reference=lambda d, es: flat(es).median(),
        ),
    ],
    "nanmedian": both(lambda x, dim: torch.nanmedian(x, dim), "distinct"),
    "mode": both(lambda x, dim: torch.mode(x, dim), "distinct"),
    "quantile": [
        *both(lambda x, dim: torch.quantile(x, 0.3, dim), layouts=FULL),
        *both(lambda x, dim: torch.quantile(x, torch.tensor([0.2, 0.9], dtype=x.dtype), dim), layouts=FULL),
        *[
            Sample(lambda d, x, i=i: torch.quantile(x, 0.4, d(0), interpolation=i), layouts=FULL, dtypes=FP32)
            for i in ("lower", "higher", "nearest", "midpoint")
        ],
    ],
    "nanquantile": both(lambda x, dim: torch.nanquantile(x, 0.3, dim), layouts=FULL),
    "unique": [
        Sample(
            lambda d, x: torch.unique(x), ("index",), FULL, FP32, grad=False, reference=lambda d, es: flat(es).unique()
        )
    ],
    "histc": [
        Sample(
            lambda d, x: torch.histc(x, 5, -2, 2),
            layouts=FULL,
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: torch.histc(flat(es), 5, -2, 2),
        )
    ],
    "histogram": [
        Sample(
            lambda d, x: tuple(torch.histogram(x, 5)),
            layouts=FULL,
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: tuple(torch.histogram(flat(es), 5)),
        )
    ],
}
