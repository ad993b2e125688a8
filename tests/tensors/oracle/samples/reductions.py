"""Samples of reductions: over static dims, ragged dims, the batch and everything."""

import math

import torch
from tensors.oracle.sample import FLOATS, STANDARD, Sample

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))


def call(func, dims, **settings):
    if dims is None:
        return lambda d, x: func(x, **settings)
    if isinstance(dims, tuple):
        return lambda d, x: func(x, dim=tuple(d(e) for e in dims), **settings)
    return lambda d, x: func(x, dim=d(dims), **settings)


def over_batch(func, **settings):
    """Reference of a reduction over the batch: position by position over the elements that have it."""

    def reference(d, elements):
        rank = elements[0].dim()
        top = [max(e.shape[i] for e in elements) for i in range(rank)]
        results = []
        for index in torch.cartesian_prod(*[torch.arange(n) for n in top]).reshape(-1, rank).tolist():
            owners = [j for j, e in enumerate(elements) if all(i < n for i, n in zip(index, e.shape, strict=True))]
            result = func(torch.stack([elements[j][tuple(index)] for j in owners]), dim=0, **settings)
            if func in (torch.max, torch.min):
                result = (result[0], torch.tensor(owners)[result[1]])
            elif func in (torch.argmax, torch.argmin):
                result = torch.tensor(owners)[result]
            results.append(result)
        if isinstance(results[0], tuple):
            return tuple(torch.stack([r[j] for r in results]).reshape(top) for j in range(len(results[0])))
        return torch.stack(results).reshape(top)

    return reference


def batch_sample(func, **settings):
    return Sample(
        lambda d, x: func(x, dim=x.structure.batch_dim, **settings),
        layouts=("sequences", "batch_second", "channel_first", "single"),
        dtypes=FP32,
        reference=over_batch(func, **settings),
        tolerance=1e-4,
    )


def whole(func, kind="normal", layouts=FULL, **settings):
    return Sample(
        lambda d, x: func(x, **settings),
        (kind,),
        layouts,
        FP32,
        reference=lambda d, elements: func(torch.cat([e.flatten() for e in elements]), **settings),
        tolerance=1e-4,
    )


def several(func, kind="normal", multi=True, batch=True, dtypes=FLOATS, **settings):
    out = [
        Sample(call(func, 0, **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
        Sample(call(func, -1, keepdim=True, **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
        Sample(call(func, 1, **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
        Sample(call(func, 0, keepdim=True, **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
        whole(func, kind, **settings),
    ]
    if multi:
        out += [
            Sample(call(func, (0, 1), **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
            Sample(call(func, (1, 0), keepdim=True, **settings), (kind,), dtypes=dtypes, tolerance=1e-4),
        ]
    if batch:
        out.append(batch_sample(func, **settings))
    return out


SAMPLES = {
    "sum": [*several(torch.sum), Sample(call(torch.sum, 0, dtype=torch.float64))],
    "nansum": several(torch.nansum),
    "mean": several(torch.mean),
    "nanmean": several(torch.nanmean),
    "any": [*several(torch.any), *several(torch.any, "bool", dtypes=FP32, batch=False)],
    "all": [*several(torch.all), *several(torch.all, "bool", dtypes=FP32, batch=False)],
    "count_nonzero": [
        Sample(call(torch.count_nonzero, 0)),
        Sample(call(torch.count_nonzero, (0, -1))),
        whole(torch.count_nonzero),
    ],
    "amax": several(torch.amax),
    "amin": several(torch.amin),
    "aminmax": [
        Sample(call(torch.aminmax, 0), tolerance=1e-4),
        Sample(call(torch.aminmax, -1, keepdim=True)),
        whole(torch.aminmax),
    ],
    "max": several(torch.max, "distinct", multi=False),
    "min": several(torch.min, "distinct", multi=False),
    "argmax": several(torch.argmax, "distinct", multi=False),
    "argmin": several(torch.argmin, "distinct", multi=False),
    "prod": several(torch.prod, multi=False),
    "var": [*several(torch.var), Sample(call(torch.var, 0, correction=0), dtypes=FP32, tolerance=1e-4)],
    "std": several(torch.std),
    "var_mean": several(torch.var_mean),
    "std_mean": several(torch.std_mean),
    "logsumexp": [
        Sample(call(torch.logsumexp, 0), tolerance=1e-4),
        Sample(call(torch.logsumexp, -1, keepdim=True), tolerance=1e-4),
        Sample(call(torch.logsumexp, (0, 1)), tolerance=1e-4),
        batch_sample(torch.logsumexp),
    ],
    "norm": [*several(torch.norm, dtypes=FP32), Sample(call(torch.norm, 0, p=1), dtypes=FP32)],
    "linalg_vector_norm": [
        *several(torch.linalg.vector_norm, dtypes=FP32),
        *[Sample(call(torch.linalg.vector_norm, 0, ord=p), dtypes=FP32, tolerance=1e-4) for p in (0, 1, 3, 0.5)],
        *[Sample(call(torch.linalg.vector_norm, 0, ord=p), dtypes=FP32, tolerance=1e-4) for p in (math.inf, -math.inf)],
    ],
    "linalg_norm": [
        Sample(call(torch.linalg.norm, 0), dtypes=FP32, tolerance=1e-4),
        Sample(call(torch.linalg.norm, (0, 1)), dtypes=FP32, tolerance=1e-4),
    ],
    "linalg_matrix_norm": [
        Sample(call(torch.linalg.matrix_norm, (-2, -1)), dtypes=FP32, tolerance=1e-4),
        Sample(call(torch.linalg.matrix_norm, (-2, -1), ord="nuc"), layouts=FULL, dtypes=FP32, tolerance=1e-3),
        Sample(
            call(torch.linalg.matrix_norm, (-2, -1), ord=1),
            layouts=FULL,
            dtypes=FP32,
            shapes=((2, 3, 3), (4, 3, 3)),
            ragged=(0,),
        ),
    ],
    "dist": [
        Sample(
            lambda d, x, y: torch.dist(x, y),
            ("normal", "normal"),
            FULL,
            FP32,
            reference=lambda d, xs, ys: torch.dist(*[torch.cat([e.flatten() for e in es]) for es in (xs, ys)]),
            tolerance=1e-4,
        )
    ],
    "trapezoid": [
        Sample(lambda d, x: torch.trapezoid(x, dim=d(0)), dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x: torch.trapezoid(x, dx=0.25, dim=d(-1)), layouts=FULL, dtypes=FP32, tolerance=1e-4),
    ],
    "trapz": [
        Sample(lambda d, x: torch.trapz(x, dim=d(-1)), layouts=FULL, dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x, y: torch.trapz(x, y, dim=d(0)), ("normal", "normal"), dtypes=FP32, tolerance=1e-4),
    ],
    "cumulative_trapezoid": [
        Sample(lambda d, x: torch.cumulative_trapezoid(x, dim=d(0)), layouts=FULL, dtypes=FP32, tolerance=1e-4)
    ],
}
