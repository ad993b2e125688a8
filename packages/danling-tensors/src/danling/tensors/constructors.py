"""Class methods that build a NestedTensor from packed, padded and masked data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        from danling.tensors.tracing import InGraph

        return InGraph(name, *args, **kwargs)
    from danling.tensors import construct

    return getattr(construct, name)(*args, **kwargs)


def _quick_padded(padded: Any, lengths: Any) -> Any:
    """`danling.tensors.quick.from_padded`, which takes this name on first use: it needs this module first."""
    global _quick_padded
    from danling.tensors.quick import from_padded as _quick_padded

    return _quick_padded(padded, lengths)


class Constructors:
    """Ways into a NestedTensor besides its constructor; keywords of the constructor are welcome in each."""

    __slots__ = ()

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Any, **ctor: Any) -> Any:
        """Wrap packed values without a copy.

        Args:
            values: `(sum(lengths), *static)`; shared with the result.
            lengths: A list or int tensor `(B,)`, or `(B, k)` sizes for `k` ragged dims.
            **ctor: Keywords of the constructor; `ragged_dims` defaults to the first `k` element dims.

        Raises:
            ValueError: A negative length, or lengths that do not add up to the rows of `values`.

        Example:
            >>> import torch
            >>> from danling.tensors import NestedTensor
            >>> NestedTensor.from_lengths(torch.arange(5), [2, 3]).tensor
            tensor([[0, 1, 0],
                    [2, 3, 4]])
        """
        return _call("from_lengths", values, lengths, **ctor)

    @classmethod
    def from_offsets(cls, values: Tensor, offsets: Any, **ctor: Any) -> Any:
        """Wrap packed values with the first row of each element.

        Args:
            values: `(R, *static)`; shared with the result.
            offsets: `(B+1,)` ints, from 0 to `R`, non-decreasing.
            **ctor: Keywords of the constructor.

        Raises:
            ValueError: Offsets that do not start at 0, decrease, or do not end at `R`.

        Example:
            >>> import torch
            >>> from danling.tensors import NestedTensor
            >>> NestedTensor.from_offsets(torch.arange(5), [0, 2, 5]).tolist()
            [[0, 1], [2, 3, 4]]
        """
        return _call("from_offsets", values, offsets, **ctor)

    @classmethod
    def from_padded(cls, padded: Tensor, lengths: Any, **ctor: Any) -> Any:
        """The real values of a padded tensor, in one pass; padding is not read.

        Args:
            padded: `(B, *padded element)`, or with `batch_first=False` the batch at dim 1.
            lengths: `(B,)` sizes of the ragged dim, or `(B, k)` of `k` ragged dims.
            **ctor: Keywords of the constructor.

        Raises:
            ValueError: A length above the padded extent, or another batch size.

        Example:
            >>> import torch
            >>> from danling.tensors import NestedTensor
            >>> NestedTensor.from_padded(torch.tensor([[1, 2], [3, 9]]), [2, 1]).tolist()
            [[1, 2], [3]]
        """
        if not ctor and not torch.compiler.is_compiling():
            found = _quick_padded(padded, lengths)
            if found is not None:
                return found
        return _call("from_padded", padded, lengths, **ctor)

    @classmethod
    def from_tensor_mask(cls, tensor: Tensor, mask: Tensor, *, batched: bool = False, **ctor: Any) -> Any:
        """The real values of a padded tensor as a mask marks them.

        Args:
            tensor: Padded `(B, ...)`.
            mask: Bool or 0/1 integers that follow `mask_value` (by default True is data). With N dims each element's
                valid region is a box that starts at index 0. A 1-D mask selects positions: of one element, or with
                `batched=True` of whole rows.
            batched: See `mask`.
            **ctor: Keywords of the constructor.

        Raises:
            ValueError: A region with a gap, or a mask that does not fit.

        Example:
            >>> import torch
            >>> from danling.tensors import NestedTensor
            >>> x = torch.tensor([[1, 2], [3, 9]])
            >>> NestedTensor.from_tensor_mask(x, torch.tensor([[True, True], [True, False]])).tolist()
            [[1, 2], [3]]
        """
        return _call("from_tensor_mask", tensor, mask, batched=batched, **ctor)

    @classmethod
    def from_concatenated(cls, concat: Tensor, shapes: Sequence[Sequence[int]], **ctor: Any) -> Any:
        """The inverse of `concatenate()`.

        Args:
            concat: All values in packed order.
            shapes: The shape of each element; those of `concatenate()` remember the ragged dims.
            **ctor: Keywords of the constructor.

        Raises:
            ValueError: The shapes hold another number of values.

        Example:
            >>> import torch
            >>> from danling.tensors import NestedTensor
            >>> NestedTensor.from_concatenated(*NestedTensor([1, 2], [3]).concatenate()).tolist()
            [[1, 2], [3]]
        """
        return _call("from_concatenated", concat, shapes, **ctor)

    @classmethod
    def from_torch_nested(cls, t: Tensor, **ctor: Any) -> Any:
        """PyTorch's own nested tensor, jagged or strided, as a NestedTensor; values are shared where the packing agrees.

        Raises:
            TypeError: `t` is no `torch.nested` tensor.
        """
        return _call("from_torch_nested", t, **ctor)
