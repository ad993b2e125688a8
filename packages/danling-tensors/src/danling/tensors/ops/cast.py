"""Casts and copies: on the values, structure kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like, names
from danling.tensors.ops.table import register


def _check_format(func: Any, kwargs: Any) -> None:
    wanted = kwargs.get("memory_format")
    if wanted not in (None, torch.contiguous_format, torch.preserve_format):
        raise ValueError(f"{names(func)}: memory_format {wanted} has no meaning for a NestedTensor")


@register(
    "cast",
    *"""to type_as float double half bfloat16 bool byte char short int long cfloat cdouble chalf cpu cuda xpu clone
    contiguous dequantize pin_memory""".split(),
)
def cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, NestedTensor):  # dense.to(nested): dtype and device of the values
        return func(x, *(values_of(a) if isinstance(a, NestedTensor) else a for a in args), **kwargs)
    _check_format(func, kwargs)
    args = tuple(values_of(a) if isinstance(a, NestedTensor) else a for a in args)
    kwargs = {k: values_of(a) if isinstance(a, NestedTensor) else a for k, a in kwargs.items()}
    values = values_of(x)
    out = func(values, *args, **kwargs)
    return x if out is values else like(x, out)


@register("cast", "type")
def type_(func: Any, x: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return values_of(x).type()
    return cast(func, x, dtype, *args, **kwargs)


@register("cast", "detach")
def detach(func: Any, x: Any) -> Any:
    return x.detach_() if names(func) == "detach_" else x.detach()


@register("cast", "share_memory_")
def share_memory(func: Any, x: Any) -> Any:
    func(x._values)
    for tensor in (x._layout.offsets, x._layout.segments.sizes):
        func(tensor)
    return x


@register(
    "cast",
    *"""is_pinned is_shared is_floating_point is_complex is_signed is_inference is_conj is_neg element_size get_device
    is_distributed result_type record_stream
    _is_all_true _is_any_true""".split(),
)
def ask(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Questions that the values answer."""
    named = {name: a._values if isinstance(a, NestedTensor) else a for name, a in kwargs.items()}
    return func(*(a._values if isinstance(a, NestedTensor) else a for a in args), **named)


@register("cast", "numel")
def numel(func: Any, input: Any) -> int:
    return input.numel()


@register("cast", "is_nonzero", path="refused")
def is_nonzero(func: Any, input: Any) -> bool:
    return bool(input)  # raises


@register("cast", "dim_order")
def dim_order(func: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    return tuple(range(x.dim()))


@register("cast", "module_load")
def module_load(func: Any, x: Any, other: Any, assign: bool = False) -> Any:
    return other.detach() if assign else x.copy_(other).detach()


@register(
    "storage",
    *"""as_strided as_strided_ as_strided_copy as_strided_scatter as_strided_scatter_ set_ resize resize_ resize_as
    resize_as_ is_set_to const_data_ptr
    storage_type""".split(),
    path="refused",
)
def refuse_storage(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"{names(func)}: a NestedTensor has no dense storage; use .concat (packed values) or .tensor (padded copy)"
    )


@register(
    "storage",
    *"""quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic int_repr q_scale q_zero_point
    q_per_channel_axis q_per_channel_scales q_per_channel_zero_points qscheme coalesce is_coalesced indices values
    crow_indices col_indices ccol_indices row_indices sparse_dim dense_dim sparse_resize_and_clear_ resize_as_sparse_
    smm spmm hspmm sspaddmm saddmm hsmm dsmm""".split(),
    path="refused",
)
def refuse_kind(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        f"{names(func)}: sparse and quantised values are not supported in a NestedTensor; convert .concat instead"
    )


@register("cast", "view_as_real")
def view_as_real(func: Any, x: Any) -> Any:
    layout = x._layout
    return like(x, func(values_of(x)), layout.with_static((*layout.static_sizes, 2)))


@register("cast", "view_as_complex")
def view_as_complex(func: Any, x: Any) -> Any:
    layout = x._layout
    if layout.rank == 0 or layout.rank - 1 in layout.ragged_dims:
        raise ValueError("view_as_complex needs a static last dim of size 2")
    return like(x, func(values_of(x).contiguous()), layout.with_static(layout.static_sizes[:-1]))


@register("factory", *"zeros_like ones_like full_like empty_like rand_like randn_like randint_like".split())
def same_structure(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    _check_format(func, kwargs)
    kwargs.pop("memory_format", None)
    return like(x, func(x._values, *args, **kwargs))


@register("factory", *"new_zeros new_ones new_full new_empty new_tensor new_empty_strided".split())
def dense_new(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    return func(x._values, *args, **kwargs)


@register("factory", "multinomial")
def multinomial(func: Any, x: Any, num_samples: int, replacement: bool = False, *, generator: Any = None) -> Any:
    layout = x._layout
    if layout.rank > 2:
        raise RuntimeError("multinomial takes elements of 1 or 2 dims")
    values = x._values
    settings = {} if generator is None else {"generator": generator}
    if layout.rank - 1 not in layout.ragged_dims:
        out = func(values, num_samples, replacement, **settings)
        return like(x, out, layout.with_static((*layout.static_sizes[:-1], num_samples)))
    # Exponential races: the num_samples largest of log p + Gumbel noise, drawn anew for each draw with replacement.
    draws = num_samples if replacement else 1
    logits = values.log()
    picks = []
    for _ in range(draws):
        noise = -torch.empty_like(values).exponential_(generator=generator).log()
        scored = like(x, logits + noise)
        picks.append(torch.topk(scored, 1 if replacement else num_samples, -1)[1])
    return torch.cat(picks, -1) if len(picks) > 1 else picks[0]
