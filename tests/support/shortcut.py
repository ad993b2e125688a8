"""A run that may take the short way through its updates, beside one whose hooks make it take the long one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import danling as dl
from danling.backends.torch.plain import is_plain
from danling.metrics import multiclass_metrics
from support.tiny import tiny_config

BATCH = 4
G = torch.Generator().manual_seed(3)
X, Y = torch.randn(40, 6, generator=G), torch.randint(0, 3, (40,), generator=G)


class Criterion(nn.CrossEntropyLoss):
    """Infinite for a batch of three."""

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = super().forward(prediction, target)
        return loss * torch.inf if len(target) == 3 else loss


class Short(dl.Runner):
    """Trains on pairs of tensors; one of them has no target that counts, and one, if asked for, an infinite loss."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.criterion = Criterion()
        self.metrics = multiclass_metrics(3)
        pairs = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, len(X), BATCH)]
        pairs[3] = (X[12:16], torch.full((BATCH,), -100))
        if self.config.tiny.infinite:
            pairs[6] = (X[24:27], Y[24:27])
        self.dataloaders.train = pairs


class Long(Short):
    """The same, hook by hook."""

    def record_loss(self, loss: Any) -> None:
        super().record_loss(loss)


def both_ways(folder: Path, *, infinite: bool = False, **settings: Any) -> list[tuple[Any, ...]]:
    """Whether the way was short, weights, results and counters of either run."""
    found = []
    for cls in (Short, Long):
        settings = {
            "epochs": 2,
            "log_interval": 3,
            "dataloader__batch_size": BATCH,
            "tiny__infinite": infinite,
            **settings,
        }
        with cls(tiny_config(folder / cls.__name__, **settings)) as runner:
            short, results = is_plain(runner), runner.train()
            rows = [results[epoch] for epoch in (1, 2)]
            weights = {name: value.tolist() for name, value in runner.export_state().items()}
            found.append((short, weights, rows, runner.train_state.state_dict(), runner.train_state.skipped))
    return found
