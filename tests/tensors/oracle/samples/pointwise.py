"""Samples of the value-by-value families."""

import torch
import torch.nn.functional as F
from tensors.oracle.sample import FLOATS, INTS, Sample

from danling.tensors.ops.table import find

FP32 = (torch.float32,)
LAYOUTS = ("sequences", "batch_second", "channel_first", "two_ragged", "single", "empty_element", "empty_batch")


def unary(name, kind="normal", dtypes=FLOATS, grad=True, **settings):
    func = find(name)
    return Sample(lambda d, x: func(x, **settings), (kind,), LAYOUTS, dtypes, grad)


def binary(name, a="normal", b="normal", dtypes=FLOATS, grad=True):
    func = find(name)
    if func is None:
        return None
    return Sample(lambda d, x, y: func(x, y), (a, b), LAYOUTS, dtypes, grad)


def spread(names, make, *args, **kwargs):
    return {name: [make(name, *args, **kwargs)] for name in names.split() if find(name) is not None}


SAMPLES = {
    **spread(
        "abs angle asinh atan ceil conj conj_physical cos cosh deg2rad erf erfc exp exp2 expm1 floor frac isfinite isinf "
        "isnan isneginf isposinf isreal nan_to_num neg positive rad2deg resolve_conj resolve_neg round sgn sigmoid sign "
        "signbit sin sinc sinh square tan tanh trunc real logical_not",
        unary,
    ),
    **spread("acos asin atanh erfinv", unary, "signed_unit"),
    **spread("digamma lgamma log log10 log1p log2 reciprocal rsqrt sqrt", unary, "positive"),
    **spread("acosh", unary, "above_one"),
    **spread("i0", unary, "signed_unit", FP32),
    "logit": [unary("logit", "unit"), unary("logit", "unit", eps=0.1)],
    "bitwise_not": [unary("bitwise_not", dtypes=INTS, grad=False)],
    "imag": [unary("imag", "complex", FP32)],
    "frexp": [unary("frexp", dtypes=FP32, grad=False)],
    "mvlgamma": [unary("mvlgamma", "above_one", FP32, p=2)],
    "polygamma": [Sample(lambda d, x: torch.polygamma(1, x), ("positive",), LAYOUTS, FP32)],
    "fake_quantize_per_tensor_affine": [
        Sample(
            lambda d, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
            layouts=LAYOUTS,
            dtypes=FP32,
            grad=False,
        )
    ],
    **spread(
        "special_bessel_j0 special_bessel_j1 special_i0e special_i1 special_i1e special_log_ndtr special_erfcx "
        "special_ndtr special_modified_bessel_i0 special_modified_bessel_i1 special_airy_ai special_spherical_bessel_j0",
        unary,
        dtypes=FP32,
        grad=False,
    ),
    **spread(
        "special_bessel_y0 special_bessel_y1 special_entr special_modified_bessel_k0 special_modified_bessel_k1 "
        "special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1",
        unary,
        "positive",
        FP32,
        False,
    ),
    "special_ndtri": [unary("special_ndtri", "unit", FP32)],
    **spread(
        "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu silu softplus "
        "softshrink softsign tanhshrink",
        unary,
    ),
    "rrelu": [Sample(lambda d, x: F.rrelu(x, 0.1, 0.3, training=False), layouts=LAYOUTS)],
    "threshold": [Sample(lambda d, x: F.threshold(x, 0.1, 20.0), layouts=LAYOUTS)],
    **spread("add sub mul maximum minimum fmax fmin hypot atan2 copysign rsub logaddexp logaddexp2", binary),
    **spread("div remainder fmod", binary, "normal", "positive"),
    **spread("floor_divide", binary, "normal", "positive", FLOATS, False),
    **spread("pow float_power xlogy", binary, "positive", "normal"),
    **spread("special_xlog1py", binary, "normal", "positive", FP32),
    **spread("special_zeta", binary, "above_one", "positive", FP32, False),
    **spread("igamma igammac", binary, "positive", "positive", FP32, False),
    **spread("gcd lcm", binary, dtypes=INTS, grad=False),
    **spread("bitwise_and bitwise_or bitwise_xor", binary, dtypes=INTS, grad=False),
    **spread("bitwise_left_shift bitwise_right_shift", binary, "bits", "index", INTS, False),
    **spread("heaviside nextafter", binary, dtypes=FP32, grad=False),
    **spread("ldexp", binary, "normal", "index", FP32),
    **spread("complex", binary, dtypes=FP32),
    **spread("polar", binary, "positive", "normal", FP32),
    **spread(
        " ".join(
            f"special_{prefix}{name}"
            for prefix, name in [
                *((p, f"chebyshev_polynomial_{k}") for p in ("", "shifted_") for k in "tuvw"),
                ("", "hermite_polynomial_h"),
                ("", "hermite_polynomial_he"),
                ("", "laguerre_polynomial_l"),
                ("", "legendre_polynomial_p"),
            ]
        ),
        binary,
        "unit",
        "index",
        FP32,
        False,
    ),
    **spread("eq ne gt ge lt le isclose logical_and logical_or logical_xor", binary, grad=False),
    "addcmul": [
        Sample(lambda d, x, y, z: torch.addcmul(x, y, z, value=0.5), ("normal",) * 3, LAYOUTS),
    ],
    "addcdiv": [
        Sample(lambda d, x, y, z: torch.addcdiv(x, y, z, value=0.5), ("normal", "normal", "positive"), LAYOUTS),
    ],
    "lerp": [
        Sample(lambda d, x, y, z: torch.lerp(x, y, z), ("normal", "normal", "unit"), LAYOUTS),
        Sample(lambda d, x, y: torch.lerp(x, y, 0.3), ("normal", "normal"), LAYOUTS),
    ],
    "clamp": [
        Sample(lambda d, x: torch.clamp(x, -0.5, 0.5), layouts=LAYOUTS),
        Sample(lambda d, x, y: torch.clamp(x, max=y), ("normal", "normal"), LAYOUTS),
        Sample(lambda d, x: x.clip(min=0.1), layouts=LAYOUTS),
    ],
    "clamp_min": [unary("clamp_min", min=0.1)],
    "clamp_max": [unary("clamp_max", max=0.1)],
    "where": [
        Sample(lambda d, c, x, y: torch.where(c, x, y), ("bool", "normal", "normal"), LAYOUTS),
        Sample(lambda d, c, x: torch.where(c, x, 0.0), ("bool", "normal"), LAYOUTS),
        Sample(lambda d, c, x: x.where(c, torch.tensor(1.0, dtype=x.dtype)), ("bool", "normal"), LAYOUTS),
    ],
    "masked_fill": [
        Sample(lambda d, x, c: x.masked_fill(c, 2.0), ("normal", "bool"), LAYOUTS),
    ],
}
