"""Comparisons of whole batches, look-ups in dense tables, and value-by-value ops with a dim of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like
from danling.tensors.ops.pointwise import write_out
from danling.tensors.ops.table import register


@register("comparison", "equal", "allclose", "is_same_size")
def whole(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> bool:
    """Layout first, then values; a dense tensor never equals a NestedTensor."""
    if not (isinstance(a, NestedTensor) and isinstance(b, NestedTensor)) or a._layout != b._layout:
        return False
    return func(values_of(a), values_of(b), *args, **kwargs)


@register("comparison", "isin", "bucketize", "searchsorted")
def look_up(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Values in a dense table (test elements, boundaries); a nested table is its real values."""
    x = next(a for a in (*args, *kwargs.values()) if isinstance(a, NestedTensor))
    name = func.__name__
    if name == "searchsorted":
        table = args[0] if args else kwargs["sorted_sequence"]
        if isinstance(table, NestedTensor) or table.dim() != 1:
            raise ValueError("searchsorted takes a dense 1-D sorted sequence with NestedTensor values")
    if name == "isin" and not isinstance(args[0] if args else kwargs.get("elements"), NestedTensor):
        return func(*(a.concat if isinstance(a, NestedTensor) else a for a in args), **kwargs)
    destination = kwargs.pop("out", None)
    out = func(
        *(values_of(a) if isinstance(a, NestedTensor) else a for a in args),
        **{k: values_of(a) if isinstance(a, NestedTensor) else a for k, a in kwargs.items()},
    )
    return like(x, out) if destination is None else write_out(destination, out, x._layout)


@register("activation", "prelu")
def prelu(func: Any, input: Any, weight: Tensor) -> Any:
    values = values_of(input)
    if weight.numel() == 1:
        return like(input, func(values, weight))
    from danling.tensors.ops.normalise import channels

    layout = input._layout
    d = layout.element_dim(1) if layout.rank else None
    if d is None or d in layout.ragged_dims:
        channels(input, "prelu")  # raises
    dim = layout.values_dim(d)  # type: ignore[arg-type]
    shape = [1] * values.dim()
    shape[dim] = -1
    return like(input, torch.where(values > 0, values, weight.view(shape) * values))


@register("activation", "glu")
def glu(func: Any, input: Any, dim: int = -1) -> Any:
    layout = input._layout
    d = layout.element_dim(dim)
    if d is None or d in layout.ragged_dims:
        raise ValueError(f"glu halves a static dim; dim {dim} is {'the batch' if d is None else 'ragged'}")
    out = func(values_of(input), layout.values_dim(d))
    return like(input, out, layout.with_static(tuple(out.shape[1:])))


@register("unary", "fake_quantize_per_channel_affine")
def fake_quantize_per_channel(func: Any, input: Any, scale: Any, zero: Any, axis: int, *args: Any) -> Any:
    layout = input._layout
    d = layout.element_dim(axis)
    if d is None or d in layout.ragged_dims:
        raise ValueError(f"fake_quantize_per_channel_affine needs a static axis, got {axis}")
    return like(input, func(values_of(input), scale, zero, layout.values_dim(d), *args))
