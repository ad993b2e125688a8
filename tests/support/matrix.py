"""Two models that train under every backend and layout, and the job of one rank that trains, saves and resumes them."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danling.runners import ResumeError, Runner

UPDATES, HALF = 50, 25
VOCABULARY, LENGTH, WIDTH = 12, 8, 16


class ClassesSecond(nn.Module):
    """(batch, steps, classes) → (batch, classes, steps)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def digits() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A classifier of handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    return model, TensorDataset(x[:400], y[:400]), TensorDataset(x[400:460], y[400:460])


def language() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A small transformer that learns which token follows in sequences of a noisy rule."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(VOCABULARY, (460, 1), generator=generator)
    noise = torch.randint(2, (460, LENGTH + 1), generator=generator)
    tokens = (start + 3 * torch.arange(LENGTH + 1) + noise) % VOCABULARY
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    head = nn.Linear(WIDTH, VOCABULARY)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), layer(), layer(), head, ClassesSecond())
    return model, TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


MODELS = {"digits": digits, "language": language}


class Trained(Runner):
    """Trains one of the models and notes the loss of every update."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        torch.manual_seed(11)
        self.model, self.datasets.train, self.datasets.val = MODELS[self.config.task.model]()
        self.set_seed()
        self.criterion = nn.CrossEntropyLoss()
        self.losses: dict[int, float] = {}
        self.on(
            "log", lambda runner, event: runner.losses.update({event.global_step: event.payload["metrics"]["loss"]})
        )


def matrix_config(root: Path | str, model: str, **values: Any) -> dict[str, Any]:
    """A configuration for one run."""
    config: dict[str, Any] = {
        "workspace_root": str(root),
        "task.model": model,
        "steps": UPDATES,
        "log_interval": 1,
        "eval_interval": f"{HALF} steps",
        "checkpoint.interval": f"{HALF} steps",
        "optim.type": "sgd",
        "optim.lr": 0.05,
        "optim.momentum": 0.9,
        "max_grad_norm": 1.0,
        "seed": 1,
        "log": False,
        "progress": False,
        "comm.train_timeout_seconds": 100,
    }
    return {**config, **values}


def train(order: dict[str, Any]) -> dict[str, Any]:
    """Train from the start; where the checkpoint of half time is, losses, and the evaluation at half time."""
    with Trained(matrix_config(order["root"], order["model"], **order["config"])) as runner:
        runner.train()
        rows = runner.results.rows()
        row = rows.get(HALF) or rows[str(HALF)]
        return {"losses": runner.losses, "val": row["val"]["loss"], "half": str(runner.checkpoint_dir / f"step-{HALF}")}


def resume(order: dict[str, Any]) -> dict[str, Any]:
    """Go on from a checkpoint of another layout; where only its weights can be taken, evaluate them."""
    config = matrix_config(order["root"], order["model"], **order["config"])
    try:
        with Trained({**config, "resume": order["source"]}) as runner:
            runner.train()
            return {"kind": "resumed", "losses": runner.losses}
    except ResumeError as error:
        message = str(error)
    with Trained({**config, "workspace_root": order["root"] + "-weights", "pretrained": order["source"]}) as runner:
        return {"kind": "weights", "val": runner.evaluate(["val"])["val"]["loss"], "message": message}


def main(arguments: list[str]) -> None:
    """Run orders one after the other; write what was found by the main process."""
    orders, out = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    found = []
    for order in orders:
        print("===", order, flush=True)
        found.append({"train": train, "resume": resume}[order["do"]](order))
    import os

    if os.environ["RANK"] == "0":
        out.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
