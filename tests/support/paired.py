"""Times a loop against another one, a few updates at a time, so that what else the machine does falls on both alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

UPDATES = int(os.environ.get("DANLING_BENCH_UPDATES", "2000"))
CHUNK = 50
WARM_UP = 4
REFERENCE = 238.0  # µs that the plain loop takes on the machine that limits are for

Batch = tuple[torch.Tensor, torch.Tensor]


def build() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Model, criterion and optimizer: MLP 64-128-10 with AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)


def plain() -> Callable[[Sequence[Batch]], None]:
    """The loop of plain PyTorch."""
    model, criterion, optimizer = build()

    def train(batches: Sequence[Batch]) -> None:
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


class Paired:
    """A loader that times its reader against a loop written by hand, 50 updates at a time.

    Args:
        by_hand: makes that loop, when the first batches have been read; it trains a twin of the model on the same batches.

    What is compared is the CPU time of the training thread. Elapsed time is kept beside it: where ranks wait for each other it
    depends on how many cores they share.

    Attributes:
        raw: seconds of CPU time per update of the loop by hand, for each pair.
        added: what the reader took more.
        elapsed: seconds per update of the loop by hand, and what the reader took more, for each pair.
    """

    num_workers = 0  # the next batch is never lost

    def __init__(self, by_hand: Callable[[], Callable[[Sequence[Batch]], Any]] = plain) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator))
            for _ in range(UPDATES)
        ]
        self.by_hand = by_hand
        self.raw: list[float] = []
        self.added: list[float] = []
        self.elapsed: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return UPDATES

    def __iter__(self) -> Iterator[Batch]:
        twin = self.by_hand()
        for first in range(0, UPDATES, CHUNK):
            chunk = self.batches[first : first + CHUNK]
            start, begun = time.thread_time(), time.perf_counter()
            yield from chunk
            middle, turned = time.thread_time(), time.perf_counter()
            twin(chunk)
            raw, waited = time.thread_time() - middle, time.perf_counter() - turned
            self.raw.append(raw / CHUNK)
            self.added.append((middle - start - raw) / CHUNK)
            self.elapsed.append((waited / CHUNK, (turned - begun - waited) / CHUNK))

    @property
    def figures(self) -> tuple[float, float]:
        """Medians in µs: an update of the loop by hand, and what the reader added."""
        return tuple(statistics.median(values[WARM_UP:]) * 1e6 for values in (self.raw, self.added))  # type: ignore[return-value]

    @property
    def elapsed_figures(self) -> tuple[float, float]:
        """The same of elapsed time."""
        return tuple(statistics.median(values) * 1e6 for values in zip(*self.elapsed[WARM_UP:], strict=True))  # type: ignore[return-value]
