"""Random packed batches for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

HALF = [torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float32, torch.float64, *HALF, *FLOAT8]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.13, torch.float8_e5m2: 0.26}


@dataclass
class Batch:
    """Lengths and trailing shape of a packed batch, and how its data lie in memory."""

    lengths: list[int]
    static: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    memory: str

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def data(self, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values of shape ``(*leading, *static)``: contiguous, strided, or at an address that breaks every alignment."""
        shape = (*leading, *self.static)
        if self.memory == "strided":
            wide = draw((*shape, 2), dtype or self.dtype, self.seed)
            return wide[..., 0]
        if self.memory == "unaligned":
            flat = draw((torch.Size(shape).numel() + 1,), dtype or self.dtype, self.seed)
            return flat[1:].view(shape)
        return draw(shape, dtype or self.dtype, self.seed)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype in INTEGERS:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    if dtype in COMPLEX:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def batches(dtypes: list[torch.dtype]) -> st.SearchStrategy[Batch]:
    return st.builds(
        Batch,
        lengths=st.lists(st.sampled_from([0, 0, 1, 2, 3, 17, 300]), max_size=7),
        static=st.sampled_from([(), (1,), (3,), (2, 5), (65,), (0,)]),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**31),
        memory=st.sampled_from(["contiguous", "strided", "unaligned"]),
    )


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    if actual.numel():
        assert torch.equal(_bytes(actual), _bytes(expected))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal within what the dtype of the data can tell; sums of many values lose a little more."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE.get(dtype, 1e-5)
    exact = torch.complex128 if actual.is_complex() else torch.float64
    torch.testing.assert_close(actual.to(exact), expected.to(exact), rtol=tolerance, atol=tolerance, equal_nan=True)
