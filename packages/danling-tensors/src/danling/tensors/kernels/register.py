"""The operators of the ``danling`` namespace: schemas, shapes for tracing, gradients, and the reference for every device.

A compiled library only adds kernels for its own device; wherever none is loaded, the reference serves. The gradients are made of
the operators themselves, so that they can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.kernels import reference

SCHEMAS = {
    "pad": "(Tensor values, Tensor offsets, Tensor? sizes, SymInt[] max_sizes, Tensor fill) -> Tensor",
    "unpad": "(Tensor padded, Tensor offsets, Tensor? sizes, SymInt rows) -> Tensor",
    "pack": "(Tensor[] tensors) -> Tensor",
    "pad_list": "(Tensor[] tensors, SymInt[] max_sizes, Tensor fill) -> Tensor",
    "segment_expand": "(Tensor per_segment, Tensor offsets, SymInt rows) -> Tensor",
    "segment_sum": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_mean": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_max": "(Tensor values, Tensor offsets) -> (Tensor, Tensor)",
    "segment_min": "(Tensor values, Tensor offsets) -> (Tensor, Tensor)",
    "segment_softmax": "(Tensor values, Tensor offsets, bool log) -> Tensor",
    "segment_softmax_backward": "(Tensor grad, Tensor output, Tensor offsets, bool log) -> Tensor",
    "segment_logsumexp": "(Tensor values, Tensor offsets) -> Tensor",
    "segment_cumsum": "(Tensor values, Tensor offsets, bool reverse) -> Tensor",
}

library = torch.library.Library("danling", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

ops = torch.ops.danling


# Shapes, for FakeTensorMode, the meta device and torch.compile


def _fake(name: str):
    return torch.library.register_fake(f"danling::{name}", lib=library)


def _per_segment(values: Tensor, offsets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, *values.shape[1:]), dtype=dtype)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() or values.is_complex() else torch.int64


@_fake("pad")
def _(values, offsets, sizes, max_sizes, fill):
    return values.new_empty((offsets.shape[0] - 1, *max_sizes, *values.shape[1:]))


@_fake("unpad")
def _(padded, offsets, sizes, rows):
    return padded.new_empty((rows, *padded.shape[1 + (1 if sizes is None else sizes.shape[1]) :]))


@_fake("pack")
def _(tensors):
    return tensors[0].new_empty((sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]))


@_fake("pad_list")
def _(tensors, max_sizes, fill):
    static = tensors[0].shape[len(max_sizes) :] if tensors else ()
    return (tensors[0] if tensors else fill).new_empty((len(tensors), *max_sizes, *static))


@_fake("segment_expand")
def _(per_segment, offsets, rows):
    return per_segment.new_empty((rows, *per_segment.shape[1:]))


@_fake("segment_sum")
def _(values, offsets):
    return _per_segment(values, offsets, _sum_dtype(values))


for _name in ("segment_mean", "segment_logsumexp"):
    _fake(_name)(_per_segment)

for _name in ("segment_max", "segment_min"):
    _fake(_name)(lambda values, offsets: (_per_segment(values, offsets), _per_segment(values, offsets, torch.int64)))


@_fake("segment_softmax")
def _(values, offsets, log):
    return values.new_empty(values.shape)


@_fake("segment_softmax_backward")
def _(grad, output, offsets, log):
    return grad.new_empty(grad.shape)


@_fake("segment_cumsum")
def _(values, offsets, reverse):
    return values.new_empty(values.shape, dtype=_sum_dtype(values))


# Gradients


def _autograd(name: str, setup, backward) -> None:
    torch.library.register_autograd(f"danling::{name}", backward, setup_context=setup, lib=library)


def _pad_setup(ctx: Any, inputs, output) -> None:
    values, ctx.offsets, ctx.sizes, _, _ = inputs
    ctx.rows = values.shape[0]


def _pad_backward(ctx: Any, grad: Tensor):
    return ops.unpad(grad, ctx.offsets, ctx.sizes, ctx.rows), None, None, None, None


def _unpad_setup(ctx: Any, inputs, output) -> None:
    padded, ctx.offsets, ctx.sizes, _ = inputs
    ctx.max_sizes = padded.shape[1 : 1 + (1 if ctx.sizes is None else ctx.sizes.shape[1])]


def _unpad_backward(ctx: Any, grad: Tensor):
    zero = torch.zeros((), dtype=grad.dtype)
    return ops.pad(grad, ctx.offsets, ctx.sizes, ctx.max_sizes, zero), None, None, None


def _pack_setup(ctx: Any, inputs, output) -> None:
    ctx.rows = [t.shape[0] for t in inputs[0]]


def _pack_backward(ctx: Any, grad: Tensor):
    return list(grad.split(ctx.rows))


def _pad_list_setup(ctx: Any, inputs, output) -> None:
    tensors, max_sizes, _ = inputs
    ctx.shapes = [t.shape[: len(max_sizes)] for t in tensors]


def _pad_list_backward(ctx: Any, grad: Tensor):
    rows = zip(grad.unbind(), ctx.shapes, strict=True)
    return [row[tuple(slice(size) for size in shape)] for row, shape in rows], None, None


def _rows_setup(ctx: Any, inputs, output) -> None:
    ctx.offsets, ctx.rows = inputs[1], inputs[0].shape[0]


def _mean_backward(ctx: Any, grad: Tensor):
    lengths = ctx.offsets.diff().view(-1, *[1] * (grad.dim() - 1))
    return ops.segment_expand((grad / lengths).to(grad.dtype), ctx.offsets, ctx.rows), None


def _extremum_setup(ctx: Any, inputs, output) -> None:
    _rows_setup(ctx, inputs, output)
    ctx.positions = output[1]
    ctx.mark_non_differentiable(output[1])


def _extremum_backward(ctx: Any, grad: Tensor, _grad_positions):
    # An empty element has no position (-1): its gradient goes to a row past the end, which is cut off again.
    first = ctx.offsets[:-1].view(-1, *[1] * (grad.dim() - 1))
    rows = torch.where(ctx.positions < 0, ctx.rows, first + ctx.positions)
    return grad.new_zeros((ctx.rows + 1, *grad.shape[1:])).scatter(0, rows, grad)[: ctx.rows], None


def _softmax_setup(ctx: Any, inputs, output) -> None:
    _, ctx.offsets, ctx.log = inputs
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: Tensor):
    (output,) = ctx.saved_tensors
    return ops.segment_softmax_backward(grad, output, ctx.offsets, ctx.log), None, None


def _softmax_backward_setup(ctx: Any, inputs, output) -> None:
    grad, out, ctx.offsets, ctx.log = inputs
    ctx.save_for_backward(grad, out)


def _softmax_backward_backward(ctx: Any, gg: Tensor):
    grad, out = ctx.saved_tensors

    def spread(rows: Tensor) -> Tensor:
        return ops.segment_expand(ops.segment_sum(rows, ctx.offsets), ctx.offsets, rows.shape[0])

    if ctx.log:  # grad - exp(out) * sum(grad)
        probability = out.exp()
        return gg - spread(gg * probability), -gg * probability * spread(grad), None, None
    # out * (grad - sum(grad * out))
    inner = spread(gg * out)
    return out * (gg - inner), gg * (grad - spread(grad * out)) - grad * inner, None, None


def _logsumexp_setup(ctx: Any, inputs, output) -> None:
    values, ctx.offsets = inputs
    ctx.save_for_backward(values, output)


def _logsumexp_backward(ctx: Any, grad: Tensor):
    values, output = ctx.saved_tensors
    rows = values.shape[0]
    output = output.masked_fill(output == -torch.inf, 0)  # all values are -inf then, and take no gradient
    share = (values - ops.segment_expand(output, ctx.offsets, rows)).exp()
    return share * ops.segment_expand(grad, ctx.offsets, rows), None


def _cumsum_setup(ctx: Any, inputs, output) -> None:
    _, ctx.offsets, ctx.reverse = inputs


def _offsets_setup(ctx: Any, inputs, output) -> None:
    ctx.offsets = inputs[1]


_autograd("pad", _pad_setup, _pad_backward)
_autograd("unpad", _unpad_setup, _unpad_backward)
_autograd("pack", _pack_setup, _pack_backward)
_autograd("pad_list", _pad_list_setup, _pad_list_backward)
_autograd("segment_expand", _offsets_setup, lambda ctx, grad: (ops.segment_sum(grad, ctx.offsets), None, None))
_autograd("segment_sum", _rows_setup, lambda ctx, grad: (ops.segment_expand(grad, ctx.offsets, ctx.rows), None))
_autograd("segment_mean", _rows_setup, _mean_backward)
_autograd("segment_max", _extremum_setup, _extremum_backward)
_autograd("segment_min", _extremum_setup, _extremum_backward)
_autograd("segment_softmax", _softmax_setup, _softmax_backward)
_autograd("segment_softmax_backward", _softmax_backward_setup, _softmax_backward_backward)
_autograd("segment_logsumexp", _logsumexp_setup, _logsumexp_backward)
_autograd(
    "segment_cumsum",
    _cumsum_setup,
    lambda ctx, grad: (ops.segment_cumsum(grad, ctx.offsets, not ctx.reverse), None, None),
)
