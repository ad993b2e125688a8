"""The model and data of the suite, the runner that trains them, and the plain loop it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from danling.runners import Runner

from .settings import Settings

IGNORED = -100
STEPS, FEATURES, CLASSES = 5, 6, 4
TRAIN, VAL = 61, 23  # neither divides by a number of ranks times a batch size


class Sequences(Dataset):
    """Labelled sequences, some positions without a label, some samples without any; item: input, target, number.

    With `augment` every access draws from the generators of torch and Python.
    """

    def __init__(self, count: int, dtype: torch.dtype, *, seed: int = 0, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, STEPS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = torch.randint(CLASSES, (count, STEPS), generator=generator)
        lengths = torch.randint(STEPS + 1, (count, 1), generator=generator)
        self.targets[torch.arange(STEPS) >= lengths] = IGNORED
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.inputs[index]
        if self.augment:
            import random

            x = x + 0.1 * torch.randn(x.shape).to(x.dtype) + 0.05 * random.random()
        return x, self.targets[index], index


class ClassesSecond(nn.Module):
    """(batch, steps, classes) → (batch, classes, steps), as cross entropy wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def build_model(dtype: torch.dtype, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """A small classifier of each position; with `norm` it ends in a batch normalisation, which has running statistics."""
    layers: list[nn.Module] = [nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES)]
    layers += [ClassesSecond(), nn.BatchNorm1d(CLASSES)] if norm else [ClassesSecond()]
    return nn.Sequential(*layers).to(dtype)


class Task(Runner):
    """Trains the classifier; remembers what it saw.

    Options in its section `task`: `dropout`, `norm`, `augment`, `poison` (a micro-step at which the last data rank gets NaN),
    `shares` (data of that many micro-batches for each data rank, in a loader of its own).

    Attributes:
        seen: per window that is over, the numbers of its samples on this rank, fillers left out.
        batches: micro-step → numbers of its samples and loss, on this rank.
        logged: values of every log point.
        updates: weights after every update, where `record` is set.
    """

    record = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options: dict[str, Any] = {"dropout": 0.0, "norm": False, "augment": False, "poison": None, "shares": None}
        options |= self.config.get("task", {})
        self.options = options
        dtype = getattr(torch, options.get("dtype", "float64"))
        torch.manual_seed(100 + self.rank)  # replicas have to start equal although ranks draw differently
        self.model = build_model(dtype, options["dropout"], options["norm"])
        self.set_seed()
        self.criterion = nn.CrossEntropyLoss(ignore_index=IGNORED)
        train = Sequences(TRAIN, dtype, augment=options["augment"])
        if options["shares"]:
            self.dataloaders.train = list(share_batches(train, options["shares"])[self.data_rank])
        else:
            self.datasets.train = train
        self.datasets.val = Sequences(VAL, dtype, seed=1)
        self.seen: list[list[int]] = []
        self.batches: dict[int, tuple[list[int], float | None]] = {}
        self.logged: list[dict[str, float]] = []
        self.updates: list[dict[str, Tensor]] = []
        self._window: list[int] = []
        self.on("step", Task.after_window)
        self.on("skip", Task.after_window)
        self.on("log", lambda runner, event: runner.logged.append(dict(event.payload["metrics"])))

    def after_window(self, event: Any) -> None:
        """Note what the window held, and the weights after it."""
        self.seen.append(self._window)
        self._window = []
        if self.record:
            self.updates.append(weights(self))

    def train_step(self, data: Any) -> tuple[Any, Any]:
        if not self.window.is_filler:  # type: ignore[attr-defined]
            self._window += data[2].tolist()
        if self.options["poison"] == self.micro_step and self.data_rank == self.data_degree - 1:
            data = [data[0] * torch.nan, *data[1:]]
        prediction, loss = super().train_step(data)
        self.batches[self.micro_step] = data[2].tolist(), None if loss is None else float(loss)
        return prediction, loss


def share_batches(data: Sequences, counts: Sequence[int], size: int = 3) -> list[list[Any]]:
    """Consecutive batches for each of several ranks, as many as `counts` says."""
    shares, first = [], 0
    for count in counts:
        ranges = [range(first + i * size, first + (i + 1) * size) for i in range(count)]
        shares.append([[data.inputs[list(r)], data.targets[list(r)], torch.tensor(list(r))] for r in ranges])
        first += count * size
    return shares


def weights(runner: Any, ema: bool = False) -> dict[str, Tensor]:
    """A copy of all weights under the names of the user's module; every rank calls it.

    Where an engine puts them together on one rank alone, the others get those.
    """
    state = {}
    for name, value in runner.export_state(ema=ema).items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = value.detach().cpu().clone()
    return state if all(runner.gather_objects(bool(state))) else runner.broadcast_object(state)


def task_config(settings: Settings, folder: Path | str, **values: Any) -> dict[str, Any]:
    """A configuration as a mapping; dotted names with `__` for the dot."""
    config: dict[str, Any] = {
        "stack": settings.stack,
        "workspace_root": str(folder),
        "log": False,
        "progress": False,
        "seed": 5,
        "comm.init_timeout_seconds": 60,
        "comm.train_timeout_seconds": 60,
        "dataloader.batch_size": 4,
        "dataloader.drop_last": False,
        "optim.type": "sgd",
        "optim.lr": 0.1,
        "task.dtype": settings.dtype,
    }
    config |= {name.replace("__", "."): value for name, value in values.items()}
    config |= settings.overrides
    return {name: value for name, value in config.items() if value is not None}


class Reference:
    """The same training as a plain loop in one process, in float64, on the concatenated batch of all ranks.

    Args:
        start: weights before the first update.
        optim: the section `optim` of the configuration.
        max_norm: clip the norm of all gradients to that.
    """

    def __init__(self, start: Mapping[str, Tensor], optim: Mapping[str, Any], max_norm: float | None = None) -> None:
        self.model = build_model(torch.float64)
        self.model.load_state_dict({name: value.double() for name, value in start.items()})
        options = dict(optim)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[options.pop("type")]
        self.optimizer = kind(self.model.parameters(), **options)
        self.max_norm = max_norm
        self.data = Sequences(TRAIN, torch.float64)

    def update(self, numbers: Sequence[int], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Train on samples; return weights, loss and norm of the gradients before clipping.

        Args:
            numbers: of the samples.
            dtype: in which the engine got them.
        """
        x, y = self.data.inputs[numbers].to(dtype).double(), self.data.targets[numbers]
        loss = nn.functional.cross_entropy(self.model(x), y, ignore_index=IGNORED)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item(), "weights": self.weights()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def windows(found: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The samples of each window, of all data ranks together."""
    shares = {rank["data_rank"]: rank["seen"] for rank in found}
    assert len({len(seen) for seen in shares.values()}) == 1, "data ranks ran different numbers of windows"
    return [[number for share in parts for number in share] for parts in zip(*shares.values())]


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, relative to the largest magnitude in each expected one.

    >>> difference({"w": torch.tensor([1.0, 2.5])}, {"w": torch.tensor([1.0, 2.0])})
    0.25
    """
    assert found.keys() == expected.keys(), f"names differ: {sorted(found)} and {sorted(expected)}"
    ratios = []
    for name, value in expected.items():
        scale = value.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        ratios.append(((found[name].double() - value.double()).abs().max() / scale).item())
    return max(ratios)
