"""Convolution, pooling and resampling: elements `(C, *spatial)`, one dense call per distinct size."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import names
from danling.tensors.ops.grouped import run_grouped
from danling.tensors.ops.table import register


def _check(func: Any, x: Any, spatial: int | None, channels: int = 1) -> NestedTensor:
    """The input of a spatial op.

    Args:
        func: For messages.
        x: The input.
        spatial: How many dims follow the channels; `None` for any number.
        channels: 1 when `.shape` dim 1 holds channels, which must be static.

    Raises:
        TypeError: The input is dense; only another operand is a NestedTensor.
        ValueError: The batch is not first, the rank does not fit, or the channel dim is ragged.
    """
    if not isinstance(x, NestedTensor):
        raise TypeError(f"{names(func)}: the input is dense, so the other operands must be dense too")
    layout = x._layout
    if not layout.batch_first and layout.rank:
        raise ValueError(f"{names(func)} reads .shape as (B, C, ...), this has the batch at dim 1; use transpose(0, 1)")
    if spatial is not None and layout.rank != spatial + channels:
        wanted = "(B, C" + ", *" * spatial + ")" if channels else "(B" + ", *" * spatial + ")"
        raise ValueError(f"{names(func)} needs .shape {wanted}, got {tuple(layout.shape)}")
    if channels and 0 in layout.ragged_dims:
        raise ValueError(
            f"{names(func)}: dim 1 of {tuple(layout.shape)} holds the channels and must be static, but it is ragged; "
            "use transpose(1, 2)"
        )
    return x


def _digit(func: Any) -> int:
    """The 1, 2 or 3 in the name of a function."""
    return next(int(c) for c in func.__name__ if c.isdigit())


def _is_one(value: Any) -> bool:
    return all(v == 1 for v in value) if isinstance(value, (tuple, list)) else value == 1


def _is_zero(value: Any) -> bool:
    if isinstance(value, str):
        return True  # "valid" and "same" add nothing to a kernel of one
    return all(v == 0 for v in value) if isinstance(value, (tuple, list)) else value == 0


@register("convolution", "conv1d", "conv2d", "conv3d", path="grouped")
def convolution(
    func: Any,
    input: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolution over each element; a kernel of one is one linear map on all positions."""
    x = _check(func, input, _digit(func))
    layout = x._layout
    point = weight.numel() == weight.shape[0] * weight.shape[1] and _is_one(stride) and _is_zero(padding)
    if point and groups == 1 and layout.static_dims == (0,):
        rows = F.linear(values_of(x), weight.flatten(1), bias)
        return wrap(rows, layout.with_static((weight.shape[0],)), x._flags)
    return run_grouped(
        lambda dense: func(dense, weight, bias, stride, padding, dilation, groups), x, ragged=layout.ragged_dims, like=x
    )


@register("convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", path="grouped")
def transposed_convolution(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Transposed convolution over each element."""
    x = _check(func, input, _digit(func))
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=x._layout.ragged_dims, like=x)


_POOLS = [f"{kind}_pool{n}d" for kind in ("avg", "max", "lp") for n in (1, 2, 3)]
_POOLS += [f"max_pool{n}d_with_indices" for n in (1, 2, 3)]


@register("pooling", *_POOLS, path="grouped")
def pooling(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Pooling over windows of each element; indices are positions inside the element."""
    x = _check(func, input, _digit(func))
    ragged = x._layout.ragged_dims
    several = func.__name__.endswith("with_indices") or bool(kwargs.get("return_indices"))
    return run_grouped(
        lambda dense: func(dense, *args, **kwargs), x, ragged=[ragged, ragged] if several else ragged, like=x
    )


def _kept(x: NestedTensor, size: Any, spatial: int) -> tuple[int, ...]:
    """Ragged dims that a fixed output size leaves as they are: those given as `None`."""
    sizes = size if isinstance(size, (tuple, list)) else (size,) * spatial
    return tuple(d for d in x._layout.ragged_dims if sizes[d - x._layout.rank + len(sizes)] is None)


_ADAPTIVE = [f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)]
_ADAPTIVE += [f"adaptive_max_pool{n}d_with_indices" for n in (1, 2, 3)]


@register("pooling", *_ADAPTIVE, path="grouped")
def adaptive_pooling(func: Any, input: Any, output_size: Any, *args: Any, **kwargs: Any) -> Any:
    """Pooling to a fixed size, which makes the result dense (dims given as `None` stay ragged)."""
    x = _check(func, input, _digit(func))
    ragged = _kept(x, output_size, _digit(func))
    several = func.__name__.endswith("with_indices") or bool(kwargs.get("return_indices") or (args and args[0]))
    return run_grouped(
        lambda dense: func(dense, output_size, *args, **kwargs),
        x,
        ragged=[ragged, ragged] if several else ragged,
        like=x,
    )


