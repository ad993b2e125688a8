"""Softmax and friends, on static dims and per segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import batch_error, like, names
from danling.tensors.ops.groups import group_rows
from danling.tensors.ops.table import register


def softmax_over(func: Any, x: Any, dim: int, log: bool, dtype: torch.dtype | None = None) -> Any:
    """Softmax (`log`: its logarithm) of every element along one of its dims."""
    layout = x._layout
    d = layout.element_dim(dim)
    if d is None:
        raise batch_error(func, dim)
    values = values_of(x)
    if dtype is not None:
        values = values.to(dtype)
    if d not in layout.ragged_dims:
        run = torch.log_softmax if log else torch.softmax
        return like(x, run(values, layout.values_dim(d)))
    if not values.is_floating_point():
        (torch.log_softmax if log else torch.softmax)(values[:0], 0)  # raises as torch does
    groups = group_rows(layout, False, (layout.ragged_dims.index(d),))
    out = kernels.segment_softmax(groups.sort(values), groups.on("offsets", values.device), log)
    return like(x, groups.unsort(out))


@register("normaliser", "softmax", "log_softmax", "special_softmax", "special_log_softmax")
def softmax(func: Any, input: Any, dim: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    if args and isinstance(args[-1], torch.dtype):
        dtype = args[-1]
    if dim is None:
        raise ValueError(f"{names(func)} of a NestedTensor needs dim")
    return softmax_over(func, input, dim, "log" in names(func), dtype)


@register("normaliser", "softmin")
def softmin(func: Any, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None:
        raise ValueError("softmin of a NestedTensor needs dim")
    return softmax_over(func, -input, dim, False, dtype)


@register("normaliser", "gumbel_softmax")
def gumbel_softmax(
    func: Any, logits: NestedTensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Any:
    noise = -torch.empty_like(values_of(logits)).exponential_().log()
    soft = softmax_over(func, like(logits, (values_of(logits) + noise) / tau), dim, False)
    if not hard:
        return soft
    top = torch.amax(soft, dim, True)
    best = (soft == top).to(soft.dtype)
    return best - soft.detach() + soft


@register("normaliser", "normalize")
def normalize(func: Any, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    size = torch.linalg.vector_norm(input, p, dim, True)
    return input / size.clamp_min(eps)


def trailing_static(x: NestedTensor, normalized_shape: Any, name: str) -> None:
    """Check that the trailing dims to normalise are static.

    Raises:
        ValueError: One of them is ragged.
    """
    layout = x._layout
    count = len(normalized_shape)
    if count > layout.rank or any(d >= layout.rank - count for d in layout.ragged_dims):
        raise ValueError(
            f"{name} normalises the last {count} dims, which must be static (ragged_dims={layout.ragged_dims})"
        )


@register("norm layers", "layer_norm", "native_layer_norm")
def layer_norm(func: Any, input: Any, normalized_shape: Any, *args: Any, **kwargs: Any) -> Any:
    layout = input._layout
    if len(normalized_shape) > 1 or not layout.last_static:
        trailing_static(input, normalized_shape, "layer_norm")
    values = values_of(input)
    if func is _f_layer_norm:  # straight to what it calls
        return wrap(torch.layer_norm(values, normalized_shape, *_layer_norm(*args, **kwargs)), layout, input._flags)
    out = func(values, normalized_shape, *args, **kwargs)
    if isinstance(out, tuple):
        return like(input, out[0]), *(like(input, o, layout.with_static(tuple(o.shape[1:]))) for o in out[1:])
    return like(input, out)


_f_layer_norm = torch.nn.functional.layer_norm


def _layer_norm(weight: Any = None, bias: Any = None, eps: float = 1e-5) -> tuple[Any, Any, float]:
    return weight, bias, eps


@register("norm layers", "rms_norm")
def rms_norm(func: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    trailing_static(input, normalized_shape, "rms_norm")
    return like(input, func(values_of(input), normalized_shape, weight, eps))


def channels(x: NestedTensor, name: str) -> int:
    """The dim of values that holds `.shape` dim 1, the channels.

    Raises:
        ValueError: That dim is ragged.
    """
    layout = x._layout
    d = layout.element_dim(1) if layout.rank else None
    if d is None or d in layout.ragged_dims:
        raise ValueError(
            f"{name} takes channels at dim 1, which is {'the batch' if d is None else 'ragged'} here; "
            "use transpose(1, 2) to put a static dim there"
        )
    return layout.values_dim(d)


def _affine(out: Tensor, weight: Any, bias: Any, dim: int) -> Tensor:
    shape = [1] * out.dim()
    shape[dim] = -1
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


@register("norm layers", "batch_norm")
def batch_norm(
    func: Any,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *extra: Any,
) -> Any:
    if func is not torch.nn.functional.batch_norm:  # torch.batch_norm takes weight and bias first
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    dim = channels(input, "batch_norm")
    values = values_of(input).movedim(dim, -1)
    rows = values.reshape(-1, values.shape[-1])
    if training and rows.shape[0] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    out = torch.nn.functional.batch_norm(rows, running_mean, running_var, weight, bias, training, momentum, eps)
    return like(input, out.reshape(values.shape).movedim(-1, dim))


@register("norm layers", "group_norm", "instance_norm")
def group_norm(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    dim = channels(input, name)
    layout = input._layout
    if name == "instance_norm":
        return _instance_norm(input, dim, *args, **kwargs)
    return _group_norm(input, dim, layout.static_sizes[dim - 1], *args, **kwargs)


def _group_norm(
    x: NestedTensor,
    dim: int,
    count: int,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> NestedTensor:
    if count % num_groups:
        raise RuntimeError(f"Expected number of channels {count} to be divisible by num_groups {num_groups}")
    values = values_of(x)
    return like(x, _affine(_standardise(x, values, dim, num_groups, eps)[0], weight, bias, dim))


def _standardise(x: NestedTensor, values: Tensor, dim: int, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values with mean 0 and variance 1 over each element and group of channels, and `(B, groups)` statistics."""
    layout = x._layout
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    split = wide.unflatten(dim, (groups, -1)).movedim(dim, 1).flatten(2)  # (R, groups, values of a row)
    per_row = split.shape[2]
    if layout.dense:
        mean, square = split.mean(2), split.var(2, correction=0)
        out = (split - mean[..., None]) * torch.rsqrt(square + eps)[..., None]
    else:
        segments = layout.segments
        offsets = segments.on("offsets", values.device)
        number = (segments.on("lengths", values.device) * per_row).to(wide.dtype)[:, None]
        mean = kernels.segment_sum(split.sum(2), offsets) / number
        off = split - kernels.segment_expand(mean, offsets, segments.rows)[..., None]
        square = kernels.segment_sum((off * off).sum(2), offsets) / number
        scale = torch.rsqrt(square + eps)
        out = off * kernels.segment_expand(scale, offsets, segments.rows)[..., None]
    moved = wide.unflatten(dim, (groups, -1)).movedim(dim, 1).shape
    return out.reshape(moved).movedim(1, dim).flatten(dim, dim + 1).to(values.dtype), mean, square


def _instance_norm(
    x: NestedTensor,
    dim: int,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *extra: Any,
    **kwargs: Any,
) -> NestedTensor:
    values, layout = values_of(x), x._layout
    count = layout.static_sizes[dim - 1]
    if not use_input_stats:
        shape = [1] * values.dim()
        shape[dim] = -1
        out = (values - running_mean.view(shape)) * torch.rsqrt(running_var.view(shape) + eps)
        return like(x, _affine(out, weight, bias, dim))
    out, mean, square = _standardise(x, values, dim, count, eps)
    if running_mean is not None and layout.batch_size:
        per_row = values[:1].numel() // max(count, 1)
        number = (layout.segments.on("lengths", values.device) * per_row).to(square.dtype)[:, None]
        with torch.no_grad():
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            unbiased = square * number / (number - 1)
            running_var.lerp_(unbiased.mean(0).to(running_var.dtype), momentum)
    return like(x, _affine(out, weight, bias, dim))
