"""What every rule file needs: reading values, wrapping results, talking about dims."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap

__all__ = [
    "NestedTensor",
    "at_element",
    "batch_error",
    "elements_of",
    "first_nested",
    "like",
    "names",
    "values_of",
    "wrap",
]


def like(x: NestedTensor, values: Tensor, layout: Layout | None = None) -> NestedTensor:
    """Wrap `values` with the settings of `x`, and its layout unless another one is given."""
    return wrap(values, x._layout if layout is None else layout, x._flags)


def first_nested(*operands: Any) -> NestedTensor:
    """The first NestedTensor among operands; results take `padding_value` and `mask_value` from it."""
    for x in operands:
        if isinstance(x, NestedTensor):
            return x
    raise TypeError("no operand is a NestedTensor")


def elements_of(x: Tensor) -> tuple[Tensor, ...]:
    """Elements of a NestedTensor; of a dense tensor, its slices along dim 0."""
    return x.unbind() if isinstance(x, NestedTensor) else x.unbind(0)


def names(func: Any) -> str:
    """The plain name of a torch function, for messages."""
    return getattr(func, "__name__", str(func)).split(".")[0]


def batch_error(func: Any, dim: Any) -> ValueError:
    """The error for a call that would need padded positions along the batch dim."""
    return ValueError(
        f"{names(func)} along the batch dim {dim} would mix elements of different sizes and read padding; "
        "use .tensor for the padded computation"
    )


@contextmanager
def at_element(i: int) -> Iterator[None]:
    """Name element `i` in whatever torch raises inside, keeping the exception's type."""
    try:
        yield
    except Exception as error:
        raise named_error(i, error) from error


def row_error(error: Exception, layout: Layout, wrong: Tensor) -> Exception:
    """`error` again, with the element of the first row that `wrong`, a bool tensor `(R, ...)`, marks in its message."""
    rows = wrong.reshape(wrong.shape[0], -1).any(1).nonzero()
    if not len(rows) or len(wrong) != layout.rows:
        return error
    return named_error(int(layout.segments.on("element", wrong.device)[rows[0, 0]]), error)


def outside(index: Tensor, size: int) -> Tensor:
    """Which indices are not in `[0, size)`."""
    return (index < 0) | (index >= size)


def named_error(i: int, error: Exception) -> Exception:
    """`error` again, with the element in its message."""
    try:
        return type(error)(f"element {i}: {error}")
    except Exception:  # an exception type that wants other arguments
        return RuntimeError(f"element {i}: {error!r}")


def same_batch(func: Any, *xs: NestedTensor) -> None:
    """Check that all operands have one batch size and batch order.

    Raises:
        ValueError: They differ.
    """
    first = xs[0]._layout
    for x in xs[1:]:
        if x._layout.batch_size != first.batch_size:
            raise ValueError(
                f"{names(func)} got NestedTensors of batch size {first.batch_size} and {x._layout.batch_size}"
            )
        if x._layout.batch_first != first.batch_first and first.rank and x._layout.rank:
            raise ValueError(
                f"{names(func)} got batch_first=True and batch_first=False; use transpose(0, 1) on one of them"
            )


def tensor_of(data: Any) -> Tensor:
    """`data` as a tensor: a tensor itself, numbers and arrays on the CPU whatever torch's default device is."""
    return data if isinstance(data, Tensor) else torch.as_tensor(data, device="cpu")


def stack_of(values: list[Tensor]) -> Tensor:
    """`torch.stack`, also of nothing."""
    return torch.stack(values) if values else torch.empty(0, device="cpu")
