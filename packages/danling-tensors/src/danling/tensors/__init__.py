"""Ragged batches kept packed: `NestedTensor` and what goes with it.

Example:
    >>> import torch
    >>> from danling.tensors import NestedTensor
    >>> x = NestedTensor(torch.ones(2, 3), torch.ones(4, 3))
    >>> torch.nn.functional.linear(x, torch.ones(5, 3)).shape
    torch.Size([2, 4, 5])
"""

from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules

from torch.serialization import add_safe_globals as _add_safe_globals

from danling.tensors import kernels
from danling.tensors import ops as _ops
from danling.tensors.collation import Collator, collate, register_collate, unregister_collate
from danling.tensors.collation import enter_default as _enter_default
from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor
from danling.tensors.ops.flex import create_block_mask, flex_attention
from danling.tensors.ops.table import (
    NestedTensorFallbackError,
    NestedTensorFallbackWarning,
    strict,
    supported_ops,
)
from danling.tensors.pn_tensor import PNTensor, tensor
from danling.tensors.pn_tensor import mark as _mark
from danling.tensors.serialization import rebuild as _rebuild

for _module in _iter_modules(_ops.__path__):  # every rule file enters its rules in the op table
    _import_module(f"danling.tensors.ops.{_module.name}")
_add_safe_globals([_rebuild, _mark])
_enter_default()

__all__ = [
    "Collator",
    "Layout",
    "NestedTensor",
    "NestedTensorFallbackError",
    "NestedTensorFallbackWarning",
    "PNTensor",
    "collate",
    "create_block_mask",
    "flex_attention",
    "kernels",
    "register_collate",
    "strict",
    "supported_ops",
    "tensor",
    "unregister_collate",
]
