"""Samples of shape ops. A NestedTensor's target shapes are written from `.shape`, an element's from its own."""

import torch
import torch.nn.functional as F
from tensors.oracle.sample import FLOATS, STANDARD, Sample

from danling.tensors import NestedTensor

FP32 = (torch.float32,)
FULL = tuple(name for name in STANDARD if name not in ("empty_element", "empty_batch"))
TAIL = tuple(name for name in STANDARD if name != "channel_first")
LEADING = tuple(name for name in TAIL if name != "batch_second")
NOT_SECOND = tuple(name for name in STANDARD if name != "batch_second")
WIDE = {"shapes": ((3, 1, 4), (2, 1, 4), (5, 1, 4)), "ragged": (0,)}
PLAIN = ("sequences", "batch_second", "single", "equal", "empty_element", "empty_batch")


def nested(x):
    return isinstance(x, NestedTensor)


def shaped(x, *element):
    """Sizes of a target: the batch where it belongs, ragged dims as -1."""
    if not nested(x):
        return [x.shape[0] if size is None else size for size in element]
    target = [-1 if size is None else size for size in element]
    target.insert(x.structure.batch_dim, len(x))
    return target


def per_dim(x, *counts):
    """Numbers per element dim, with a 1 (or nothing) for the batch."""
    counts = list(counts)
    if nested(x):
        counts.insert(x.structure.batch_dim, 1)
    return counts


