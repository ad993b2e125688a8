"""Samples of normalisers, norm layers, dropout, embedding and linear."""

import torch
import torch.nn.functional as F
from tensors.oracle.sample import FLOATS, STANDARD, Sample

FP32 = (torch.float32,)
STATIC_TAIL = tuple(name for name in STANDARD if name != "channel_first")
SQUARE = torch.linspace(-1, 1, 16).view(4, 4)
TABLE = torch.linspace(-1, 1, 20).view(4, 5)
WEIGHT = torch.tensor([0.5, 2.0, -1.0, 1.5])
BIAS = torch.tensor([0.1, 0.2, 0.3, -0.4])
CHANNELS = ("channel_first",)


def of(weight, x):
    return weight.to(x.dtype)


def by_elements(call):
    """Reference of batch norm: all positions of all elements together, elements put back."""

    def reference(d, elements):
        rows = torch.cat([e.movedim(0, -1).reshape(-1, e.shape[0]) for e in elements])
        out = call(rows).split([e[0].numel() for e in elements])
        return [o.reshape(*e.shape[1:], e.shape[0]).movedim(-1, 0) for o, e in zip(out, elements, strict=True)]

    return reference


def as_list(result):
    return list(result.unbind())


SAMPLES = {
    "softmax": [
        Sample(lambda d, x: torch.softmax(x, d(0))),
        Sample(lambda d, x: F.softmax(x, d(-1))),
        Sample(lambda d, x: F.softmax(x, dim=d(1), dtype=torch.float64)),
    ],
    "log_softmax": [
        Sample(lambda d, x: torch.log_softmax(x, d(0)), dtypes=FP32),
        Sample(lambda d, x: F.log_softmax(x, d(-1))),
    ],
    "special_softmax": [Sample(lambda d, x: torch.special.softmax(x, d(0)))],
    "special_log_softmax": [Sample(lambda d, x: torch.special.log_softmax(x, d(0)), dtypes=FP32)],
    "softmin": [Sample(lambda d, x: F.softmin(x, d(0)))],
    "normalize": [
        Sample(lambda d, x: F.normalize(x, dim=d(0)), dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x: F.normalize(x, dim=d(-1)), dtypes=FP32, layouts=STATIC_TAIL, tolerance=1e-4),
    ],
    "gumbel_softmax": [
        Sample(
            lambda d, x: torch.sum(F.gumbel_softmax(x, dim=d(-1), hard=True), d(-1)),
            layouts=STATIC_TAIL,
            dtypes=FP32,
            grad=False,
        )
    ],
    "layer_norm": [
        Sample(
            lambda d, x: F.layer_norm(x, (4,), of(WEIGHT, x), of(BIAS, x)),
            layouts=STATIC_TAIL,
            dtypes=FP32,
            tolerance=1e-4,
        ),
        Sample(lambda d, x: F.layer_norm(x, (4,)), layouts=STATIC_TAIL),
    ],
    "native_layer_norm": [
        Sample(
            lambda d, x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0],
            layouts=STATIC_TAIL,
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "rms_norm": [
        Sample(lambda d, x: F.rms_norm(x, (4,), of(WEIGHT, x)), layouts=STATIC_TAIL, dtypes=FP32, tolerance=1e-4)
    ],
    "group_norm": [
        Sample(
            lambda d, x: (
                F.group_norm(x, 2, of(WEIGHT, x), of(BIAS, x))
                if x.dim() == 3
                else F.group_norm(x[None], 2, of(WEIGHT, x), of(BIAS, x))[0]
            ),
            layouts=CHANNELS,
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "instance_norm": [
        Sample(
            lambda d, x: F.instance_norm(x) if x.dim() == 3 else F.instance_norm(x[None])[0],
            layouts=CHANNELS,
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "batch_norm": [
        Sample(
            lambda d, x: as_list(F.batch_norm(x, None, None, of(WEIGHT, x), of(BIAS, x), training=True)),
            layouts=CHANNELS,
            dtypes=FP32,
            isolated=False,
            tolerance=1e-4,
            reference=by_elements(lambda r: F.batch_norm(r, None, None, of(WEIGHT, r), of(BIAS, r), training=True)),
        ),
        Sample(
            lambda d, x: (
                F.batch_norm(x, of(BIAS, x), of(WEIGHT.abs(), x))
                if x.dim() == 3
                else F.batch_norm(x[None], of(BIAS, x), of(WEIGHT.abs(), x))[0]
            ),
            layouts=CHANNELS,
            dtypes=FP32,
            tolerance=1e-4,
        ),
    ],
    **{
        name: [
            Sample(lambda d, x, f=func: f(x, 0.0, True), dtypes=FP32),
            Sample(lambda d, x, f=func: f(x, 0.5, False), dtypes=FP32),
        ]
        for name, func in {"dropout": F.dropout, "alpha_dropout": F.alpha_dropout}.items()
    },
    "native_dropout": [
        Sample(lambda d, x: torch.native_dropout(x, 0.0, True), layouts=("sequences", "two_ragged"), dtypes=FP32)
    ],
    **{
        name: [
            Sample(lambda d, x, f=func: f(x, 0.5, False), dtypes=FP32, layouts=("two_ragged",)),
        ]
        for name, func in {
            "dropout1d": F.dropout1d,
            "dropout2d": lambda x, p, t: F.dropout2d(x.unsqueeze(-1), p, t).squeeze(-1),
            "dropout3d": lambda x, p, t: F.dropout3d(x.unsqueeze(-1), p, t).squeeze(-1),
            "feature_dropout": torch.feature_dropout,
            "feature_alpha_dropout": torch.feature_alpha_dropout,
        }.items()
    },
    "F.embedding": [
        Sample(lambda d, x: F.embedding(x, TABLE), ("index",), dtypes=FP32, grad=False),
        Sample(
            lambda d, x: F.embedding(x, TABLE, padding_idx=0), ("index",), dtypes=FP32, layouts=("flat",), grad=False
        ),
    ],
    "embedding": [Sample(lambda d, x: torch.embedding(TABLE, x), ("index",), dtypes=FP32, grad=False)],
    "F.embedding_bag": [
        Sample(
            lambda d, x: F.embedding_bag(x, TABLE, mode="mean") if x.dim() == 2 else F.embedding_bag(x[None], TABLE)[0],
            ("index",),
            ("flat",),
            FP32,
            grad=False,
        )
    ],
    "one_hot": [Sample(lambda d, x: F.one_hot(x, 5), ("index",), dtypes=FP32, grad=False)],
    "linear": [
        Sample(
            lambda d, x: F.linear(x, of(SQUARE, x), of(BIAS, x)), layouts=(*STATIC_TAIL,), dtypes=FLOATS, tolerance=1e-4
        ),
        Sample(lambda d, x: F.linear(x, of(SQUARE[:3], x)), layouts=STATIC_TAIL, dtypes=FP32, tolerance=1e-4),
    ],
}
