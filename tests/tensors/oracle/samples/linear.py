"""Samples of products of matrices and vectors, and attention."""

import math

import torch
import torch.nn.functional as F
from tensors.oracle.sample import STANDARD, Sample

from danling.tensors import NestedTensor

FP32 = (torch.float32,)
TAIL = tuple(name for name in STANDARD if name != "channel_first")
FULL = tuple(name for name in TAIL if name not in ("empty_element", "empty_batch"))
FIRST = tuple(name for name in FULL if name != "batch_second")
TWO = ("normal", "normal")
THREE = ("normal", "normal", "normal")
MATRIX = torch.linspace(-1, 1, 12).view(4, 3)
VECTOR = torch.linspace(-1, 2, 4)
HEADS = {"shapes": ((2, 3, 4), (2, 1, 4), (2, 5, 4)), "ragged": (1,), "layouts": ("sequences", "single", "empty_batch")}
ONE_HEAD = {"layouts": ("sequences", "single", "equal", "empty_batch")}


def of(x, y):
    return x.to(y.dtype)


def nested(x):
    return isinstance(x, NestedTensor)


def mt(x):
    return x.mT


def attention(**settings):
    settings_of = dict(settings)
    return lambda d, q, k, v: F.scaled_dot_product_attention(q, k, v, **settings_of)


def masked(boolean):
    def call(d, q, k, v):
        n = q.shape[-2]
        torch.manual_seed(5)
        big = torch.randn(8, 8, dtype=q.dtype)
        mask = (big > -0.5) | torch.eye(8, dtype=torch.bool) if boolean else big
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:n, : k.shape[-2]])

    return call


def encoder_layer(x, norm_first):
    """What an encoder layer calls in evaluation; batch first, width 4, two heads."""

    def weights(*shape):
        return torch.linspace(-1, 1, math.prod(shape), dtype=x.dtype).view(shape)

    norm, bias = weights(4) + 2, weights(4)
    ffn = weights(6, 4), weights(6), weights(4, 6), bias
    with torch.no_grad():
        return torch._transformer_encoder_layer_fwd(
            x,
            4,
            2,
            weights(12, 4),
            weights(12),
            weights(4, 4),
            bias,
            True,
            norm_first,
            1e-5,
            norm,
            bias,
            norm,
            bias,
            *ffn,
        )


