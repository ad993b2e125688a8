"""What a runner adds to an update over the loop one would write by hand, beside other libraries, in one run.

MLP 64-128-10, batches of 32 held in memory, AdamW, one CPU thread. Each turn measures the raw loop and every library once; the
figures are medians over turns of CPU time per update, less that of the raw loop in the same turn. `DANLING_BENCH_DIR`
keeps the JSON.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from danling.metrics import multiclass_metrics
from danling.runners import Runner
from danling.runners.loop import Loop

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]
UPDATES = int(os.environ.get("DANLING_BENCH_UPDATES", "2000"))
TURNS = int(os.environ.get("DANLING_BENCH_TURNS", "5"))
LIMIT = 25.0
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(32, 64, generator=GENERATOR), torch.randint(0, 10, (32,), generator=GENERATOR)) for _ in range(UPDATES)
]


class Held:
    """The batches as a loader; Lightning takes a list for several loaders."""

    def __iter__(self):
        return iter(BATCHES)

    def __len__(self):
        return len(BATCHES)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)


def raw(folder):
    model, criterion, optimizer = build()
    start = time.thread_time()
    for x, y in BATCHES:
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.thread_time() - start


def danling(folder, metrics):
    """The loop from the first window to the last update, log points every 50 updates included."""

    class Bench(Runner):
        def __init__(self, config):
            super().__init__(config)
            self.model, self.criterion, self.optimizer = build()
            self.dataloaders.train = BATCHES
            if metrics:
                self.metrics = multiclass_metrics(10)

    config = {"workspace_root": folder, "steps": UPDATES, "log_interval": 50, "eval_interval": 0}
    with Bench({**config, "checkpoint": {"load_only": True}}) as runner:
        runner.logger.setLevel(logging.ERROR)
        spent = {}
        boundary, run_pass = Loop._boundary, Loop.run_pass

        def timed_pass(self, split):
            spent["start"] = time.thread_time()
            return run_pass(self, split)

        def timed_boundary(self, **kwargs):
            spent["end"] = time.thread_time()
            return boundary(self, **kwargs)

        Loop.run_pass, Loop._boundary = timed_pass, timed_boundary
        try:
            runner.train()
        finally:
            Loop.run_pass, Loop._boundary = run_pass, boundary
    return spent["end"] - spent["start"]


def ignite(folder):
    from ignite.engine import Engine, Events
    from ignite.metrics import RunningAverage

    model, criterion, optimizer = build()

    def update(engine, batch):
        x, y = batch
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    engine = Engine(update)
    RunningAverage(output_transform=lambda loss: loss).attach(engine, "loss")
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=50), lambda engine: engine.state.metrics["loss"])
    start = time.thread_time()
    engine.run(BATCHES, max_epochs=1)
    return time.thread_time() - start


def accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, criterion, optimizer = build()
    model, optimizer = accelerator.prepare(model, optimizer)
    start = time.thread_time()
    for x, y in BATCHES:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return time.thread_time() - start


def lightning(folder, full):
    import lightning as L
    import torchmetrics

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spent = {}

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion, self.built = build()
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

        def training_step(self, batch, index):
            x, y = batch
            prediction = self.model(x)
            loss = self.criterion(prediction, y)
            if full:
                self.accuracy(prediction, y)
                self.log("acc", self.accuracy, on_step=False, on_epoch=True)
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return self.built

        def on_train_start(self):
            spent["start"] = time.thread_time()

        def on_train_end(self):
            spent["end"] = time.thread_time()

    logger = L.pytorch.loggers.TensorBoardLogger(folder) if full else False
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=full,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=50,
        default_root_dir=folder,
    )
    trainer.fit(Module(), Held())
    return spent["end"] - spent["start"]


LOOPS = {
    "danling, loss": lambda folder: danling(folder, False),
    "danling, loss and default metrics": lambda folder: danling(folder, True),
    "ignite, running loss": ignite,
    "accelerate, bare": accelerate,
    "lightning, bare": lambda folder: lightning(folder, False),
    "lightning, metric, TensorBoard, bar": lambda folder: lightning(folder, True),
}


def test_overhead_per_update(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = [name for name in LOOPS if importlib.util.find_spec(name.split(",")[0].split()[0]) is not None]
    base: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for turn in range(TURNS + 1):  # the first warms up
                before = raw(folder)
                times = {name: LOOPS[name](f"{folder}/{turn}-{index}") for index, name in enumerate(names)}
                reference = (before + raw(folder)) / 2
                if turn:
                    base.append(reference / UPDATES * 1e6)
                    for name, spent in times.items():
                        added[name].append((spent - reference) / UPDATES * 1e6)
        finally:
            torch.set_num_threads(threads)
    loop = statistics.median(base)
    rows = {name: statistics.median(values) for name, values in added.items()}
    with capsys.disabled():
        print(f"\n{'raw loop':40s} {loop:9.1f} µs per update")
        for name, value in rows.items():
            print(f"{name:40s} {value:+9.1f} µs  ({value / loop:+.0%})")
    if target := os.environ.get("DANLING_BENCH_DIR"):
        path = Path(target) / "runner-overhead.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"raw": loop, "added": rows, "updates": UPDATES, "turns": TURNS}, indent=1))
    scale = max(1.0, loop / 238.0)  # the limit is for a machine on which the raw loop takes 238 µs
    assert rows["danling, loss and default metrics"] <= 2 * LIMIT * scale
