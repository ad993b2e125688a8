"""Fourier transforms, short-time ones, and finite differences of whole elements."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from danling.tensors.nested_tensor import NestedTensor
from danling.tensors.ops.base import batch_error, names
from danling.tensors.ops.grouped import run_grouped
from danling.tensors.ops.table import register

_ONE = ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"]
_SEVERAL = [f"{name}{end}" for name in _ONE for end in ("2", "n")]


def _element_dim(func: Any, x: NestedTensor, dim: int) -> int:
    d = x._layout.element_dim(dim)
    if d is None:
        raise batch_error(func, dim)
    return d


@register("fourier", *(f"fft_{name}" for name in _ONE), path="grouped")
def transform(func: Any, input: NestedTensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    """Along one dim, each element over its own length; `n=` fixes the size and so makes a ragged dim dense."""
    x, d = input, _element_dim(func, input, dim)
    ragged = tuple(r for r in x._layout.ragged_dims if r != d or n is None)
    return run_grouped(lambda dense: func(dense, n, d + 1, norm), x, ragged=ragged, like=x)


@register("fourier", *(f"fft_{name}" for name in _SEVERAL), path="grouped")
def transforms(func: Any, input: NestedTensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
    """Along several dims; sizes in `s` other than -1 fix theirs."""
    x = input
    if dim is None:
        if func.__name__.endswith("2"):
            dim = (-2, -1)
        elif s is not None:
            dim = tuple(range(-len(s), 0))
        else:
            raise batch_error(func, 0)
    dims = [_element_dim(func, x, i) for i in ((dim,) if isinstance(dim, int) else dim)]
    sizes = [-1] * len(dims) if s is None else list(s)
    fixed = {d for d, size in zip(dims, sizes) if size != -1}
    ragged = tuple(r for r in x._layout.ragged_dims if r not in fixed)
    return run_grouped(
        lambda dense: func(dense, None if s is None else sizes, [d + 1 for d in dims], norm), x, ragged=ragged, like=x
    )


@register("fourier", "fft_fftshift", "fft_ifftshift", path="grouped")
def shift(func: Any, input: NestedTensor, dim: Any = None) -> Any:
    """Zero frequency to the middle of each element, or back."""
    x = input
    if dim is None:
        raise batch_error(func, 0)
    dims = [_element_dim(func, x, i) + 1 for i in ((dim,) if isinstance(dim, int) else dim)]
    return run_grouped(lambda dense: func(dense, dims), x, ragged=x._layout.ragged_dims, like=x)


@register("fourier", "stft", path="grouped")
def stft(func: Any, input: NestedTensor, *args: Any, **kwargs: Any) -> Any:
    """Signals `(L,)` to spectrograms `(N, T)`, T ragged."""
    x = input
    if x._layout.rank != 1:
        raise ValueError(f"{names(func)} needs elements (L,), got .shape {tuple(x.shape)}")
    ragged = tuple(d + 1 for d in x._layout.ragged_dims)
    parts = inspect.signature(torch.stft).bind(input, *args, **kwargs).arguments
    if parts.get("return_complex") is False:
        raise ValueError(
            "stft: return_complex=False is deprecated by torch; use return_complex=True and torch.view_as_real"
        )
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=ragged, like=x)


@register("fourier", "istft", path="grouped")
def istft(func: Any, input: NestedTensor, *args: Any, **kwargs: Any) -> Any:
    """Spectrograms `(N, T)` to signals `(L,)`; `length=` makes the result dense."""
    x = input
    if x._layout.rank != 2 or 0 in x._layout.ragged_dims:
        raise ValueError(f"{names(func)} needs elements (N, T) with N static, got .shape {tuple(x.shape)}")
    fixed = kwargs.get("length") is not None or len(args) > 7 and args[7] is not None
    ragged = () if fixed or not x._layout.ragged_dims else (0,)
    return run_grouped(lambda dense: func(dense, *args, **kwargs), x, ragged=ragged, like=x)


@register("fourier", "gradient", path="grouped")
def gradient(func: Any, input: NestedTensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1) -> Any:
    """Finite differences along element dims."""
    x = input
    if dim is None:
        raise batch_error(func, 0)
    dims = [_element_dim(func, x, i) + 1 for i in ((dim,) if isinstance(dim, int) else dim)]
    out = run_grouped(
        lambda dense: tuple(func(dense, spacing=spacing, dim=dims, edge_order=edge_order)),
        x,
        ragged=[x._layout.ragged_dims] * len(dims),
        like=x,
    )
    return list(out)
