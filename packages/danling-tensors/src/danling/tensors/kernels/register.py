"""The operators of the ``danling`` namespace: their shapes for tracing, and the reference for every device.

A compiled library only adds kernels for its own device; wherever none is loaded, the reference serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danling.tensors.kernels import reference
from danling.tensors.kernels.schemas import SCHEMAS

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


@_fake("unpad_lengths")
def _(padded, lengths):
    context = torch.library.get_ctx()
    rows, longest = context.new_dynamic_size(), context.new_dynamic_size()
    return padded.new_empty((rows, *padded.shape[2:])), lengths.new_empty((lengths.shape[0] + 1,)), longest


@_fake("pack")
def _(tensors):
    return tensors[0].new_empty((sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]))


@_fake("pad_list")
def _(tensors, max_sizes, fill):
    static = tensors[0].shape[len(max_sizes) :] if tensors else ()
    return (tensors[0] if tensors else fill).new_empty((len(tensors), *max_sizes, *static))


@_fake("prefix_lengths")
def _(mask):
    return mask.new_empty((mask.shape[0],), dtype=torch.int64)


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
