"""Ragged batches kept packed: `NestedTensor` and what goes with it.

Example:
    >>> import torch
    >>> from danling.tensors import NestedTensor
    >>> x = NestedTensor(torch.ones(2, 3), torch.ones(4, 3))
    >>> torch.nn.functional.linear(x, torch.ones(5, 3)).shape
    torch.Size([2, 4, 5])
"""

from danling.tensors import kernels
from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor
from danling.tensors.ops import load as _load
from danling.tensors.ops.table import (
    NestedTensorFallbackError,
    NestedTensorFallbackWarning,
    strict,
    supported_ops,
)

__all__ = [
    "Layout",
    "NestedTensor",
    "NestedTensorFallbackError",
    "NestedTensorFallbackWarning",
    "kernels",
    "strict",
    "supported_ops",
]
