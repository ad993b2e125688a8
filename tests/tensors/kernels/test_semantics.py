"""What both the compiled kernels and the reference must do, measured by what torch does to one element."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.kernels import reference

INF, NAN = torch.inf, torch.nan
OFFSETS = torch.tensor([0, 3, 3, 8, 9])
LENGTHS = [3, 0, 5, 1]
implementations = pytest.mark.parametrize("k", [kernels, reference], ids=["kernels", "reference"])


def elements(values: Tensor) -> list[Tensor]:
    return [part for part in values.split(LENGTHS) if len(part)]


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "content",
    [[INF, 1.0], [-INF, -INF], [NAN, 1.0], [1.0, NAN], [-INF, 1.0], [1e30, -1e30], [-INF, INF], [88.0, -88.0]],
)
def test_special_values_are_as_torch(k, dtype: torch.dtype, content: list[float]) -> None:
    x, offsets = torch.tensor(content, dtype=dtype), torch.tensor([0, 2])

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, equal_nan=True)

    check(k.segment_softmax(x, offsets, False), x.softmax(0))
    check(k.segment_softmax(x, offsets, True), x.log_softmax(0))
    check(k.segment_logsumexp(x, offsets)[0], x.logsumexp(0))
    for name in ("max", "min"):
        value, position = getattr(k, f"segment_{name}")(x, offsets)
        expected = getattr(x, name)(0)
        check(value[0], expected.values)
        check(position[0], expected.indices)
    check(k.segment_sum(x, offsets)[0], x.sum(0))
    check(k.segment_cumsum(x, offsets, False), x.cumsum(0))


@implementations
def test_ties_go_to_the_first_and_empty_elements_have_no_position(k) -> None:
    values = torch.tensor([1, 2, 2, 5, 4, 5, 4, 4, 7])
    largest, where = k.segment_max(values, OFFSETS)
    assert largest.tolist() == [2, torch.iinfo(torch.int64).min, 5, 7]
    assert where.tolist() == [1, -1, 0, 0]
    smallest, where = k.segment_min(values, OFFSETS)
    assert smallest.tolist() == [1, torch.iinfo(torch.int64).max, 4, 7]
    assert where.tolist() == [0, -1, 1, 0]


@implementations
def test_empty_elements(k) -> None:
    values = torch.ones(9, 2)
    assert k.segment_sum(values, OFFSETS)[1].tolist() == [0, 0]
    assert k.segment_mean(values, OFFSETS)[1].isnan().all()
    assert k.segment_logsumexp(values, OFFSETS)[1].tolist() == [-INF, -INF]
    assert k.segment_max(values.bool(), OFFSETS)[0][1].tolist() == [False, False]
    assert k.segment_min(values.bool(), OFFSETS)[0][1].tolist() == [True, True]


@implementations
@pytest.mark.parametrize("poison", [INF, -INF, NAN, 3e38])
def test_elements_do_not_influence_each_other(k, poison: float) -> None:
    torch.manual_seed(0)
    clean = torch.randn(9, 3)
    dirty = clean.clone()
    dirty[3:8] = poison
    keep = [0, 1, 2, 8]

    def rows(values: Tensor) -> list[Tensor]:
        results = [k.segment_softmax(values, OFFSETS, log) for log in (False, True)]
        results += [k.segment_cumsum(values, OFFSETS, reverse) for reverse in (False, True)]
        return [r[keep] for r in results]

    def reductions(values: Tensor) -> list[Tensor]:
        names = ("sum", "mean", "logsumexp")
        results = [getattr(k, f"segment_{name}")(values, OFFSETS) for name in names]
        return [r[[0, 3]] for r in (*results, *k.segment_max(values, OFFSETS), *k.segment_min(values, OFFSETS))]

    for a, b in zip(rows(clean) + reductions(clean), rows(dirty) + reductions(dirty), strict=True):
        assert torch.equal(a, b)


@implementations
def test_padding_is_not_read(k) -> None:
    padded = torch.full((4, 6, 2), NAN)
    values = torch.arange(18.0).view(9, 2)
    for i, part in enumerate(values.split(LENGTHS)):
        padded[i, : len(part)] = part
    assert torch.equal(k.unpad(padded, OFFSETS, None, 9), values)


@implementations
def test_the_fill_is_exact(k) -> None:
    big = torch.tensor(2**53 + 1)
    assert (k.pad(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), None, [2], big)[0, 1] == big).all()
    odd_nan = torch.tensor([0x7FC0BEEF], dtype=torch.int32).view(torch.float32)
    padded = k.pad(torch.zeros(1), torch.tensor([0, 1]), None, [3], odd_nan)
    assert padded.view(torch.int32)[0, 1:].tolist() == [0x7FC0BEEF] * 2


@implementations
def test_long_sums_keep_their_precision(k) -> None:
    values = torch.full((1_000_000, 2), 0.1)
    total = k.segment_sum(values, torch.tensor([0, 1_000_000]))
    torch.testing.assert_close(total, torch.full((1, 2), 100_000.0), rtol=1e-5, atol=0)


def test_one_long_element_among_many_short_ones() -> None:
    lengths = torch.ones(65_536, dtype=torch.int64)
    lengths[40_000] = 100_000
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.arange(int(offsets[-1]))
    before = torch.cat([values.new_zeros(1), values.cumsum(0)])
    assert torch.equal(kernels.segment_sum(values, offsets), before[offsets[1:]] - before[offsets[:-1]])
    assert torch.equal(kernels.segment_max(values, offsets)[1], lengths - 1)
    spread = kernels.segment_expand(lengths, offsets, len(values))
    assert torch.equal(spread, torch.repeat_interleave(lengths, lengths))


def test_threads_do_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 900, (400,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = int(offsets[-1])
    values = torch.randn(rows, 7, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            padded = kernels.pad(values, offsets, None, [900], torch.tensor(-1.0))
            results.append(
                [
                    padded,
                    kernels.unpad(padded, offsets, None, rows),
                    kernels.pad_list(list(values.split(lengths.tolist())), [900], torch.tensor(-1.0)),
                    kernels.segment_expand(values[:400], offsets, rows),
                    kernels.segment_sum(values, offsets),
                    kernels.segment_mean(values, offsets).nan_to_num(),
                    *kernels.segment_max(values, offsets),
                    kernels.segment_softmax(values, offsets),
                    kernels.segment_softmax_backward(values, values, offsets),
                    kernels.segment_logsumexp(values, offsets),
                    kernels.segment_cumsum(values, offsets),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*results, strict=True))


@pytest.mark.slow
def test_more_than_two_to_the_31_values() -> None:
    rows = 2**31 + 8
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        free = 0
    if free < 4 * rows:
        pytest.skip(f"needs {4 * rows / 2**30:.0f} GiB of free memory")
    values = torch.zeros(rows, dtype=torch.int8)
    values[-1] = 7
    offsets = torch.tensor([0, 4, rows])
    assert kernels.segment_sum(values, offsets).tolist() == [0, 7]
    assert kernels.segment_max(values, offsets)[1].tolist() == [0, rows - 5]
    padded = values[4:].view(1, -1)
    assert kernels.unpad(padded, torch.tensor([0, rows - 4]), None, rows - 4)[-1] == 7
    assert (
        kernels.pad(values[4:], torch.tensor([0, rows - 4]), None, [rows - 4], torch.tensor(0, dtype=torch.int8))[0, -1]
        == 7
    )
