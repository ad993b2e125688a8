"""Number formats of what goes into a model and of what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SHORT = (torch.bfloat16, torch.float16)


def to_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors in nested mappings, lists and tuples.

    Examples:
        >>> cast = to_dtype({"x": torch.ones(1), "index": torch.tensor(3)}, torch.bfloat16)
        >>> cast["x"].dtype, cast["index"].dtype
        (torch.bfloat16, torch.int64)
    """
    return _map(tree, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_float32(tree: Any) -> Any:
    """Cast 16-bit floating tensors to float32; containers that are no plain mapping, list or tuple stay as they are.

    Examples:
        >>> to_float32((torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)))[0].dtype
        torch.float32
    """
    return _map(tree, lambda tensor: tensor.float() if tensor.dtype in SHORT else tensor)


def _map(tree: Any, change: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        changed = {key: _map(value, change) for key, value in tree.items()}
        try:
            return changed if type(tree) is dict else type(tree)(**changed)  # outputs of models are such mappings
        except TypeError:
            return changed
    if isinstance(tree, list | tuple):
        values = [_map(value, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if all(hasattr(tree, name) for name in ("is_floating_point", "dtype", "to")):  # ragged tensors
        return change(tree)
    return tree
