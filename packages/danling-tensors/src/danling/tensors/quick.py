"""The common ways into a NestedTensor at the least cost.

Each serves plain CPU tensors and default settings, and gives `None` where it does not apply or something is wrong: the
general way in `danling.tensors.construct` takes over then, and says what.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import NestedTensor, wrap

# C functions, because thousands of elements are asked
_rank_of: Any = torch._C.TensorBase.dim
_rows_of: Any = torch._C.TensorBase.__len__  # type: ignore[attr-defined]
_len_modes: Any = torch._C._len_torch_dispatch_stack

_DEFAULTS = (0.0, False)  # padding_value, mask_value


def from_list(elements: list[Any]) -> NestedTensor | None:
    """Tensors that differ in dim 0 at most, at the cost of one `torch.cat`.

    `cat` compares the other sizes and devices and promotes dtypes itself.
    """
    if not elements or type(elements[0]) is not Tensor or not elements[0].is_cpu:
        return None
    try:
        lengths = list(map(_rows_of, elements))
        if not all(lengths) and len(set(map(_rank_of, elements))) != 1:  # cat overlooks shape (0,) among others
            return None
        values = torch.cat(elements)
    except (RuntimeError, TypeError):  # a refusal, or an element that is a scalar
        return None
    if type(values) is not Tensor or values.layout is not torch.strided:  # there was another subclass among them
        return None
    return wrap(values, Layout(Segments(None, lengths), (0,), tuple(values.shape[1:])), _DEFAULTS)


def from_padded(padded: Any, lengths: Any) -> NestedTensor | None:
    """Padded data and their lengths, in one call of a kernel."""
    if type(padded) is not Tensor or type(lengths) is not Tensor or not padded.is_cpu or not lengths.is_cpu:
        return None
    if torch.is_inference_mode_enabled() or _len_modes():  # the offsets are kept for every later use of the lengths
        return None
    try:
        values, offsets, longest = kernels.unpad_lengths(padded, lengths)
    except RuntimeError:
        return None
    shape = values.shape
    return wrap(values, Layout(Segments.of_offsets(offsets, shape[0], longest), (0,), tuple(shape[1:])), _DEFAULTS)
