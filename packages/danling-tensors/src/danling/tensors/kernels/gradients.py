"""Derivatives of the operators, in both directions, made of the operators themselves so that they can be derived again.

Each operator gets one set of rules and two ways to them. Inside ``torch.compile`` the operator's own registration is used. In
eager mode an :class:`torch.autograd.Function` is, because that costs a third of the time, and because the registration knows
nothing of forward mode and of ``torch.func``: tangents would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from danling.tensors.kernels.register import library, ops

_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled


def _functions(name: str, forward: Callable, setup: Callable, backward: Callable, jvp: Callable) -> tuple[Any, Any]:
    """The rules as an autograd function, and as one that works under ``torch.func`` but is called three times as slowly."""

    def forward_and_setup(ctx: Any, *args):
        output = forward(*args)
        setup(ctx, args, output)
        return output

    shared = {"backward": staticmethod(backward), "jvp": staticmethod(jvp)}
    split = {"forward": staticmethod(forward), "setup_context": staticmethod(setup)}
    base = (torch.autograd.Function,)
    return type(name, base, {"forward": staticmethod(forward_and_setup)} | shared), type(name, base, split | shared)


def _differentiable(name: str, setup: Callable, backward: Callable, jvp: Callable) -> Callable:
    """Registers the rules of an operator and returns the function that calls it."""
    op = getattr(ops, name).default
    torch.library.register_autograd(f"danling::{name}", backward, setup_context=setup, lib=library)

    def forward(*args):
        with _below_autograd():
            return op(*args)

    plain, transformable = _functions(name, forward, setup, backward, jvp)

    def call(data: Tensor, other: Tensor, *rest):
        if _is_compiling():
            return op(data, other, *rest)
        if _transforms_active():
            return transformable.apply(data, other, *rest)
        if (_is_grad_enabled() and (data.requires_grad or other.requires_grad)) or forward_ad._current_level >= 0:
            return plain.apply(data, other, *rest)
        with _below_autograd():  # spares the registered rule, which would find nothing to do in twice the kernel's time
            return op(data, other, *rest)

    return call


def _differentiable_list(name: str, setup: Callable, backward: Callable, jvp: Callable) -> Callable:
    """The same for an operator on a list of tensors, which an autograd function takes one by one, after the other arguments."""
    op = getattr(ops, name).default
    torch.library.register_autograd(f"danling::{name}", backward, setup_context=setup, lib=library)
    others = len(op._schema.arguments) - 1

    def forward(*args):
        with _below_autograd():
            return op(list(args[others:]), *args[:others])

    def backward_each(ctx: Any, grad: Tensor):
        grads = backward(ctx, grad)
        return *[None] * others, *(grads[0] if others else grads)

    plain, transformable = _functions(
        name,
        forward,
        lambda ctx, inputs, output: setup(ctx, (inputs[others:], *inputs[:others]), output),
        backward_each,
        lambda ctx, *tangents: jvp(ctx, tangents[others:]),
    )

    def call(tensors, *rest):
        if _is_compiling():
            return op(tensors, *rest)
        if _transforms_active():
            return transformable.apply(*rest, *tensors)
        if (_is_grad_enabled() and any(t.requires_grad for t in tensors)) or forward_ad._current_level >= 0:
            return plain.apply(*rest, *tensors)
        with _below_autograd():
            return op(tensors, *rest)

    return call


def _save(ctx: Any, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _per_row(per_segment: Tensor, like: Tensor) -> Tensor:
    return per_segment.view(-1, *[1] * (like.dim() - 1))


# Copies


def _pad_setup(ctx: Any, inputs, output) -> None:
    values, ctx.offsets, ctx.sizes, ctx.max_sizes, _ = inputs
    ctx.rows = values.shape[0]


def _pad_zero(ctx: Any, values: Tensor) -> Tensor:
    return pad(values, ctx.offsets, ctx.sizes, ctx.max_sizes, torch.zeros((), dtype=values.dtype, device="cpu"))


def _unpad_setup(ctx: Any, inputs, output) -> None:
    padded, ctx.offsets, ctx.sizes, ctx.rows = inputs
    ctx.max_sizes = padded.shape[1 : 1 + (1 if ctx.sizes is None else ctx.sizes.shape[1])]


def _unpad_as(ctx: Any, padded: Tensor) -> Tensor:
    return unpad(padded, ctx.offsets, ctx.sizes, ctx.rows)


pad: Callable = _differentiable(
    "pad",
    _pad_setup,
    lambda ctx, grad: (_unpad_as(ctx, grad), None, None, None, None),
    lambda ctx, tangent, *_: _pad_zero(ctx, tangent),
)
unpad: Callable = _differentiable(
    "unpad",
    _unpad_setup,
    lambda ctx, grad: (_pad_zero(ctx, grad), None, None, None),
    lambda ctx, tangent, *_: _unpad_as(ctx, tangent),
)


def _unpad_lengths_setup(ctx: Any, inputs, output) -> None:
    values, ctx.offsets, _ = output
    ctx.sizes, ctx.rows, ctx.max_sizes = None, values.shape[0], inputs[0].shape[1:2]
    ctx.mark_non_differentiable(ctx.offsets)


unpad_lengths: Callable = _differentiable(
    "unpad_lengths",
    _unpad_lengths_setup,
    lambda ctx, grad, *_: (_pad_zero(ctx, grad), None),
    lambda ctx, tangent, *_: (_unpad_as(ctx, tangent), None, None),
)


def _pack_setup(ctx: Any, inputs, output) -> None:
    ctx.shapes = [tensor.shape for tensor in inputs[0]]
    ctx.like = output.detach()


def _tangents(ctx: Any, tangents) -> list[Tensor]:
    return [
        ctx.like.new_zeros(shape) if tangent is None else tangent
        for tangent, shape in zip(tangents, ctx.shapes, strict=True)
    ]


def _pad_list_setup(ctx: Any, inputs, output) -> None:
    tensors, ctx.max_sizes, _ = inputs
    ctx.shapes = [tensor.shape for tensor in tensors]
    ctx.like = output.detach()


def _pad_list_backward(ctx: Any, grad: Tensor):
    pairs = zip(grad.unbind(), ctx.shapes, strict=True)
    return [row[tuple(slice(size) for size in shape)] for row, shape in pairs], None, None


pack: Callable = _differentiable_list(
    "pack",
    _pack_setup,
    lambda ctx, grad: list(grad.split([shape[0] for shape in ctx.shapes])),
    lambda ctx, tangents: pack(_tangents(ctx, tangents)),
)
pad_list: Callable = _differentiable_list(
    "pad_list",
    _pad_list_setup,
    _pad_list_backward,
    lambda ctx, tangents: pad_list(
        _tangents(ctx, tangents), ctx.max_sizes, torch.zeros((), dtype=ctx.like.dtype, device="cpu")
    ),
)


# Expansion, sums and running sums: linear, so the forward rule is the operator itself


def _rows_setup(ctx: Any, inputs, output) -> None:
    ctx.offsets, ctx.rows = inputs[1], inputs[0].shape[0]


def _expand_setup(ctx: Any, inputs, output) -> None:
    ctx.offsets, ctx.rows = inputs[1:]


def _mean_backward(ctx: Any, grad: Tensor):
    shares = (grad / _per_row(ctx.offsets.diff(), grad)).to(grad.dtype)
    return segment_expand(shares, ctx.offsets, ctx.rows), None


def _cumsum_setup(ctx: Any, inputs, output) -> None:
    ctx.offsets, ctx.reverse = inputs[1:]


segment_expand: Callable = _differentiable(
    "segment_expand",
    _expand_setup,
    lambda ctx, grad: (segment_sum(grad, ctx.offsets), None, None),
    lambda ctx, tangent, *_: segment_expand(tangent, ctx.offsets, ctx.rows),
)
segment_sum: Callable = _differentiable(
    "segment_sum",
    _rows_setup,
    lambda ctx, grad: (segment_expand(grad, ctx.offsets, ctx.rows), None),
    lambda ctx, tangent, *_: segment_sum(tangent, ctx.offsets),
)
segment_mean: Callable = _differentiable(
    "segment_mean",
    _rows_setup,
    _mean_backward,
    lambda ctx, tangent, *_: segment_mean(tangent, ctx.offsets),
)
segment_cumsum: Callable = _differentiable(
    "segment_cumsum",
    _cumsum_setup,
    lambda ctx, grad: (segment_cumsum(grad, ctx.offsets, not ctx.reverse), None, None),
    lambda ctx, tangent, *_: segment_cumsum(tangent, ctx.offsets, ctx.reverse),
)


# Extrema: values move from and to the row of the position. An empty element has none (-1) and uses a row past the end.


def _extremum_setup(ctx: Any, inputs, output) -> None:
    _rows_setup(ctx, inputs, output)
    ctx.positions = output[1]
    ctx.mark_non_differentiable(output[1])


def _extremum_rows(ctx: Any) -> Tensor:
    first = _per_row(ctx.offsets[:-1], ctx.positions)
    return torch.where(ctx.positions < 0, ctx.rows, first + ctx.positions)


def _extremum_backward(ctx: Any, grad: Tensor, _grad_positions):
    zeros = grad.new_zeros((ctx.rows + 1, *grad.shape[1:]))
    return zeros.scatter(0, _extremum_rows(ctx), grad)[: ctx.rows], None


def _extremum_jvp(ctx: Any, tangent: Tensor, _):
    padded = torch.cat([tangent, tangent.new_zeros((1, *tangent.shape[1:]))])
    return padded.gather(0, _extremum_rows(ctx)), None


segment_max: Callable = _differentiable("segment_max", _extremum_setup, _extremum_backward, _extremum_jvp)
segment_min: Callable = _differentiable("segment_min", _extremum_setup, _extremum_backward, _extremum_jvp)


# Softmax, with p its result: p (g - sum(g p)), and for its logarithm y: g - exp(y) sum(g)


def _total(rows: Tensor, offsets: Tensor) -> Tensor:
    return segment_expand(segment_sum(rows, offsets), offsets, rows.shape[0])


def _softmax_setup(ctx: Any, inputs, output) -> None:
    _, ctx.offsets, ctx.log = inputs
    _save(ctx, output)


def _softmax_backward(ctx: Any, grad: Tensor):
    return segment_softmax_backward(grad, ctx.saved_tensors[0], ctx.offsets, ctx.log), None, None


def _softmax_jvp(ctx: Any, tangent: Tensor, *_):
    (output,) = ctx.saved_tensors
    if ctx.log:
        return tangent - _total(output.exp() * tangent, ctx.offsets)
    return segment_softmax_backward(tangent, output, ctx.offsets, False)  # its matrix is symmetric


def _softmax_backward_setup(ctx: Any, inputs, output) -> None:
    grad, out, ctx.offsets, ctx.log = inputs
    _save(ctx, grad, out)


def _softmax_backward_backward(ctx: Any, gg: Tensor):
    grad, out = ctx.saved_tensors
    if ctx.log:
        p = out.exp()
        return gg - _total(gg * p, ctx.offsets), -gg * p * _total(grad, ctx.offsets), None, None
    inner = _total(gg * out, ctx.offsets)
    return out * (gg - inner), gg * (grad - _total(grad * out, ctx.offsets)) - grad * inner, None, None


def _softmax_backward_jvp(ctx: Any, grad_tangent: Tensor | None, out_tangent: Tensor | None, *_):
    grad, out = ctx.saved_tensors
    result = torch.zeros_like(grad)
    if grad_tangent is not None:
        result = result + segment_softmax_backward(grad_tangent, out, ctx.offsets, ctx.log)
    if out_tangent is not None and ctx.log:
        result = result - out.exp() * out_tangent * _total(grad, ctx.offsets)
    elif out_tangent is not None:
        inner = _total(grad * out, ctx.offsets)
        result = result + out_tangent * (grad - inner) - out * _total(grad * out_tangent, ctx.offsets)
    return result


def _logsumexp_setup(ctx: Any, inputs, output) -> None:
    values, ctx.offsets = inputs
    _save(ctx, values, output)


def _logsumexp_shares(ctx: Any) -> Tensor:
    values, output = ctx.saved_tensors
    output = output.masked_fill(output == -torch.inf, 0)  # all values are -inf then, and take no share
    return (values - segment_expand(output, ctx.offsets, values.shape[0])).exp()


def _logsumexp_backward(ctx: Any, grad: Tensor):
    shares = _logsumexp_shares(ctx)
    return shares * segment_expand(grad, ctx.offsets, shares.shape[0]), None


segment_softmax: Callable = _differentiable("segment_softmax", _softmax_setup, _softmax_backward, _softmax_jvp)
segment_softmax_backward: Callable = _differentiable(
    "segment_softmax_backward", _softmax_backward_setup, _softmax_backward_backward, _softmax_backward_jvp
)
segment_logsumexp: Callable = _differentiable(
    "segment_logsumexp",
    _logsumexp_setup,
    _logsumexp_backward,
    lambda ctx, tangent, *_: segment_sum(_logsumexp_shares(ctx) * tangent, ctx.offsets),
)