_FRACTIONAL = [f"fractional_max_pool{n}d{end}" for n in (2, 3) for end in ("", "_with_indices")]


@register("pooling", *_FRACTIONAL, path="grouped")
def fractional_pooling(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Pooling over random windows; an `output_size` makes the result dense."""
    x = _check(func, input, _digit(func))
    bound = inspect.signature(getattr(F, func.__name__.replace("_with_indices", "") + "_with_indices")).bind(
        input, *args, **kwargs
    )
    size = bound.arguments.get("output_size")
    ragged = x._layout.ragged_dims if size is None else ()
    several = func.__name__.endswith("with_indices") or bool(bound.arguments.get("return_indices"))
    samples = bound.arguments.get("_random_samples")
    if samples is None:
        return run_grouped(
            lambda dense: func(dense, *args, **kwargs), x, ragged=[ragged, ragged] if several else ragged, like=x
        )
    rest = {k: v for k, v in bound.arguments.items() if k not in ("input", "_random_samples")}
    return run_grouped(
        lambda dense, drawn: func(dense, **rest, _random_samples=drawn),
        x,
        samples,
        ragged=[ragged, ragged] if several else ragged,
        like=x,
    )


@register("pooling", "max_unpool1d", "max_unpool2d", "max_unpool3d", path="grouped")
def unpooling(
    func: Any, input: Any, indices: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Any:
    """The inverse of max pooling with indices."""
    x = _check(func, input, _digit(func))
    if not isinstance(indices, NestedTensor) or indices._layout != x._layout:
        raise ValueError(f"{names(func)}: indices must be a NestedTensor of the input's structure")
    return run_grouped(
        lambda dense, where: func(dense, where, kernel_size, stride, padding, output_size),
        x,
        indices,
        ragged=x._layout.ragged_dims if output_size is None else (),
        like=x,
    )


@register("resampling", "fold", path="grouped")
def fold(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Blocks `(C * k, L)` to images of one fixed size, dense."""
    x = _check(func, input, 1)
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=(), like=x)


@register("resampling", "F.unfold", "im2col", path="grouped")
def unfold(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Images `(C, H, W)` to blocks `(C * k, L)`."""
    x = _check(func, input, 2)
    ragged = (1,) if x._layout.ragged_dims else ()
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=ragged, like=x)


@register("resampling", "interpolate", path="grouped")
def interpolate(func: Any, input: Any, size: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Resampling of each element; a fixed `size` makes the result dense."""
    x = _check(func, input, None)
    ragged = x._layout.ragged_dims if size is None else ()
    return run_grouped(lambda dense: func(dense, size, *args, **kwargs), x, ragged=ragged, like=x)


@register("resampling", "F.grid_sample", path="grouped")
def grid_sample(func: Any, input: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
    """Values of `(C, *spatial)` at the points of a grid `(*out, n)`; the result has the grid's sizes."""
    like = input if isinstance(input, NestedTensor) else grid
    for operand, channels in ((input, 1), (grid, 0)):
        if isinstance(operand, NestedTensor):
            _check(func, operand, None, channels)
    ragged: tuple[int, ...] = ()
    if isinstance(grid, NestedTensor):
        if grid._layout.rank - 1 in grid._layout.ragged_dims:
            raise ValueError(f"{names(func)}: the last dim of the grid holds coordinates and must be static")
        ragged = tuple(d + 1 for d in grid._layout.ragged_dims)
    return run_grouped(
        lambda dense, points: func(dense, points, *args, **kwargs), input, grid, ragged=ragged, like=like
    )


@register("resampling", "affine_grid", path="grouped")
def affine_grid(func: Any, theta: Any, size: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Grids of one fixed size from a NestedTensor of matrices, dense."""
    if theta._layout.ragged_dims:
        raise ValueError(f"{names(func)}: matrices have fixed sizes, got ragged dims {theta._layout.ragged_dims}")
    return func(theta.tensor, size, *args, **kwargs)


@register("resampling", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", path="grouped")
def shuffle(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Rearranging channels and positions of each element."""
    x = _check(func, input, None)
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=x._layout.ragged_dims, like=x)


@register("resampling", "local_response_norm", path="grouped")
def local_response_norm(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Normalisation over neighbouring channels."""
    x = _check(func, input, None)
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=x._layout.ragged_dims, like=x)
