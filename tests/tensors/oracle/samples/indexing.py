"""Samples of indexing, gather and scatter."""

import torch
from tensors.oracle.sample import FLOATS, STANDARD, Sample

from danling.tensors import NestedTensor

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))
TAIL = tuple(name for name in STANDARD if name != "channel_first")


def ix(x, *rest):
    """An index over element dims: behind the batch for a NestedTensor."""
    return (slice(None), *rest) if isinstance(x, NestedTensor) else rest


def cloned(x, write):
    out = x.clone()
    write(out)
    return out


def gathered(shape, dtype):
    """Indices that fit dim 0 of every element."""
    return torch.randint(0, max(shape[0], 1), shape)


def last_dim(shape, dtype):
    return torch.randint(0, max(shape[-1], 1), shape)


def part(*index):
    return Sample(lambda d, x: x[ix(x, *index)], dtypes=FP32)


SAMPLES = {
    "__getitem__": [
        part(slice(1, None)),
        part(slice(None, -1)),
        part(slice(-2, None, 2)),
        part(Ellipsis, slice(1, 3)),
        part(slice(0, 2), slice(None, None, 2)),
        part(Ellipsis, -1),
        part(0),
        part(-1),
        part(None),
        part(slice(None), None),
        part([0, -1]),
        part(torch.tensor([0, 0])),
        part(slice(None), [1, 0]),
        part(Ellipsis, [0]),
        Sample(lambda d, x, y: x[y], ("normal", "bool"), dtypes=FP32),
    ],
    "__setitem__": [
        Sample(lambda d, x: cloned(x, lambda y: y.__setitem__(ix(y, slice(0, 1)), 2.0)), dtypes=FP32),
        Sample(lambda d, x: cloned(x, lambda y: y.__setitem__(ix(y, Ellipsis, slice(1, 3)), -1.0)), dtypes=FLOATS),
        Sample(lambda d, x, m: cloned(x, lambda y: y.__setitem__(m, 0.5)), ("normal", "bool"), dtypes=FP32),
        Sample(
            lambda d, x, v: cloned(x, lambda y: y.__setitem__(ix(y, slice(1, None)), v[ix(v, slice(1, None))])),
            ("normal", "normal"),
            dtypes=FP32,
        ),
    ],
    "select": [
        Sample(lambda d, x: x.select(d(0), 0), layouts=FULL),
        Sample(lambda d, x: torch.select(x, d(-1), -1), dtypes=FP32),
    ],
    "index_select": [
        Sample(lambda d, x: x.index_select(d(-1), torch.tensor([1, 0, 1])), dtypes=FP32),
        Sample(lambda d, x: x.index_select(d(0), torch.tensor([0, 0])), layouts=FULL, dtypes=FP32),
    ],
    "masked_select": [
        Sample(
            lambda d, x, m: torch.masked_select(x, m),
            ("normal", "bool"),
            FULL,
            FP32,
            reference=lambda d, xs, ms: torch.cat([x[m] for x, m in zip(xs, ms, strict=True)]),
        )
    ],
    "masked_scatter": [
        Sample(
            lambda d, x, m: list(x.masked_scatter(m, torch.arange(200.0, dtype=x.dtype)).unbind()),
            ("normal", "bool"),
            ("sequences", "batch_second", "two_ragged", "channel_first"),
            FP32,
            reference=lambda d, xs, ms: scatter_in_turn(xs, ms),
        )
    ],
    "nonzero": [
        Sample(
            lambda d, x: torch.nonzero(x), ("bool",), ("sequences",), FP32, grad=False, reference=lambda d, es: rows(es)
        )
    ],
    "argwhere": [
        Sample(
            lambda d, x: torch.argwhere(x),
            ("bool",),
            ("sequences",),
            FP32,
            grad=False,
            reference=lambda d, es: rows(es),
        )
    ],
    "nonzero_static": [
        Sample(
            lambda d, x: torch.nonzero_static(x, size=2),
            ("bool",),
            ("sequences",),
            FP32,
            grad=False,
            reference=lambda d, es: rows(es)[:2],
        )
    ],
    "gather": [
        Sample(lambda d, x, i: torch.gather(x, d(0), i), ("normal", gathered), dtypes=FP32),
        Sample(lambda d, x, i: x.gather(d(-1), i), ("normal", last_dim), dtypes=FP32),
    ],
    "take_along_dim": [
        Sample(lambda d, x, i: torch.take_along_dim(x, i, d(0)), ("normal", gathered), dtypes=FP32),
        Sample(lambda d, x, i: torch.take_along_dim(x, i, d(-1)), ("normal", last_dim), dtypes=FP32),
    ],
    "scatter": [
        Sample(
            lambda d, x, i: x.scatter(d(-1), i[ix(i, Ellipsis, slice(0, 1))], 2.0), ("normal", last_dim), dtypes=FP32
        ),
        Sample(
            lambda d, x, i, s: torch.scatter(x, d(0), i * 0, s * 0 + 1),
            ("normal", gathered, "normal"),
            dtypes=FP32,
            grad=False,
            isolated=False,
        ),
    ],
    "scatter_add": [
        Sample(
            lambda d, x, i, s: x.scatter_add(d(0), i, s), ("normal", gathered, "normal"), dtypes=FP32, tolerance=1e-4
        ),
        Sample(
            lambda d, x, i, s: x.scatter_add(d(-1), i, s), ("normal", last_dim, "normal"), dtypes=FP32, tolerance=1e-4
        ),
    ],
    "scatter_reduce": [
        Sample(lambda d, x, i, s: x.scatter_reduce(d(0), i, s, "amax"), ("normal", gathered, "normal"), dtypes=FP32)
    ],
    "index_add": [
        Sample(
            lambda d, x, s: x.index_add(d(-1), torch.tensor([0, 1]), s[ix(s, Ellipsis, slice(0, 2))]),
            ("normal", "normal"),
            TAIL,
            FP32,
        ),
        Sample(
            lambda d, x, s: x.index_add(d(0), torch.tensor([0]), s[ix(s, slice(0, 1))]),
            ("normal", "normal"),
            ("sequences", "single", "equal"),
            FP32,
        ),
    ],
    "index_copy": [
        Sample(
            lambda d, x, s: x.index_copy(d(-1), torch.tensor([2, 1]), s[ix(s, Ellipsis, slice(0, 2))]),
            ("normal", "normal"),
            TAIL,
            FP32,
        )
    ],
    "index_fill": [
        Sample(lambda d, x: x.index_fill(d(-1), torch.tensor([0]), 3.0), layouts=TAIL, dtypes=FP32),
        Sample(lambda d, x: x.index_fill(d(0), torch.tensor([0]), 3.0), layouts=FULL, dtypes=FP32),
    ],
    "index_reduce": [
        Sample(
            lambda d, x, s: x.index_reduce(d(-1), torch.tensor([2, 1]), s[ix(s, Ellipsis, slice(0, 2))], "amax"),
            ("normal", "normal"),
            TAIL,
            FP32,
            grad=False,
        )
    ],
    "index_put": [
        Sample(lambda d, x, m: x.index_put((m,), torch.tensor(2.0, dtype=x.dtype)), ("normal", "bool"), dtypes=FP32),
    ],
    "select_scatter": [
        Sample(lambda d, x, s: torch.select_scatter(x, s.select(d(-1), 0), d(-1), 1), ("normal", "normal"), TAIL, FP32),
        Sample(lambda d, x, s: torch.select_scatter(x, s.select(d(0), 0), d(0), 0), ("normal", "normal"), FULL, FP32),
    ],
    "slice_scatter": [
        Sample(
            lambda d, x, s: torch.slice_scatter(x, s[ix(s, Ellipsis, slice(0, 2))], d(-1), 1, 3),
            ("normal", "normal"),
            TAIL,
            FP32,
        ),
        Sample(
            lambda d, x, s: torch.slice_scatter(x, s[ix(s, slice(0, 1))], d(0), 0, 1), ("normal", "normal"), FULL, FP32
        ),
    ],
    "diagonal_scatter": [
        Sample(
            lambda d, x, s: torch.diagonal_scatter(x, torch.diagonal(s, 0, d(0), d(1)), 0, d(0), d(1)),
            ("normal", "normal"),
            FULL,
            FP32,
        )
    ],
}


def rows(elements):
    """What `nonzero` gives: element index, then the position inside the element."""
    found = [torch.cat([torch.full((len(hit), 1), i), hit], 1) for i, e in enumerate(elements) for hit in [e.nonzero()]]
    return torch.cat(found)


def scatter_in_turn(elements, masks):
    source, out, start = torch.arange(200.0, dtype=elements[0].dtype), [], 0
    for e, m in zip(elements, masks, strict=True):
        out.append(e.masked_scatter(m, source[start:]))
        start += int(m.sum())
    return out