SAMPLES = {
    "matmul": [
        Sample(lambda d, x: torch.matmul(x, of(MATRIX, x)), layouts=TAIL, dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x: x @ of(VECTOR, x), layouts=TAIL, dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x, y: x @ y.mT, TWO, FIRST, FP32, tolerance=1e-4),
        Sample(lambda d, x, y: x.mT @ y, TWO, FIRST, FP32, tolerance=1e-4),
        Sample(lambda d, x: of(MATRIX.mT, x) @ x, layouts=("channel_first",), dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x, y: torch.matmul(x, y), TWO, ("flat",), FP32, tolerance=1e-4),
    ],
    "linalg_vecdot": [Sample(lambda d, x, y: torch.linalg.vecdot(x, y, dim=d(-1)), TWO, dtypes=FP32, tolerance=1e-4)],
    "mm": [Sample(lambda d, x: torch.matmul(x, of(MATRIX, x)), layouts=("sequences",), dtypes=FP32, tolerance=1e-4)],
    "bmm": [
        Sample(
            lambda d, x, y: torch.bmm(x, y.mT) if nested(x) else torch.mm(x, y.mT),
            TWO,
            ("sequences", "equal"),
            FP32,
            tolerance=1e-4,
        )
    ],
    "mv": [Sample(lambda d, x: torch.mv(x, of(VECTOR, x)), layouts=("sequences",), dtypes=FP32, tolerance=1e-4)],
    "dot": [Sample(lambda d, x, y: torch.dot(x, y), TWO, ("flat",), FP32, tolerance=1e-4)],
    "vdot": [Sample(lambda d, x, y: torch.vdot(x, y), TWO, ("flat",), FP32, tolerance=1e-4)],
    "inner": [
        Sample(lambda d, x: torch.inner(x, of(MATRIX.mT, x)), layouts=TAIL, dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x, y: torch.inner(x, y), TWO, ("flat",), FP32, tolerance=1e-4),
    ],
    "outer": [
        Sample(lambda d, x, y: torch.outer(x, y), TWO, ("flat",), FP32),
        Sample(lambda d, x: torch.outer(x, of(VECTOR, x)), layouts=("flat",), dtypes=FP32),
        Sample(lambda d, x: torch.outer(of(VECTOR, x), x), layouts=("flat",), dtypes=FP32),
    ],
    "addmm": [
        Sample(
            lambda d, x: torch.addmm(of(VECTOR[:3], x), x, of(MATRIX, x), beta=0.5, alpha=2),
            layouts=("sequences", "single", "empty_element"),
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "addmv": [
        Sample(
            lambda d, x: torch.addmv(torch.ones((), dtype=x.dtype), x, of(VECTOR, x)),
            layouts=("sequences", "single"),
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "addr": [
        Sample(
            lambda d, x, y: torch.addr(torch.ones((), dtype=x.dtype), x, y, alpha=2),
            TWO,
            ("flat",),
            FP32,
        )
    ],
    "baddbmm": [
        Sample(
            lambda d, x, y: torch.baddbmm(torch.ones((), dtype=x.dtype), x, y.mT) if nested(x) else 1 + x @ y.mT,
            TWO,
            ("sequences", "equal"),
            FP32,
            tolerance=1e-4,
        )
    ],
    "addbmm": [
        Sample(
            lambda d, x, y: torch.addbmm(torch.ones((), dtype=x.dtype), x.mT, y),
            TWO,
            ("sequences", "equal"),
            FP32,
            reference=lambda d, xs, ys: 1 + sum(x.mT @ y for x, y in zip(xs, ys, strict=True)),
            isolated=False,
            tolerance=1e-4,
        )
    ],
    "bilinear": [
        Sample(
            lambda d, x, y: F.bilinear(x, y, torch.linspace(-1, 1, 32, dtype=x.dtype).view(2, 4, 4)),
            TWO,
            TAIL,
            FP32,
            tolerance=1e-4,
        )
    ],
    "cosine_similarity": [
        Sample(lambda d, x, y: F.cosine_similarity(x, y, d(-1)), TWO, dtypes=FP32, tolerance=1e-4),
        Sample(lambda d, x, y: F.cosine_similarity(x, y, d(0)), TWO, FULL, FP32, tolerance=1e-4),
    ],
    "pairwise_distance": [Sample(lambda d, x, y: F.pairwise_distance(x, y), TWO, TAIL, FP32, tolerance=1e-4)],
    "cross": [
        Sample(
            lambda d, x, y: torch.cross(x, y, d(-1)), TWO, ("sequences",), FP32, shapes=((2, 3), (5, 3)), ragged=(0,)
        )
    ],
    "linalg_cross": [
        Sample(
            lambda d, x, y: torch.linalg.cross(x, y),
            TWO,
            ("sequences", "single"),
            FP32,
            shapes=((2, 3), (5, 3)),
            ragged=(0,),
        )
    ],
    "chain_matmul": [
        Sample(
            lambda d, x: torch.linalg.multi_dot([x, of(MATRIX, x), of(MATRIX.mT, x)]),
            layouts=("sequences",),
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "linalg_multi_dot": [
        Sample(
            lambda d, x: torch.linalg.multi_dot([x, of(MATRIX, x), of(MATRIX.mT, x)]),
            layouts=("sequences", "single"),
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "einsum": [
        Sample(
            lambda d, x, y: torch.einsum("bld,bmd->blm" if nested(x) else "ld,md->lm", x, y),
            TWO,
            ("sequences", "single", "equal", "empty_element", "empty_batch"),
            FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x, y: torch.einsum("bld,ble->bde" if nested(x) else "ld,le->de", x, y),
            TWO,
            ("sequences", "single", "empty_element", "empty_batch"),
            FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x: torch.einsum("...d,de->...e", x, of(MATRIX, x)),
            layouts=("sequences", "two_ragged", "batch_second", "empty_batch"),
            dtypes=FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x, y: torch.einsum("bld,bld->bl" if nested(x) else "ld,ld->l", x, y),
            TWO,
            ("sequences", "empty_element"),
            FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x: torch.einsum("bld->bd" if nested(x) else "ld->d", x),
            layouts=("sequences", "empty_element"),
            dtypes=FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x, y, z: torch.einsum("bld,bmd,bme->ble" if nested(x) else "ld,md,me->le", x, y, z),
            THREE,
            ("sequences", "single"),
            FP32,
            tolerance=1e-4,
        ),
        Sample(
            lambda d, x: torch.einsum("bcl,ce->bel" if nested(x) else "cl,ce->el", x, of(MATRIX, x)),
            layouts=("channel_first",),
            dtypes=FP32,
            tolerance=1e-4,
        ),
    ],
    "tensordot": [
        Sample(lambda d, x: torch.tensordot(x, of(MATRIX, x), 1), layouts=FIRST, dtypes=FP32, tolerance=1e-4),
    ],
    "kron": [
        Sample(
            lambda d, x: torch.kron(x, torch.tensor([[1.0, 2.0]], dtype=x.dtype)),
            layouts=("sequences", "single"),
            dtypes=FP32,
        ),
        Sample(lambda d, x, y: torch.kron(x, y), TWO, ("sequences", "flat"), FP32),
    ],
    "cdist": [
        Sample(lambda d, x, y: torch.cdist(x, y), TWO, ("sequences", "equal"), FP32, tolerance=1e-3),
        Sample(lambda d, x: torch.cdist(x, of(MATRIX.mT, x)), layouts=("sequences",), dtypes=FP32, tolerance=1e-3),
    ],
    "scaled_dot_product_attention": [
        *[
            Sample(attention(**settings), THREE, dtypes=FP32, tolerance=1e-4, **HEADS)
            for settings in ({}, {"is_causal": True}, {"scale": 0.3})
        ],
        Sample(attention(), THREE, dtypes=FP32, tolerance=1e-4, **ONE_HEAD),
        Sample(masked(False), THREE, dtypes=FP32, tolerance=1e-4, **ONE_HEAD),
        Sample(masked(True), THREE, dtypes=FP32, tolerance=1e-4, **HEADS),
    ],
    "multi_head_attention_forward": [
        Sample(
            lambda d, x: (
                F.multi_head_attention_forward(
                    *([x if nested(x) else x[:, None]] * 3),
                    4,
                    2,
                    torch.linspace(-1, 1, 48, dtype=x.dtype).view(12, 4),
                    None,
                    None,
                    None,
                    False,
                    0.0,
                    torch.eye(4, dtype=x.dtype),
                    None,
                    need_weights=False,
                )[0]
                if nested(x)
                else F.multi_head_attention_forward(
                    *([x[:, None]] * 3),
                    4,
                    2,
                    torch.linspace(-1, 1, 48, dtype=x.dtype).view(12, 4),
                    None,
                    None,
                    None,
                    False,
                    0.0,
                    torch.eye(4, dtype=x.dtype),
                    None,
                    need_weights=False,
                )[0][:, 0]
            ),
            layouts=("batch_second",),
            dtypes=FP32,
            tolerance=1e-4,
        )
    ],
    "_nested_tensor_from_mask_left_aligned": [
        Sample(
            lambda d, x: torch._nested_tensor_from_mask_left_aligned(x, x > 0),
            layouts=("sequences",),
            dtypes=FP32,
            grad=False,
            reference=lambda d, es: False,
        )
    ],
    "_transformer_encoder_layer_fwd": [
        Sample(
            lambda d, x, first=first: encoder_layer(x, first) if nested(x) else encoder_layer(x[None], first)[0],
            layouts=("sequences", "single", "equal"),
            dtypes=FP32,
            grad=False,
            tolerance=1e-4,
        )
        for first in (True, False)
    ],
}
