"""Ops that work value by value: they run on the packed values and keep the layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, rebind, values_of, wrap
from danling.tensors.ops.broadcast import align
from danling.tensors.ops.table import register
from danling.tensors.packing import difference

_NUMBERS = (int, float, bool, complex)


def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `func` on aligned values; in-place forms, `inplace=True` and `out=` included."""
    x = args[0] if args else None
    if not isinstance(x, NestedTensor):
        return _general(func, args, kwargs)
    layout = x._layout
    count = len(args)
    if kwargs:
        for other in kwargs.values():
            if isinstance(other, (Tensor, tuple, list)):
                return _general(func, args, kwargs)
        if count > 2:
            return _general(func, args, kwargs)
    if count == 1:
        values = values_of(x)
        out = func(values, **kwargs) if kwargs else func(values)
    elif count == 2:
        other = args[1]
        if type(other) not in _NUMBERS:
            if not isinstance(other, NestedTensor) or (other._layout is not layout and other._layout != layout):
                return _general(func, args, kwargs)
            other = values_of(other)
        values = values_of(x)
        out = func(values, other, **kwargs) if kwargs else func(values, other)
    else:
        return _general(func, args, kwargs)
    if out is values:
        return written(x)
    if type(out) is Tensor:
        return wrap(out, layout, x._flags)
    return rewrap(out, layout, x._flags)


def written(x: NestedTensor) -> NestedTensor:
    """`x` after an in-place op: joined to the graph anew, should it have been made outside of one."""
    if x._values.requires_grad and torch.is_grad_enabled():
        rebind(x, x._values)
    return x


def rewrap(out: Any, layout: Layout, flags: Any) -> Any:
    """Wrap the tensors of a result that has the rows of `layout`."""
    if isinstance(out, Tensor):
        return wrap(out, layout.with_static(tuple(out.shape[1:])), flags)
    if isinstance(out, (tuple, list)):
        parts = [rewrap(o, layout, flags) for o in out]
        return type(out)(parts)  # type: ignore[call-arg]
    return out


def _general(func: Any, args: Any, kwargs: Any) -> Any:
    destination = kwargs.get("out")
    if destination is not None:
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    slots: list[tuple[Any, Any]] = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    slots += [(key, a) for key, a in kwargs.items() if isinstance(a, Tensor)]
    operands = [a for _, a in slots]
    nested = [a for a in operands if isinstance(a, NestedTensor)]
    if not nested:
        raise ValueError("out= is a NestedTensor but no operand is; write into out.concat")
    name = getattr(func, "__name__", "op")
    first = nested[0]
    layout, values = align(operands, name)
    inplace = name.endswith("_") and not name.endswith("__") or name.startswith("__i") and name not in ("__invert__",)
    target = args[0] if inplace else None
    if inplace:
        _check_target(target, layout, name)
    args, kwargs = list(args), dict(kwargs)
    for (slot, _), value in zip(slots, values):
        if isinstance(slot, int):
            args[slot] = value
        else:
            kwargs[slot] = value
    out = func(*args, **kwargs)
    if destination is not None:
        return write_out(destination, out, layout)
    if isinstance(out, Tensor):
        for operand, value in zip(operands, values):
            if out is value and isinstance(operand, NestedTensor) and out is operand._values:
                return written(operand)
    return rewrap(out, layout, first._flags)


def _check_target(target: Any, layout: Layout, name: str) -> None:
    if not isinstance(target, NestedTensor):
        raise ValueError(f"{name}: a dense tensor cannot take a ragged result in place")
    own = target._layout
    if own.ragged_dims != layout.ragged_dims or own.rank != layout.rank or own.segments != layout.segments:
        raise ValueError(
            f"{name}: the result's structure is not that of the tensor written: it {difference(layout, own)}"
        )


def write_out(destination: Any, out: Any, layout: Layout) -> Any:
    """Put packed results that have the rows of `layout` into what was given as `out=`."""
    targets = list(destination) if isinstance(destination, (tuple, list)) else [destination]
    for target in targets:
        if not isinstance(target, NestedTensor):
            raise ValueError("out= must be a NestedTensor of the result's structure")
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    for target, result in zip(targets, results):
        expected = layout.with_static(tuple(result.shape[1:]))
        if target._layout != expected:
            raise ValueError(f"out= has not the structure of the result: it {difference(target._layout, expected)}")
        if target.dtype != result.dtype:
            raise ValueError(f"out= has dtype {target.dtype}, the result {result.dtype}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in [*targets, *results]):
        raise RuntimeError("out= does not support automatic differentiation, but an argument requires grad")
    for target, result in zip(targets, results):
        target._values.copy_(result)
    return destination


_UNARY = """abs acos acosh angle asin asinh atan atanh bitwise_not ceil conj conj_physical cos cosh deg2rad digamma erf
erfc erfinv exp exp2 expm1 fake_quantize_per_tensor_affine floor frac frexp i0 imag isfinite isinf isnan isneginf
isposinf isreal lgamma log log10 log1p log2 logical_not logit mvlgamma nan_to_num neg polygamma positive rad2deg real
reciprocal resolve_conj resolve_neg round rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc
special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx
special_i0e special_i1 special_i1e special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1
special_modified_bessel_k0 special_modified_bessel_k1 special_ndtr special_ndtri special_scaled_modified_bessel_k0
special_scaled_modified_bessel_k1 special_spherical_bessel_j0"""

_ACTIVATION = """celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu
selu silu softplus softshrink softsign tanhshrink threshold"""

_BINARY = """add sub rsub mul div floor_divide remainder fmod pow float_power atan2 copysign hypot maximum minimum fmax
fmin logaddexp logaddexp2 nextafter xlogy ldexp gcd lcm heaviside igamma igammac complex polar special_xlog1py
special_zeta special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_hermite_polynomial_h
special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p"""

_COMPARISON = """eq ne gt ge lt le isclose logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
bitwise_left_shift bitwise_right_shift"""

_TERNARY = "addcmul addcdiv lerp clamp clamp_min clamp_max"

_RANDOM = "bernoulli poisson binomial normal _standard_gamma"

_FILL = """copy_ fill_ fill zero_ bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"""

register("unary", *_UNARY.split())(pointwise)
register("activation", *_ACTIVATION.split())(pointwise)
register("binary", *_BINARY.split())(pointwise)
register("comparison", *_COMPARISON.split())(pointwise)
register("ternary", *_TERNARY.split())(pointwise)
register("factory", *_RANDOM.split())(pointwise)
register("in-place", *_FILL.split())(pointwise)


@register("ternary", "where", "masked_fill")
def masked(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`where` and `masked_fill`, which take their tensors in any slot."""
    if len(args) == 1 and not kwargs:
        return torch.nonzero(args[0], as_tuple=True)
    return pointwise(func, *args, **kwargs)
