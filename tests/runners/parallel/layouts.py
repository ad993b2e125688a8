"""Runs of a small language model on whatever layout the configuration names: `layouts.py scenarios.json`, on every rank.

The file maps scenarios to lists of runs, each the overrides of a configuration. All scenarios share one process per rank. What
every rank saw goes to `rank<N>.json` beside the file: scenario → what its last run ended with.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from danling.runners import Runner

VOCABULARY, WIDTH, LENGTH, IGNORED = 11, 8, 6, -100
DRAWS = 0  # seed of the weights, which are no part of a configuration


class Sentences(Dataset):
    """Tokens and the token after each; some targets are ignored, so that batches weigh differently."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].clone()
        self.targets[torch.rand(count, LENGTH, generator=generator) < 0.4] = IGNORED

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.inputs[index], self.targets[index]


class Model(nn.Module):
    """Embedding, two encoder layers, a tied-free head; a buffer that training changes, and state that is no tensor."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout, batch_first=True) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(WIDTH) if norm else None
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.notes = "fresh"

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        if self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x).transpose(1, 2).contiguous()

    def get_extra_state(self) -> str:
        return self.notes

    def set_extra_state(self, state: str) -> None:
        self.notes = state


class Language(Runner):
    """Reads its own section `language`: count, dropout, norm, meta, dtype, poisoned, drift, bound."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.options = {"count": 61, "dropout": 0.0, "norm": False, **self.config.get("language", {})}
        torch.manual_seed(DRAWS + self.rank * 100)  # ranks draw differently and must start equal
        with torch.device("meta" if self.options.get("meta") else "cpu"):
            model = Model(self.options["dropout"], self.options["norm"])
        self.model = model.to(getattr(torch, self.options.get("dtype", "float64")))
        if self.rank == 0:
            self.model.notes = "of rank 0"
        self.set_seed()
        self.criterion = nn.CrossEntropyLoss(ignore_index=IGNORED)
        self.datasets.train = Sentences(self.options["count"])
        self.datasets.val = Sentences(19, seed=1)
        if self.options.get("bound"):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.on("step", lambda runner, event: runner.norms.append(float(runner.grad_norm or 0)))

    def train_step(self, data: Any) -> tuple[Any, Any]:
        if self.train_state.micro_step == self.options.get("poisoned") and self.rank == self.world_size - 1:
            with torch.no_grad():
                hook = self.model.register_forward_hook(lambda module, args, output: output * torch.nan)
            try:
                return super().train_step(data)
            finally:
                hook.remove()
        if self.train_state.micro_step == self.options.get("drift") and self.rank == 1:
            self.unwrap(self.model).head.bias.data.add_(1)
        prediction, loss = super().train_step(data)
        if loss is not None:  # the last stage of a pipeline has it
            self.losses.append(loss.item())
        return prediction, loss


def config_of(root: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "workspace_root": str(root),
        "steps": 20,
        "eval_interval": 10,
        "checkpoint.interval": 10,
        "log": False,
        "seed": 1,
        "dataloader.batch_size": 12,
        "dataloader.drop_last": False,
    }
    for name, value in overrides.items():
        config[name.replace("__", ".")] = value
    if "epochs" in overrides:
        config.pop("steps")
    return config


def run(root: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run; what it ended with. Keys that are not of the configuration: stop, fails, export, seeded, draws."""
    global DRAWS
    overrides = dict(overrides)
    extra = {key: overrides.pop(key, None) for key in ("stop", "fails", "export", "seeded", "draws")}
    DRAWS = extra["draws"] or 0
    try:
        with Language(config_of(root, overrides)) as runner:
            if extra["stop"] is not None:
                runner.on("step", lambda runner, event: event.global_step == extra["stop"] and runner.request_stop("x"))
            if extra["seeded"]:
                runner.save_seed_checkpoint()
            runner.train()
            runner.check_replicas("at the end") if runner.stack == "parallel" else None
            found = {
                "losses": runner.losses,
                "norms": runner.norms,
                "results": runner.results.rows(),
                "best": runner.best_index,
                "state": {k: v for k, v in runner.train_state.state_dict().items() if k != "positions"},
                "weights": {
                    name: value.tolist() for name, value in runner.export_state(ema=False).items() if tensor(value)
                },
                "average": {name: value.tolist() for name, value in runner.export_state().items() if tensor(value)},
                "entries": [entry.tolist() for entry in runner.infer("val", gather=True)],
                "own": len(runner.infer("val")),
                "evaluated": runner.evaluate(["val"]),
                "notes": getattr(runner.unwrap(runner.model), "notes", None),
                "model": type(runner.model).__name__,
                "dir": str(runner.dir),
                "wrappers": sum("FSDP" in type(module).__name__ for module in runner.model.modules()),
                "rate": runner.optimizer.param_groups[0]["lr"],
            }
            if extra["export"]:
                runner.export(root / "model.safetensors")
    except Exception as error:
        if extra["fails"] is None:
            raise
        return {
            "error": type(error).__name__,
            "bases": [cls.__name__ for cls in type(error).__mro__],
            "text": str(error),
        }
    assert extra["fails"] is None, "no error was raised"
    assert not torch.distributed.is_initialized()
    return found


def fill(value: Any, folder: Path) -> Any:
    """A value of a configuration, with `@scenario/name` for a checkpoint of another scenario."""
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    scenario, name = value[1:].split("/")
    return str(next((folder / scenario).glob(f"lin/exp/*/checkpoints/{name}")))


def tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    path = Path(sys.argv[1])
    found = {}
    rank = int(os.environ.get("RANK", "0"))
    for name, runs in json.loads(path.read_text()).items():
        root = path.parent / name
        for overrides in runs:
            overrides = {key: fill(value, path.parent) for key, value in overrides.items()}
            found[name] = run(root, overrides)
    (path.parent / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
