"""What a NestedTensor looks like when it is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._tensor_str import PRINT_OPTS, printoptions

from danling.tensors.layout import is_traced
from danling.tensors.packing import slice_element

if TYPE_CHECKING:
    from danling.tensors.nested_tensor import NestedTensor

MOST = 10
"""Batches with more elements show the first `FEW`."""
FEW = 5


def describe(x: NestedTensor) -> str:
    """Elements, dtype, device, place in the graph and structure.

    A batch with more values than torch prints of one tensor shows each element in short.

    Example:
        >>> from danling.tensors import NestedTensor
        >>> NestedTensor([1, 2, 3], [4])
        NestedTensor([
          tensor([1, 2, 3]),
          tensor([4])
        ], dtype=torch.int64, device='cpu', ragged_dims=(0,))
    """
    layout = x.structure
    about = [f"dtype={x.dtype}", f"device='{x.device}'"]
    if is_traced(x._values):
        return f"NestedTensor(..., shape={tuple(x.shape)}, {about[0]}, ragged_dims={layout.ragged_dims})"
    if x.requires_grad:
        grad_fn = x.grad_fn
        about.append("requires_grad=True" if grad_fn is None else f"grad_fn=<{type(grad_fn).__name__}>")
    about.append(f"ragged_dims={layout.ragged_dims}")
    if not layout.batch_first:
        about.append("batch_first=False")
    count = layout.batch_size
    if count == 0:
        about.insert(0, f"shape={tuple(layout.shape)}")
    parts = _elements(x, count if count <= MOST else FEW)
    if count > len(parts):
        parts.append(f"  ... {count} elements")
    body = "\n" + ",\n".join(parts) + "\n" if parts else ""
    head = "Parameter containing:\n" if isinstance(x, torch.nn.Parameter) else ""
    return f"{head}NestedTensor([{body}], {', '.join(about)})"


def _elements(x: NestedTensor, count: int) -> list[str]:
    values = x._values.detach()
    shown: list[Tensor] = [slice_element(values, x.structure, i) for i in range(count)]
    whole = sum(t.numel() for t in shown) <= PRINT_OPTS.threshold
    with printoptions(threshold=PRINT_OPTS.threshold if whole else int(PRINT_OPTS.threshold / count)):
        return ["\n".join("  " + line if line else line for line in repr(t).splitlines()) for t in shown]
