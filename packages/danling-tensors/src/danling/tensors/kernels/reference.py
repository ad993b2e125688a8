"""Every kernel in plain torch: what runs where no compiled kernel does, and what the compiled ones are tested against.

The functions take the arguments of their namesakes in :mod:`danling.tensors.kernels`. They hold no padded copy but the one
asked for, keep elements apart (an infinity in one never reaches another), and give the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """View as integers of the same width, so that a copy is exact for every dtype (float8 and NaN payloads included)."""
    return tensor.view(_BITS[tensor.element_size()]) if tensor.element_size() in _BITS else tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float32 for narrower floats, int64 for integers and bool."""
    if dtype.is_floating_point:
        return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    return torch.int64


def _check(offsets: Tensor, rows: int) -> None:
    """Offsets on the CPU are proven; reading those of another device would wait for it."""
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any())):
        raise RuntimeError(f"danling: offsets must rise from 0 to {rows}, the number of rows")


def row_to_segment(offsets: Tensor, rows: int) -> Tensor:
    """Index of the element that each row belongs to, ``(rows,)``."""
    _check(offsets, rows)
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=rows)


def _padded_rows(offsets: Tensor, sizes: Tensor | None, max_sizes: Sequence[int], rows: int) -> Tensor:
    """Where each packed row lies in the padded tensor once that is flattened to rows, ``(rows,)``."""
    segment = row_to_segment(offsets, rows)
    local = torch.arange(rows, device=offsets.device) - offsets[segment]
    if sizes is None:
        sizes = offsets.diff()[:, None]
    if offsets.device.type == "cpu" and bool((sizes > torch.tensor(list(max_sizes))).any()):
        raise RuntimeError(f"danling: an element is larger than max_sizes={list(max_sizes)}")
    target, stride = torch.zeros_like(local), 1
    for dim in reversed(range(len(max_sizes))):
        size = sizes[segment, dim]
        target += local.remainder(size) * stride
        local = local.div(size, rounding_mode="floor")
        stride *= max_sizes[dim]
    return target + segment * stride


def pad(values: Tensor, offsets: Tensor, sizes: Tensor | None, max_sizes: Sequence[int], fill: Tensor) -> Tensor:
    static = values.shape[1:]
    batch = offsets.shape[0] - 1
    out = (
        _bits(fill)
        .reshape(())
        .to(values.device)
        .expand(batch * prod(max_sizes), *static)
        .clone(memory_format=torch.contiguous_format)
    )
    target = _padded_rows(offsets, sizes, max_sizes, values.shape[0])
    out.index_copy_(0, target, _bits(values))
    return out.view(values.dtype).view(batch, *max_sizes, *static)


def unpad(padded: Tensor, offsets: Tensor, sizes: Tensor | None, rows: int) -> Tensor:
    ragged = 1 if sizes is None else sizes.shape[1]
    max_sizes = padded.shape[1 : 1 + ragged]
    source = _padded_rows(offsets, sizes, max_sizes, rows)
    flat = _bits(padded).reshape(padded.shape[0] * prod(max_sizes), *padded.shape[1 + ragged :])
    return flat.index_select(0, source).view(padded.dtype)


def unpad_lengths(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    if padded.dim() < 2 or lengths.dtype != torch.int64 or lengths.shape != padded.shape[:1]:
        raise RuntimeError("danling: lengths must be int64, (B,), one for each element of padded")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    bounds = torch.stack([lengths.amin(), lengths.amax(), offsets[-1]]).tolist() if len(lengths) else [0, 0, 0]
    if bounds[0] < 0 or bounds[1] > padded.shape[1]:
        raise RuntimeError(f"danling: lengths must be within 0 and {padded.shape[1]}, the padded size")
    return unpad(padded, offsets, None, bounds[2]), offsets, bounds[1]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        raise RuntimeError("danling: pack needs at least one tensor")
    return torch.cat([_bits(t) for t in tensors]).view(tensors[0].dtype)


def pad_list(tensors: Sequence[Tensor], max_sizes: Sequence[int], fill: Tensor) -> Tensor:
    static = tensors[0].shape[len(max_sizes) :] if tensors else ()
    device = tensors[0].device if tensors else fill.device
    out = (
        _bits(fill)
        .reshape(())
        .to(device)
        .expand(len(tensors), *max_sizes, *static)
        .clone(memory_format=torch.contiguous_format)
    )
    for row, tensor in zip(out.unbind(), tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape[: len(max_sizes)])] = _bits(tensor)
    return out.view(fill.dtype)


