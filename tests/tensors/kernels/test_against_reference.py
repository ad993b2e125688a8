"""Compiled kernels against the torch reference: copies bit for bit, reductions within the tolerance of the dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danling.tensors import kernels
from danling.tensors.kernels import reference

from .cases import COMPLEX, FLOATS, INTEGERS, Batch, assert_bitwise, assert_near, batches, draw

ops = torch.ops.danling
needs_library = pytest.mark.skipif(not kernels.info()["cpu"]["loaded"], reason=kernels.info()["reason"])
pytestmark = needs_library

ALL = [*FLOATS, *INTEGERS, *COMPLEX]


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=4), st.sampled_from([1, 7, 33]), st.booleans()
)
def test_prefix_lengths(rows: list[list[bool]], times: int, strided: bool) -> None:
    mask = torch.tensor(rows, dtype=torch.bool).view(-1, 3).repeat_interleave(times, 1)
    mask = mask.mT.contiguous().mT if strided else mask
    expected = [-1 if "01" in text else text.count("1") for text in ("".join("01"[m] for m in row) for row in rows)]
    assert ops.prefix_lengths(mask).tolist() == reference.prefix_lengths(mask).tolist()
    assert ops.prefix_lengths(mask).tolist() == [n if n < 0 else n * times for n in expected]


@given(batches(ALL), st.sampled_from([0, 2]))
def test_pad_and_unpad(batch: Batch, more: int) -> None:
    longest = [batch.longest + more]
    values, fill = batch.data(batch.rows), draw((1,), batch.dtype, batch.seed + 1)
    padded = ops.pad(values, batch.offsets, None, longest, fill)
    assert_bitwise(padded, reference.pad(values, batch.offsets, None, longest, fill))
    assert_bitwise(ops.unpad(padded, batch.offsets, None, batch.rows), values)
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    for each in (ops, reference):
        rows, offsets, most = each.unpad_lengths(padded, lengths)
        assert_bitwise(rows, values)
        assert_bitwise(offsets, batch.offsets)
        assert most == batch.longest
    other = batch.data(longest[0], len(batch.lengths)).transpose(0, 1)  # batch second, as in `batch_first=False`
    expected = reference.unpad(other, batch.offsets, None, batch.rows)
    assert_bitwise(ops.unpad(other, batch.offsets, None, batch.rows), expected)


@given(batches(ALL), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=5))
def test_several_ragged_dims(batch: Batch, sizes: list[tuple[int, int, int]]) -> None:
    shape = torch.tensor(sizes, dtype=torch.int64).view(-1, 3)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), shape.prod(1).cumsum(0)])
    rows, longest = int(offsets[-1]), [3, 5, 2]
    values, fill = batch.data(rows), draw((1,), batch.dtype, batch.seed + 1)
    padded = ops.pad(values, offsets, shape, longest, fill)
    assert_bitwise(padded, reference.pad(values, offsets, shape, longest, fill))
    assert_bitwise(ops.unpad(padded, offsets, shape, rows), values)
    tensors = [part.unflatten(0, size) for part, size in zip(values.split(shape.prod(1).tolist()), sizes, strict=True)]
    assert_bitwise(ops.pad_list(tensors, longest, fill), padded if sizes else reference.pad_list([], longest, fill))
    turned = [t.movedim(0, 1).contiguous().movedim(0, 1) for t in tensors]
    assert_bitwise(ops.pad_list(turned, longest, fill), ops.pad_list(tensors, longest, fill))


@given(batches(ALL))
def test_lists(batch: Batch) -> None:
    tensors = list(batch.data(batch.rows).split(batch.lengths))
    fill = draw((1,), batch.dtype, batch.seed + 1)
    assert_bitwise(
        ops.pad_list(tensors, [batch.longest + 1], fill), reference.pad_list(tensors, [batch.longest + 1], fill)
    )
    if tensors:
        assert_bitwise(ops.pack(tensors), reference.pack(tensors))
        assert_bitwise(kernels.pack(tensors), reference.pack(tensors))


@given(batches(ALL))
def test_expand(batch: Batch) -> None:
    per_segment = batch.data(len(batch.lengths))
    expected = reference.segment_expand(per_segment, batch.offsets, batch.rows)
    assert_bitwise(ops.segment_expand(per_segment, batch.offsets, batch.rows), expected)


@given(batches(ALL), st.booleans())
def test_sums(batch: Batch, reverse: bool) -> None:
    values, offsets = batch.data(batch.rows), batch.offsets
    assert_near(ops.segment_sum(values, offsets), reference.segment_sum(values, offsets), batch.dtype)
    expected = reference.segment_cumsum(values, offsets, reverse)
    assert_near(ops.segment_cumsum(values, offsets, reverse), expected, batch.dtype)
    if batch.dtype not in INTEGERS:
        assert_near(ops.segment_mean(values, offsets), reference.segment_mean(values, offsets), batch.dtype)


@given(batches([*FLOATS, *INTEGERS]), st.booleans())
def test_extrema(batch: Batch, with_nan: bool) -> None:
    values, offsets = batch.data(batch.rows), batch.offsets
    if with_nan and values.is_floating_point():
        values = values.clone()
        values[::3] = torch.nan
    for name in ("segment_max", "segment_min"):
        value, position = getattr(ops, name)(values, offsets)
        expected, where = getattr(reference, name)(values, offsets)
        assert_near(value, expected, torch.float64)
        assert_bitwise(position, where)


@given(batches(FLOATS), st.booleans())
def test_softmax(batch: Batch, log: bool) -> None:
    values, offsets = batch.data(batch.rows), batch.offsets
    output = ops.segment_softmax(values, offsets, log)
    assert_near(output, reference.segment_softmax(values, offsets, log), batch.dtype)
    grad = draw(values.shape, batch.dtype, batch.seed + 1)
    expected = reference.segment_softmax_backward(grad, output, offsets, log)
    assert_near(ops.segment_softmax_backward(grad, output, offsets, log), expected, batch.dtype)
    expected = reference.segment_logsumexp(values, offsets)
    assert_near(ops.segment_logsumexp(values, offsets), expected, batch.dtype)
