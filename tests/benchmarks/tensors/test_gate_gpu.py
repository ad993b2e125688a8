"""Gates on a GPU: bandwidth of padding and packing, host time of a small call, and a training step that never waits."""

from __future__ import annotations

import time

import pytest
import torch

from danling.tensors import NestedTensor, kernels
from support.ratios import Board, quiet

from .batches import lengths_of, parts_of
from .test_gate_f_transformer import BATCH, LONGEST, WIDTH, encoder, step

pytestmark = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(not kernels.info()["cuda"]["loaded"], reason=kernels.info()["reason"]),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("megabytes", [64, 256])
@pytest.mark.parametrize("name", ["pad", "unpad"])
def test_bandwidth(board: Board, name: str, megabytes: int, dtype: torch.dtype) -> None:
    """Bytes read and written per second reach 85 % of those of a copy that moves as many."""
    width, longest = 256, 512
    row = width * dtype.itemsize
    elements = megabytes * 2**20 // (longest * row)
    lengths = lengths_of(elements, longest, 0.5)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    values = torch.randn(sum(lengths), width, device=DEVICE).to(dtype)
    fill = torch.zeros((), dtype=dtype)
    padded = kernels.pad(values, offsets, None, [longest], fill)
    assert kernels.unpad(padded, offsets, None, len(values)).equal(values)
    if name == "pad":  # reads the packed values, writes the padded ones
        moved = values.nbytes + padded.nbytes

        def call() -> object:
            return kernels.pad(values, offsets, None, [longest], fill)
    else:
        moved = 2 * values.nbytes

        def call() -> object:
            return kernels.unpad(padded, offsets, None, len(values))

    source = torch.empty(moved // 2 // dtype.itemsize, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    board.gate(
        "gpu",
        f"{name}, {megabytes} MB padded, {str(dtype)[6:]}",
        "kernel",
        "a copy that moves as many bytes",
        1 / 0.85,
        call,
        lambda: target.copy_(source),
        synchronize=torch.cuda.synchronize,
    )


@pytest.mark.parametrize("name", ["pad", "unpad", "segment_sum", "segment_softmax"])
def test_host_time(board: Board, name: str) -> None:
    offsets = torch.tensor([0, 2, 5, 9], device=DEVICE)
    values, fill = torch.randn(9, 8, device=DEVICE), torch.zeros(())
    padded = kernels.pad(values, offsets, None, [4], fill)
    calls = {
        "pad": lambda: kernels.pad(values, offsets, None, [4], fill),
        "unpad": lambda: kernels.unpad(padded, offsets, None, 9),
        "segment_sum": lambda: kernels.segment_sum(values, offsets),
        "segment_softmax": lambda: kernels.segment_softmax(values, offsets),
    }
    call, best = calls[name], float("inf")
    with quiet():
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            best = min(best, (time.perf_counter() - start) / 100)
    board.number("gpu", f"{name}, 9 x 8", "microseconds of host time over 10", "", best * 1e6 / 10, 1.0)


def test_training_step_does_not_wait(board: Board) -> None:
    parts = parts_of(lengths_of(BATCH, LONGEST, 0.4), WIDTH)
    batch = NestedTensor([part.to(DEVICE) for part in parts])
    padded, mask = batch.tensor_mask
    model = encoder().to(DEVICE).train()
    step(model, lambda: model(batch).concat)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, lambda: model(batch).concat)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    limit = 1.15 * batch.occupancy + 0.05
    board.gate(
        "gpu",
        f"encoder, train, occupancy {batch.occupancy:.2f}",
        "NestedTensor",
        "padded, with key padding mask",
        limit,
        lambda: step(model, lambda: model(batch).concat),
        lambda: step(model, lambda: model(padded, src_key_padding_mask=~mask)[mask]),
        synchronize=torch.cuda.synchronize,
    )
