"""What ranks do in the pipeline tests: run one configuration after the other and write what came out, one file per rank.

Keys of a configuration that start with `x_` are for this file: `x_stop: [rank, update]` asks for a stop there, `x_model` names
a model below, `x_seed` biases the seed of the weights by rank, `x_stream` reads the training data as a stream, `x_fails` expects
an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danling.backends.parallel.stages import cut_by_names, sequential_names
from danling.metrics import multiclass_metrics
from danling.runners import Runner
from support.tiny import Points, tiny_config


def sequential(dropout: float) -> nn.Module:
    """Five linear layers of different sizes."""
    layers: list[nn.Module] = []
    for a, b in [(4, 8), (8, 9), (9, 7), (7, 6), (6, 3)]:
        layers += [nn.Linear(a, b), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class Named(nn.Module):
    """A model that is no sequence: modules with names, an output with structure, weights shared by both ends."""

    _tied_weights_keys = ["head.weight"]

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        if getattr(self, "embed", None) is not None:
            x = self.embed(x)
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = x + layer(x)
        if getattr(self, "head", None) is not None:
            x = self.out(nn.functional.linear(self.norm(x), self.head.weight.T))
        return x

    def build_pipeline_model_part(self, stage: int, stages: int) -> nn.Module:
        """Three layers over the stages; the ends keep embedding and head."""
        from copy import deepcopy

        part = deepcopy(self)
        kept = range(len(self.layers) * stage // stages, len(self.layers) * (stage + 1) // stages)
        part.layers = nn.ModuleDict({str(index): part.layers[index] for index in kept})
        if stage:
            part.embed = None
        if stage < stages - 1:
            part.norm = part.head = part.out = None
        return part


class Tokens(nn.Module):
    """Numbers as a sequence of tokens, or a sequence as the mean of its tokens."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Any) -> Any:
        return x.mean(1) if self.mean else x.unsqueeze(-1)


def transformer(dropout: float) -> nn.Module:
    """Two encoder layers between linear ones."""
    layers = [nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True) for _ in range(2)]
    return nn.Sequential(Tokens(False), nn.Linear(1, 8), *layers, Tokens(True), nn.Linear(8, 3))


class Plain(Named):
    """One that cannot be cut by itself."""

    build_pipeline_model_part = None  # type: ignore[assignment]


class Untied(Named):
    """Shares weights between both ends and does not say so."""

    _tied_weights_keys = None  # type: ignore[assignment]


MODELS = {
    "sequential": sequential,
    "named": Named,
    "transformer": transformer,
    "plain": Plain,
    "untied": Untied,
    "none": lambda dropout: None,
}


class Noisy(Points):
    """Input and target both depend on one random draw: whoever reads them apart must draw the same."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        flip = bool(torch.rand(()) < 0.5)
        x, target, place = super().__getitem__(index)
        return (-x, (target + 1) % 3, place) if flip else (x, target, place)


class Stream(torch.utils.data.IterableDataset):
    """The same points one after the other."""

    def __init__(self, points: Points) -> None:
        self.points = points

    def __iter__(self) -> Any:
        return (self.points[index] for index in range(len(self.points)))


class Staged(Runner):
    def __init__(self, config: Any, options: dict[str, Any]) -> None:
        super().__init__(config)
        torch.manual_seed(7 + self.rank * options.get("x_seed", 0))
        self.options = options = {**options, "precision": self.config.precision}
        self.model = MODELS[options.get("x_model", "sequential")](options.get("x_dropout", 0.0))
        dtype = torch.float32 if options.get("precision") else torch.float64
        if self.model is not None:
            self.model.to(dtype)
        if options.get("x_parts") and hasattr(self, "model_parts"):  # stages made by hand instead of a model
            names = sequential_names(self.model, 2)
            self.model, self.model_parts = None, list(cut_by_names(self.model, names, [self.rank]).values())
        self.set_seed()
        self.criterion = nn.CrossEntropyLoss(ignore_index=-1, reduction=options.get("x_reduction", "mean"))
        self.datasets.train = (Noisy if options.get("x_noisy") else Points)(options.get("x_count", 49))
        self.datasets.val = Points(21, seed=1)
        for dataset in self.datasets.values():
            dataset.inputs = dataset.inputs.to(dtype)
            dataset.targets[::5] = -1
        if options.get("x_stream"):
            self.datasets.train = Stream(self.datasets.train)
        self.metrics = multiclass_metrics(num_classes=3, ignore_index=-1) if options.get("x_metrics") else None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seen: list[Any] = []
        self.inferred: list[str] = []
        self.read: set[str] = set()
        self.on("step", lambda runner, event: self.norms.append(float(self.grad_norm or 0)))

    def infer_step(self, data: Any) -> list[Any]:
        self.inferred.append(type(data).__name__)
        return super().infer_step(data)

    def train_step(self, data: Any) -> tuple[Any, Any]:
        self.read.add(type(data).__name__)
        if self.options.get("x_own_step"):
            loss = sum(parameter.sum() for parameter in self.model.parameters())
            self.advance(loss)
            return None, loss
        if self.train_state.micro_step == self.options.get("x_poisoned") and isinstance(data, list):
            data = [data[0] * torch.nan, *data[1:]]
        if isinstance(self.datasets.train, Noisy) and isinstance(data, list):
            self.seen.append([data[0].tolist(), data[1].tolist()])
        prediction, loss = super().train_step(data)
        if loss is not None:
            self.losses.append(loss.item())
        return prediction, loss


def run(overrides: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run, or the error that it ends with where `x_fails` expects one."""
    options = {key: overrides.pop(key) for key in list(overrides) if key.startswith("x_")}
    try:
        found = run_to_its_end(overrides, options, folder)
    except Exception as error:
        if not options.get("x_fails"):
            raise
        return {"error": type(error).__name__, "text": str(error)}
    assert not options.get("x_fails"), "no error was raised"
    return found


def run_to_its_end(overrides: dict[str, Any], options: dict[str, Any], folder: Path) -> dict[str, Any]:
    with Staged(tiny_config(folder / "runs", **overrides), options) as runner:
        if options.get("x_stop", [None])[0] == runner.rank:
            runner.on(
                "step", lambda runner, event: event.global_step == options["x_stop"][1] and runner.request_stop("t")
            )
        if options.get("x_unsized"):
            runner.dataloaders.stream = (batch for batch in runner.dataloaders.val)
            runner.infer("stream", stream=True)
        runner.train()
        entries = runner.infer("val", gather=True)
        own = runner.infer("val")
        streamed = [len(batch) for batch in runner.infer("val", stream=True)]
        return {
            "weights": runner.broadcast_object({k: v.tolist() for k, v in runner.export_state(ema=False).items()}),
            "results": runner.results.rows(),
            "best": runner.best_index,
            "state": {k: v for k, v in runner.train_state.state_dict().items() if k != "positions"},
            "losses": runner.losses,
            "norms": runner.norms,
            "seen": runner.seen,
            "entries": [entry.tolist() for entry in entries],
            "own": len(own),
            "read": sorted(runner.read),
            "streamed": streamed,
            "inferred": sorted(set(runner.inferred)),
            "last": getattr(runner, "pipeline_has_last_stage", True),
            "rate": [group["lr"] for group in runner.optimizer.param_groups],
            "dir": str(runner.dir),
        }


def main(arguments: list[str]) -> None:
    """Run the configurations in the first argument one after the other, in the folder named by the second."""
    folder = Path(arguments[1])
    found = [run(overrides, folder) for overrides in json.loads(arguments[0])]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
