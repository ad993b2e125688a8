"""Dropout: draws for real values only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.nested_tensor import values_of, wrap
from danling.tensors.ops.base import like, names
from danling.tensors.ops.table import register


@register("dropout", "dropout", "alpha_dropout", "native_dropout")
def dropout(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    values = values_of(input)
    out = func(values, *args, **kwargs)
    if out is values:
        return input
    if isinstance(out, tuple):
        return tuple(like(input, o) for o in out)
    return wrap(out, input._layout, input._flags)


@register("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_alpha_dropout")
def feature_dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **kwargs: Any
) -> Any:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if names(func).endswith("_"):
        inplace = True
    training = kwargs.get("train", training)
    if not training or p == 0:
        return input
    layout, values = input._layout, values_of(input)
    alpha = "alpha" in names(func)
    # One draw per index of `.shape` dims 0 and 1.
    noise = torch.empty(_noise_shape(layout), dtype=values.dtype, device=values.device)
    noise.bernoulli_(1 - p)
    keep = _spread(layout, noise, values)
    if alpha:
        slope = -1.7580993408473766
        a = ((1 - p) * (1 + p * slope * slope)) ** -0.5 if p < 1 else 0.0
        out = (values * keep + slope * (1 - keep)) * a - a * p * slope
    else:
        out = values * (keep / (1 - p) if p < 1 else keep)
    if inplace:
        values.copy_(out)
        return input
    return like(input, out)


def _noise_shape(layout: Any) -> tuple[int, ...]:
    d = layout.element_dim(1) if layout.rank else None
    if d is None:  # dim 1 is the batch, dim 0 the first element dim
        d = 0
    if d in layout.ragged_dims:
        rows = layout.segments.batch_size if layout.segments.k > 1 else layout.rows
        return (rows, layout.max_sizes[layout.ragged_dims.index(d)]) if layout.segments.k > 1 else (rows,)
    return (layout.batch_size, layout.static_sizes[layout.static_dims.index(d)])


def _spread(layout: Any, noise: Tensor, values: Tensor) -> Tensor:
    d = (layout.element_dim(1) if layout.rank else None) or 0
    segments = layout.segments
    if d in layout.ragged_dims:
        if segments.k > 1:
            at = segments.on(("coord", layout.ragged_dims.index(d)), values.device)
            rows = noise[segments.on("element", values.device), at]
        else:
            rows = noise
        return rows.view(-1, *[1] * (values.dim() - 1))
    rows = (
        noise if layout.dense else kernels.segment_expand(noise, segments.on("offsets", values.device), segments.rows)
    )
    shape = [values.shape[0]] + [1] * (values.dim() - 1)
    shape[layout.values_dim(d)] = rows.shape[1]
    return rows.reshape(shape)
