"""Embeddings of ragged index batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like, outside, row_error
from danling.tensors.ops.table import register


@register("embedding", "F.embedding")
def embedding(func: Any, input: NestedTensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, NestedTensor):
        raise TypeError("embedding: weight is a table of rows, a dense tensor")
    layout = input._layout
    values = values_of(input)
    try:
        out = func(values, weight, *args, **kwargs)
    except IndexError as error:
        raise row_error(error, layout, outside(values, weight.shape[0])) from error
    return like(input, out, layout.with_static((*layout.static_sizes, weight.shape[1])))


@register("embedding", "embedding")
def embedding_of(func: Any, weight: Tensor, indices: NestedTensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, NestedTensor):
        raise TypeError("embedding: weight is a table of rows, a dense tensor")
    out = func(weight, values_of(indices), *args, **kwargs)
    layout = indices._layout
    return like(indices, out, layout.with_static((*layout.static_sizes, weight.shape[1])))


@register("embedding", "F.embedding_bag")
def embedding_bag(
    func: Any,
    input: Any,
    weight: Tensor,
    offsets: Any = None,
    *args: Any,
    per_sample_weights: Any = None,
    **kwargs: Any,
) -> Any:
    if not isinstance(input, NestedTensor) or input._layout.rank != 1:
        raise ValueError("embedding_bag takes a NestedTensor of 1-D elements: each element is a bag")
    if offsets is not None:
        raise ValueError("embedding_bag of a NestedTensor takes no offsets: each element is a bag")
    layout = input._layout
    if isinstance(per_sample_weights, NestedTensor):
        if per_sample_weights._layout != layout:
            raise ValueError("per_sample_weights must have the structure of the input")
        per_sample_weights = values_of(per_sample_weights)
    values = values_of(input)
    if layout.dense:
        return func(values, weight, None, *args, per_sample_weights=per_sample_weights, **kwargs)
    starts = layout.segments.on("offsets", values.device)[:-1]
    return func(values, weight, starts, *args, per_sample_weights=per_sample_weights, **kwargs)


@register("embedding", "one_hot")
def one_hot(func: Any, input: NestedTensor, num_classes: int = -1) -> Any:
    values = values_of(input)
    if num_classes == -1 and values.numel() == 0:
        raise RuntimeError("Can not infer total number of classes from empty tensor.")
    out = func(values, num_classes)
    layout = input._layout
    return like(input, out, layout.with_static((*layout.static_sizes, out.shape[-1])))