SAMPLES = {
    "view": [
        Sample(lambda d, x: x.view(shaped(x, None, 2, 2)), layouts=PLAIN, dtypes=FP32),
        Sample(lambda d, x: x.view(torch.int32), layouts=LEADING, dtypes=FP32, grad=False),
        Sample(lambda d, x: x.view(shaped(x, None, 4)), dtypes=FP32, layouts=PLAIN, **WIDE),
    ],
    "reshape": [
        Sample(lambda d, x: x.reshape(shaped(x, None, 2, 1, 2)), layouts=PLAIN, dtypes=FP32),
        Sample(
            lambda d, x: x.reshape([len(x), -1] if nested(x) else [-1]), layouts=("sequences", "single"), dtypes=FP32
        ),
    ],
    "view_as": [Sample(lambda d, x, y: x.view_as(y), ("normal", "normal"), dtypes=FP32)],
    "reshape_as": [Sample(lambda d, x, y: x.reshape_as(y), ("normal", "normal"), dtypes=FP32)],
    "flatten": [
        Sample(
            lambda d, x: torch.flatten(x, d(0), d(-1)),
            layouts=("sequences", "channel_first", "two_ragged"),
            dtypes=FP32,
        ),
        Sample(lambda d, x: x.flatten(d(1), d(2)), layouts=PLAIN, dtypes=FP32, **WIDE),
        Sample(
            lambda d, x: x.flatten(),
            dtypes=FP32,
            layouts=FULL,
            reference=lambda d, es: torch.cat([e.flatten() for e in es]),
        ),
    ],
    "ravel": [
        Sample(
            lambda d, x: x.ravel(),
            dtypes=FP32,
            layouts=FULL,
            reference=lambda d, es: torch.cat([e.flatten() for e in es]),
        )
    ],
    "unflatten": [
        Sample(lambda d, x: x.unflatten(d(-1), (2, 2)), layouts=TAIL, dtypes=FP32),
        Sample(
            lambda d, x: x.unflatten(d(0), (-1, 2)), layouts=PLAIN[:4], shapes=((4, 3), (2, 3), (6, 3)), ragged=(0,)
        ),
    ],
    "transpose": [
        Sample(lambda d, x: x.transpose(d(0), d(1)), dtypes=FLOATS),
        Sample(lambda d, x: torch.swapaxes(x, d(0), d(-1)), layouts=FULL, dtypes=FP32),
    ],
    "t": [Sample(lambda d, x: list(x.t().unbind()), layouts=("flat",), dtypes=FP32, reference=lambda d, es: es)],
    "adjoint": [Sample(lambda d, x: x.adjoint(), layouts=LEADING, dtypes=FP32)],
    "mT": [Sample(lambda d, x: x.mT, layouts=LEADING, dtypes=FP32)],
    "mH": [Sample(lambda d, x: x.mH, layouts=LEADING, dtypes=FP32)],
    "H": [Sample(lambda d, x: x.mH, layouts=LEADING, dtypes=FP32)],
    "T": [Sample(lambda d, x: x.T if not nested(x) or x.dim() == 2 else x.mT, layouts=LEADING[:1], dtypes=FP32)],
    "permute": [
        Sample(
            lambda d, x: x.permute(0, 2, 3, 1) if nested(x) else x.permute(1, 2, 0),
            layouts=("two_ragged",),
            dtypes=FP32,
        ),
        Sample(
            lambda d, x: x.permute(0, 2, 1) if nested(x) else x.permute(1, 0), layouts=("sequences", "channel_first")
        ),
    ],
    "movedim": [
        Sample(lambda d, x: x.movedim(d(0), d(1)), dtypes=FP32),
        Sample(lambda d, x: torch.moveaxis(x, (d(0), d(1)), (d(1), d(0))), layouts=FULL, dtypes=FP32),
    ],
    "squeeze": [
        Sample(lambda d, x: x.squeeze(d(1)), layouts=PLAIN, **WIDE),
        Sample(lambda d, x: x.squeeze(), layouts=("sequences", "batch_second"), **WIDE),
    ],
    "unsqueeze": [
        Sample(lambda d, x: x.unsqueeze(d(1) + 1 if nested(x) else 2), layouts=FULL, dtypes=FP32),
        Sample(lambda d, x: x.unsqueeze(-1), dtypes=FP32),
    ],
    "expand": [Sample(lambda d, x: x.expand(shaped(x, None, 3, 4)), layouts=PLAIN[:4], **WIDE)],
    "expand_as": [
        Sample(lambda d, x, y: x[..., :1].expand_as(y), ("normal", "normal"), layouts=TAIL, dtypes=FP32),
    ],
    "broadcast_to": [Sample(lambda d, x: torch.broadcast_to(x, shaped(x, None, 3, 4)), layouts=PLAIN[:4], **WIDE)],
    "repeat": [Sample(lambda d, x: x.repeat(per_dim(x, *([2, 3] + [1] * 3)[: x.dim() - nested(x)])), dtypes=FP32)],
    "tile": [Sample(lambda d, x: x.tile(per_dim(x, *([2, 3] + [1] * 3)[: x.dim() - nested(x)])), dtypes=FP32)],
    "repeat_interleave": [
        Sample(lambda d, x: x.repeat_interleave(2, d(0)), dtypes=FP32),
        Sample(lambda d, x: x.repeat_interleave(3, d(-1)), dtypes=FP32),
    ],
    "flip": [Sample(lambda d, x: torch.flip(x, [d(0), d(-1)])), Sample(lambda d, x: x.flip(d(1)), dtypes=FP32)],
    "fliplr": [
        Sample(lambda d, x: torch.fliplr(x) if nested(x) else torch.flipud(x), layouts=("sequences", "channel_first"))
    ],
    "flipud": [
        Sample(
            lambda d, x: torch.flipud(x).unbind(),
            layouts=("sequences",),
            dtypes=FP32,
            reference=lambda d, es: tuple(reversed(es)),
        )
    ],
    "roll": [
        Sample(lambda d, x: torch.roll(x, 2, d(0))),
        Sample(lambda d, x: torch.roll(x, (1, -1), (d(0), d(-1))), dtypes=FP32),
    ],
    "rot90": [Sample(lambda d, x, k=k: torch.rot90(x, k, (d(0), d(1))), layouts=FULL, dtypes=FP32) for k in (1, 2, 3)],
    "narrow": [
        Sample(lambda d, x: x.narrow(d(-1), 1, 2), layouts=TAIL),
        Sample(lambda d, x: x.narrow(d(0), 0, 1), layouts=FULL),
        Sample(lambda d, x: x.narrow(d(0), 0, 2), layouts=("sequences", "equal"), dtypes=FP32),
    ],
    "diff": [
        Sample(lambda d, x: torch.diff(x, dim=d(0)), layouts=FULL, dtypes=FP32),
        Sample(lambda d, x: torch.diff(x, n=2, dim=d(-1)), layouts=TAIL, dtypes=FP32),
    ],
    "unfold": [
        Sample(lambda d, x: x.unfold(d(-1), 2, 1), layouts=("sequences", "two_ragged", "channel_first"), dtypes=FP32),
        Sample(lambda d, x: x.unfold(d(0), 1, 2), layouts=FULL, dtypes=FP32),
    ],
    "pad": [
        Sample(lambda d, x: F.pad(x, (1, 2)), dtypes=FP32),
        Sample(lambda d, x: F.pad(x, (0, 1, 2, 1), value=3.0), layouts=NOT_SECOND, dtypes=FP32),
        Sample(lambda d, x: F.pad(x, (0, 0, -1, 2)), layouts=NOT_SECOND[:4], dtypes=FP32),
        Sample(
            lambda d, x: F.pad(x, (1, 1), mode="replicate"),
            layouts=("channel_first",),
            dtypes=FP32,
        ),
    ],
    "constant_pad_nd": [Sample(lambda d, x: torch.constant_pad_nd(x, (1, 2), 0.5), dtypes=FP32)],
    **{
        f"atleast_{n}d": [
            Sample(lambda d, x, f=f"atleast_{n}d": getattr(torch, f)(x), layouts=("sequences", "flat"), dtypes=FP32)
        ]
        for n in (1, 2, 3)
    },
    "broadcast_tensors": [
        Sample(lambda d, x, y: torch.broadcast_tensors(x, y), ("normal", "normal"), dtypes=FP32),
    ],
    "sum_to_size": [
        Sample(
            lambda d, x: x.sum_to_size(1, 4),
            layouts=("sequences",),
            dtypes=FP32,
            reference=lambda d, es: torch.cat(es).sum(0, keepdim=True),
            tolerance=1e-4,
        )
    ],
    "tril": [
        Sample(torch_tri, dtypes=FP32) for torch_tri in (lambda d, x: torch.tril(x), lambda d, x: torch.tril(x, 1))
    ],
    "triu": [
        Sample(torch_tri, dtypes=FP32) for torch_tri in (lambda d, x: torch.triu(x), lambda d, x: torch.triu(x, -1))
    ],
    "diagonal": [
        Sample(lambda d, x: torch.diagonal(x, 0, d(0), d(1)), dtypes=FP32),
        Sample(lambda d, x: torch.diagonal(x, 1, d(0), d(-1)), layouts=FULL, dtypes=FP32),
        Sample(lambda d, x: torch.diagonal(x, -1, d(-2), d(-1)), layouts=FULL, dtypes=FP32),
    ],
    "linalg_diagonal": [Sample(lambda d, x: torch.linalg.diagonal(x), layouts=LEADING, dtypes=FP32)],
    "diag": [
        Sample(lambda d, x: torch.diag(x), layouts=("sequences", "channel_first", "flat"), dtypes=FP32),
    ],
    "trace": [Sample(lambda d, x: torch.trace(x), layouts=("sequences", "channel_first"), dtypes=FP32)],
    "diag_embed": [
        Sample(lambda d, x: torch.diag_embed(x), layouts=("sequences", "channel_first", "flat"), dtypes=FP32),
        Sample(lambda d, x: torch.diag_embed(x, 1), layouts=("sequences", "channel_first", "flat"), dtypes=FP32),
    ],
    "diagflat": [Sample(lambda d, x: torch.diagflat(x), layouts=("sequences", "flat"), dtypes=FP32)],
}
