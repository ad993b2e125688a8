"""Kernels over packed batches: packing, padding, and per-element (segment) reductions, normalisation and scans.

Everywhere, ``values`` is ``(R, *S)``: the rows of all elements one after another; ``offsets`` is int64 ``(B + 1,)`` on the
same device: element ``i`` owns the rows ``offsets[i]:offsets[i + 1]``. Every function is differentiable (twice and more),
traceable by ``torch.compile``, and gives the same bits whatever the number of threads.

Compiled C++ and CUDA kernels serve where they are loaded (:func:`info` tells), a torch reference everywhere else.
``DANLING_KERNELS=0`` in the environment selects the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danling.tensors.kernels import gradients
from danling.tensors.kernels.load import info, load
from danling.tensors.kernels.register import ops

load()

__all__ = [
    "info",
    "pack",
    "pad",
    "pad_list",
    "prefix_lengths",
    "segment_cumsum",
    "segment_expand",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_softmax",
    "segment_softmax_backward",
    "segment_sum",
    "unpad",
    "unpad_lengths",
]


def pad(values: Tensor, offsets: Tensor, sizes: Tensor | None, max_sizes: Sequence[int], fill: Tensor) -> Tensor:
    """Packed rows to a padded tensor, in one pass.

    Args:
        values: ``(R, *S)`` of any dtype.
        offsets: int64 ``(B + 1,)``, first row of each element.
        sizes: int64 ``(B, k)`` on the same device for elements with ``k > 1`` ragged dims, ``None`` for one.
        max_sizes: the ``k`` padded sizes.
        fill: one-element CPU tensor of the dtype of ``values``; its bytes fill the rest.

    Returns:
        Contiguous ``(B, *max_sizes, *S)``.

    Raises:
        RuntimeError: for wrong devices, dtypes or ranks, or an element larger than ``max_sizes``.

    Examples:
        >>> values, offsets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3])
        >>> pad(values, offsets, None, [2], torch.tensor(-1.0))
        tensor([[ 1.,  2.],
                [ 3., -1.]])
    """
    return gradients.pad(values, offsets, sizes, max_sizes, fill)


def unpad(padded: Tensor, offsets: Tensor, sizes: Tensor | None, rows: int) -> Tensor:
    """Padded tensor to packed rows, in one pass; padding is not read.

    Args:
        padded: ``(B, *max_sizes, *S)`` of any dtype.
        offsets, sizes: as for :func:`pad`.
        rows: ``offsets[-1]`` as a number.

    Returns:
        Contiguous ``(rows, *S)``.

    Raises:
        RuntimeError: for wrong devices, dtypes or ranks, or an element larger than the padded tensor.

    Examples:
        >>> unpad(torch.tensor([[1, 2], [3, 0]]), torch.tensor([0, 2, 3]), None, 3)
        tensor([1, 2, 3])
    """
    return gradients.unpad(padded, offsets, sizes, rows)


def unpad_lengths(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Padded tensor and lengths to packed rows, with what else there is to know of the batch, in one call.

    Args:
        padded: ``(B, L, *S)`` of any dtype.
        lengths: int64 ``(B,)`` on the same device, each within 0 and ``L``.

    Returns:
        Contiguous ``(rows, *S)``, the int64 offsets ``(B + 1,)``, and the largest length.

    Raises:
        RuntimeError: for wrong devices, dtypes or ranks, or lengths out of range.

    Examples:
        >>> unpad_lengths(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))
        (tensor([1, 2, 3]), tensor([0, 2, 3]), 2)
    """
    return gradients.unpad_lengths(padded, lengths)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of tensors ``(n_i, *S)``, one after another.

    Args:
        tensors: at least one; of one dtype, device and trailing shape, strided as they like.

    Returns:
        Contiguous ``(n_0 + n_1 + ..., *S)``.

    Examples:
        >>> pack([torch.tensor([1, 2]), torch.tensor([3])])
        tensor([1, 2, 3])
    """
    if tensors[0].device.type == "cpu":  # faster there than a call that has to box every tensor of a list
        return torch.cat(tensors).contiguous()  # type: ignore[arg-type]  # cat keeps channels_last
    return gradients.pack(tensors)


def pad_list(tensors: Sequence[Tensor], max_sizes: Sequence[int], fill: Tensor) -> Tensor:
    """Tensors of different sizes to one padded tensor, in one pass.

    Args:
        tensors: ``(n_1, ..., n_k, *S)`` each, with ``k = len(max_sizes)``; strided as they like.
        max_sizes: the padded sizes of the leading ``k`` dims.
        fill: one-element CPU tensor of the same dtype.

    Returns:
        Contiguous ``(len(tensors), *max_sizes, *S)``.

    Examples:
        >>> pad_list([torch.tensor([1, 2]), torch.tensor([3])], [2], torch.tensor(0))
        tensor([[1, 2],
                [3, 0]])
    """
    return gradients.pad_list(tensors, max_sizes, fill)


def prefix_lengths(mask: Tensor) -> Tensor:
    """How many entries at the start of each row are true; -1 where another one follows after a gap.

    Args:
        mask: bool ``(B, L)``.

    Returns:
        int64 ``(B,)``.

    Examples:
        >>> prefix_lengths(torch.tensor([[True, True, False], [False, True, False]]))
        tensor([ 2, -1])
    """
    return ops.prefix_lengths(mask)


def segment_expand(per_segment: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """One row per element to one row per packed row: ``(B, *S)`` of any dtype to ``(rows, *S)``.

    Examples:
        >>> segment_expand(torch.tensor([5, 7]), torch.tensor([0, 2, 3]), 3)
        tensor([5, 5, 7])
    """
    return gradients.segment_expand(per_segment, offsets, rows)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each element's rows, ``(B, *S)``; 0 for an empty element. Integers and bool sum to int64.

    Examples:
        >>> segment_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([3., 3.])
    """
    return gradients.segment_sum(values, offsets)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each element's rows, ``(B, *S)``, of floating or complex values; NaN for an empty element.

    Examples:
        >>> segment_mean(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([1.5000, 3.0000])
    """
    return gradients.segment_mean(values, offsets)


def segment_max(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value over each element's rows and its position within the element, both ``(B, *S)``.

    The first of equal values wins and NaN counts as largest, as in :func:`torch.max`. The gradient goes to that position.
    An empty element gives the smallest value of the dtype (``-inf`` for floats) and position -1.

    Examples:
        >>> segment_max(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        (tensor([2., 3.]), tensor([1, 0]))
    """
    return gradients.segment_max(values, offsets)


def segment_min(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest value over each element's rows and its position; see :func:`segment_max`.

    Examples:
        >>> segment_min(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        (tensor([1., 3.]), tensor([0, 0]))
    """
    return gradients.segment_min(values, offsets)


def segment_softmax(values: Tensor, offsets: Tensor, log: bool = False) -> Tensor:
    """Softmax (``log``: its logarithm) over each element's rows, ``(R, *S)``, of floating values.

    Examples:
        >>> segment_softmax(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    return gradients.segment_softmax(values, offsets, log)


def segment_softmax_backward(grad: Tensor, output: Tensor, offsets: Tensor, log: bool = False) -> Tensor:
    """Gradient of :func:`segment_softmax` given that of its result, ``(R, *S)``; itself differentiable.

    Examples:
        >>> probability = torch.tensor([0.5, 0.5, 1.0])
        >>> segment_softmax_backward(torch.tensor([1.0, 0.0, 1.0]), probability, torch.tensor([0, 2, 3]))
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    return gradients.segment_softmax_backward(grad, output, offsets, log)


def segment_logsumexp(values: Tensor, offsets: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over each element's rows, ``(B, *S)``; ``-inf`` for an empty element.

    Examples:
        >>> segment_logsumexp(torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([0.6931, 3.0000])
    """
    return gradients.segment_logsumexp(values, offsets)


def segment_cumsum(values: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:
    """Running sum within each element, ``(R, *S)``, from its first row (``reverse``: from its last). Integers give int64.

    Examples:
        >>> segment_cumsum(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
        tensor([1, 3, 3])
    """
    return gradients.segment_cumsum(values, offsets, reverse)