def prefix_lengths(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise RuntimeError("danling: mask must be bool, (B, L)")
    gap = (mask[:, 1:] & ~mask[:, :-1]).any(1)
    return mask.sum(1).masked_fill(gap, -1)


def segment_expand(per_segment: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return _bits(per_segment).index_select(0, row_to_segment(offsets, rows)).view(per_segment.dtype)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    if values.is_complex():
        return torch.view_as_complex(segment_sum(torch.view_as_real(values), offsets))
    _check(offsets, values.shape[0])
    work = values.to(_accumulator(values.dtype))
    if values.is_floating_point():
        return _segment_sum_float(work, offsets).to(values.dtype)
    total = torch.cat([work.new_zeros(1, *work.shape[1:]), work.cumsum(0)])  # exact: integers wrap around alike
    return total[offsets[1:]] - total[offsets[:-1]]


def _segment_sum_float(values: Tensor, offsets: Tensor) -> Tensor:
    if not values.numel():
        return values.new_zeros(offsets.shape[0] - 1, *values.shape[1:])
    # It adds one row after another: over a million of them, float32 would keep three digits.
    wide = values.contiguous().double()
    return torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True, initial=0).to(values.dtype)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    if not (values.is_floating_point() or values.is_complex()):
        raise RuntimeError(f"danling: segment_mean needs floating or complex values, not {values.dtype}")
    if values.is_complex():
        return torch.view_as_complex(segment_mean(torch.view_as_real(values), offsets))
    _check(offsets, values.shape[0])
    work = values.to(_accumulator(values.dtype))
    lengths = offsets.diff().view(-1, *[1] * (values.dim() - 1))
    return (_segment_sum_float(work, offsets) / lengths).to(values.dtype)


def _segment_extremum(values: Tensor, offsets: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    if values.is_complex():
        raise RuntimeError(f"danling: {values.dtype} has no order")
    batch, rows, static = offsets.shape[0] - 1, values.shape[0], values.shape[1:]
    work = values.to(torch.uint8) if values.dtype == torch.bool else values
    work = work.float() if work.is_floating_point() and work.element_size() < 4 else work
    if work.is_floating_point():
        worst = -torch.inf if largest else torch.inf
    else:
        limits = (0, 1) if values.dtype == torch.bool else (torch.iinfo(work.dtype).min, torch.iinfo(work.dtype).max)
        worst = limits[0] if largest else limits[1]
    segment = row_to_segment(offsets, rows)
    spot = segment.view(-1, *[1] * len(static)).expand_as(work)
    best = work.new_full((batch, *static), worst)
    best.scatter_reduce_(0, spot, work, "amax" if largest else "amin")
    spread = best.index_select(0, segment)
    hit = work == spread
    if work.is_floating_point():
        hit |= work.isnan() & spread.isnan()
    local = (torch.arange(rows, device=values.device) - offsets[segment]).view(-1, *[1] * len(static))
    far = torch.iinfo(torch.int64).max
    first = torch.full((batch, *static), far, device=values.device)
    first.scatter_reduce_(0, spot, local.expand_as(work).masked_fill(~hit, far), "amin")
    return best.to(values.dtype), first.masked_fill(first == far, -1)


def segment_max(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return _segment_extremum(values, offsets, largest=True)


def segment_min(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return _segment_extremum(values, offsets, largest=False)


def _floating(values: Tensor, name: str) -> Tensor:
    if not values.is_floating_point():
        raise RuntimeError(f"danling: {name} needs floating values, not {values.dtype}")
    return values.to(_accumulator(values.dtype))


def segment_softmax(values: Tensor, offsets: Tensor, log: bool) -> Tensor:
    work = _floating(values, "segment_softmax")
    segment = row_to_segment(offsets, values.shape[0])
    shifted = work - segment_max(work, offsets)[0].index_select(0, segment)
    total = _segment_sum_float(shifted.exp(), offsets)
    if log:
        return (shifted - total.log().index_select(0, segment)).to(values.dtype)
    return (shifted.exp() / total.index_select(0, segment)).to(values.dtype)


def segment_softmax_backward(grad: Tensor, output: Tensor, offsets: Tensor, log: bool) -> Tensor:
    g, y = _floating(grad, "segment_softmax_backward"), _floating(output, "segment_softmax_backward")
    segment = row_to_segment(offsets, grad.shape[0])
    if log:
        return (g - y.exp() * _segment_sum_float(g, offsets).index_select(0, segment)).to(grad.dtype)
    return (y * (g - _segment_sum_float(g * y, offsets).index_select(0, segment))).to(grad.dtype)


def segment_logsumexp(values: Tensor, offsets: Tensor) -> Tensor:
    work = _floating(values, "segment_logsumexp")
    largest = segment_max(work, offsets)[0]
    largest = largest.masked_fill(largest.isinf(), 0)  # inf - inf would be NaN
    shifted = work - segment_expand(largest, offsets, values.shape[0])
    return (_segment_sum_float(shifted.exp(), offsets).log() + largest).to(values.dtype)


def segment_cumsum(values: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    if values.is_complex():
        return torch.view_as_complex(segment_cumsum(torch.view_as_real(values), offsets, reverse))
    rows = values.shape[0]
    work = values.to(_accumulator(values.dtype), copy=True)
    segment = row_to_segment(offsets, rows)
    index = torch.arange(rows, device=values.device)
    reach = offsets[segment + 1] - 1 - index if reverse else index - offsets[segment]  # rows of the element still ahead
    reach = reach.view(-1, *[1] * (values.dim() - 1))
    # Doubling scan: after the step of width w every row holds the sum of the last 2w rows of its element.
    width = 1
    limit = int(offsets.diff().max()) if offsets.device.type == "cpu" and offsets.shape[0] > 1 else rows
    while width < limit:
        near, far = (
            (slice(0, rows - width), slice(width, rows)) if reverse else (slice(width, rows), slice(0, rows - width))
        )
        work[near] = work[near] + work[far].masked_fill(reach[near] < width, 0)
        width *= 2
    return work if not values.is_floating_point() else work.to(values.dtype)
