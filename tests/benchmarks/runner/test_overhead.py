"""What a runner adds to an update over the loop one would write by hand, beside other libraries, in one run.

MLP 64-128-10, batches of 32 held in memory, AdamW, one CPU thread. Every loop reads from a loader that, after each 50 updates,
trains a twin of the model on the same 50 batches with the plain loop. The figures are medians over these pairs of the
difference in CPU time per update, so that what else the machine does falls on both alike. `DANLING_BENCH_DIR` keeps the JSON.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from danling.metrics import multiclass_metrics
from danling.runners import Runner
from support.paired import CHUNK, REFERENCE, UPDATES, Paired, build

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]
LIMIT = 25.0


def danling(folder, loader, metrics, bar=False):
    class Bench(Runner):
        def __init__(self, config):
            super().__init__(config)
            self.model, self.criterion, self.optimizer = build()
            self.dataloaders.train = loader
            if metrics:
                self.metrics = multiclass_metrics(10)

    config = {"workspace_root": folder, "steps": UPDATES, "log_interval": CHUNK, "eval_interval": 0, "progress": bar}
    with Bench({**config, "checkpoint": {"load_only": True}}) as runner:
        runner.train()


def ignite(folder, loader):
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
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=CHUNK), lambda engine: engine.state.metrics["loss"])
    engine.run(loader, max_epochs=1)


def accelerate(folder, loader):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, criterion, optimizer = build()
    model, optimizer = accelerator.prepare(model, optimizer)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def lightning(folder, loader, full):
    import lightning as L
    import torchmetrics

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

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

    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=L.pytorch.loggers.TensorBoardLogger(folder) if full else False,
        enable_progress_bar=full,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=CHUNK,
        default_root_dir=folder,
    )
    trainer.fit(Module(), loader)


LOOPS = {
    "danling, loss": lambda folder, loader: danling(folder, loader, False),
    "danling, loss and default metrics": lambda folder, loader: danling(folder, loader, True),
    "danling, loss, default metrics, bar": lambda folder, loader: danling(folder, loader, True, bar=True),
    "ignite, running loss": ignite,
    "accelerate, bare": accelerate,
    "lightning, bare": lambda folder, loader: lightning(folder, loader, False),
    "lightning, metric, TensorBoard, bar": lambda folder, loader: lightning(folder, loader, True),
}


def test_overhead_per_update(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = [name for name in LOOPS if importlib.util.find_spec(name.split(",")[0]) is not None]
    raw, rows = [], {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for index, name in enumerate(names):
                loader = Paired()
                LOOPS[name](f"{folder}/{index}", loader)
                loop, rows[name] = loader.figures
                raw.append(loop)
        finally:
            torch.set_num_threads(threads)
    loop = statistics.median(raw)
    with capsys.disabled():
        print(f"\n{'raw loop':40s} {loop:9.1f} µs per update")
        for name, value in rows.items():
            print(f"{name:40s} {value:+9.1f} µs  ({value / loop:+.0%})")
    if target := os.environ.get("DANLING_BENCH_DIR"):
        path = Path(target) / "runner-overhead.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"raw": loop, "added": rows, "updates": UPDATES}, indent=1))
    scale = max(1.0, loop / REFERENCE)
    assert rows["danling, loss and default metrics"] <= 2 * LIMIT * scale
