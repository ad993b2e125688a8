"""A small classifier on made-up data, and helpers to run it again and again: the guinea pig of the runner's tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from danling.runners import Runner


class Points(Dataset):
    """Noisy points of three classes; with `augment`, every access draws from torch's, NumPy's and Python's generators."""

    def __init__(self, count: int, *, augment: bool = False, seed: int = 0, offset: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(0, 3, (count,), generator=generator)
        centres = torch.randn(3, 4, generator=torch.Generator().manual_seed(99)) * 2
        self.inputs = centres[self.targets] + torch.randn(count, 4, generator=generator)
        self.augment, self.offset = augment, offset

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x = self.inputs[index]
        if self.augment:
            import random

            import numpy as np

            x = x + 0.1 * torch.randn(4) + 0.05 * float(np.random.randn()) + 0.02 * random.random()
        return x, self.targets[index], index + self.offset


class Tiny(Runner):
    """Reads its own section `tiny`: count, val, dropout, norm, augment."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = {
            "count": 50,
            "val": 21,
            "dropout": 0.2,
            "norm": False,
            "augment": False,
            **self.config.get("tiny", {}),
        }
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(4, 8), nn.ReLU(), nn.Dropout(options["dropout"]), nn.Linear(8, 3)]
        if options["norm"]:
            layers.insert(1, nn.BatchNorm1d(8))
        self.model = nn.Sequential(*layers)
        self.set_seed()
        self.criterion = nn.CrossEntropyLoss()
        self.datasets.train = Points(options["count"], augment=options["augment"])
        if options["val"]:
            self.datasets.val = Points(options["val"], seed=1)
        self.losses: list[float] = []
        self.seen: list[int] = []
        self.on("step", lambda runner, event: self.steps_seen.append(event.global_step))
        self.steps_seen: list[int] = []

    def train_step(self, data: Any) -> tuple[Any, Any]:
        self.seen += data[2].tolist()
        prediction, loss = super().train_step(data)
        self.losses.append(loss.item())
        return prediction, loss


class StepCounter:
    """A callback that counts updates and remembers them in checkpoints."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, runner: Any, event: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.steps = state["steps"]


def tiny_config(root: Path | str, **overrides: Any) -> dict[str, Any]:
    """A configuration as a mapping; dotted names with `__` for the dot."""
    config: dict[str, Any] = {
        "workspace_root": str(root),
        "epochs": 3,
        "optim.type": "adamw",
        "optim.lr": 1e-2,
        "dataloader.batch_size": 8,
        "log": False,
    }
    for name, value in overrides.items():
        config[name.replace("__", ".")] = value
    if "steps" in overrides:
        config.pop("epochs")
    return config


def final_state(runner: Any) -> dict[str, Any]:
    """Everything that two equal runs must share, as plain values."""
    state: dict[str, Any] = {
        "model": {name: value.tolist() for name, value in runner.unwrap(runner.model).state_dict().items()},
        "results": runner.results.rows(),
        "best": runner.best_index,
        "train": {k: v for k, v in runner.train_state.state_dict().items() if k != "positions"},
        "stale": runner.results.stale,
    }
    if runner.optimizer is not None:
        state["optimizer"] = _plain(runner.optimizer.state_dict())
    if runner.scheduler is not None:
        state["scheduler"] = _plain(runner.scheduler.state_dict())
    if runner.ema is not None:
        state["ema"] = _plain(runner.ema.state_dict())
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
