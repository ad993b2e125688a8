"""The board all gates write on: printed with `-s`, and kept as `tensors.json` in the folder `DANLING_BENCH_DIR`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from danling.tensors import kernels
from support.ratios import Board


@pytest.fixture(scope="session")
def board() -> Iterator[Board]:
    board = Board("tensors", kernels=kernels.info()["reason"])
    yield board
    path = board.write()
    print(f"\n{board.table()}\n\nwritten to {path}")
