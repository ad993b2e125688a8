"""What a runner adds to an update over the same engine driven by hand: DeepSpeed under every ZeRO stage, and Accelerate.

As in `test_overhead`: MLP 64-128-10, batches of 32 held in memory, AdamW, one CPU thread, loss meter and default metrics, a log
every 50 updates, in pairs with a twin that the engine trains without danling and that sums its losses. The twin has the engine
settings that danling makes: DeepSpeed, told nothing, clips gradients to a norm of 1. `DANLING_BENCH_DIR` keeps the JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from danling.metrics import multiclass_metrics
from danling.runners import Runner
from support.paired import CHUNK, REFERENCE, UPDATES, Paired, build, plain

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]
LIMIT = 60.0


def deepspeed_by_hand(stage):
    import deepspeed

    model, criterion, optimizer = build()
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def train(batches):
        total = 0.0
        for x, y in batches:
            loss = criterion(engine(x), y)
            engine.backward(loss)
            engine.step()
            total += loss.item()
        return total

    return train


def accelerate_by_hand():
    from accelerate import Accelerator

    accelerator = Accelerator()
    model, criterion, optimizer = build()
    model, optimizer = accelerator.prepare(model, optimizer)

    def train(batches):
        total = 0.0
        for x, y in batches:
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total

    return train


ENGINES = {
    "accelerate": ({"stack": "accelerate"}, accelerate_by_hand),
    **{
        f"deepspeed, ZeRO {stage}": (
            {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}, "dataloader.batch_size": 32},
            lambda stage=stage: deepspeed_by_hand(stage),
        )
        for stage in range(4)
    },
}


class Bench(Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.criterion, self.optimizer = build()
        self.dataloaders.train = Paired(ENGINES[self.config.bench.engine][1])
        self.metrics = multiclass_metrics(10)


def test_overhead_over_engines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = {}
    try:
        alone = Paired()
        twin = plain()
        for index, batch in enumerate(alone):
            twin([batch])
            if index == 10 * CHUNK:
                break
        loop = alone.figures[0]
        for name, (options, _) in ENGINES.items():
            if importlib.util.find_spec(options["stack"]) is None:
                continue
            config = {"workspace_root": str(tmp_path), "steps": UPDATES, "log_interval": CHUNK, "eval_interval": 0}
            config |= {"checkpoint.load_only": True, "bench.engine": name, "progress": False, **options}
            with Bench(config) as runner:
                runner.train()
            rows[name] = runner.dataloaders.train.figures
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\n{'plain loop':24s} {loop:9.1f} µs per update")
        for name, (raw, added) in rows.items():
            print(f"{name:24s} {raw:9.1f} µs by hand, danling {added:+7.1f} µs  ({added / raw:+.0%})")
    if target := os.environ.get("DANLING_BENCH_DIR"):
        path = Path(target) / "runner-engines.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"plain": loop, "engines": rows, "updates": UPDATES}, indent=1))
    scale = max(1.0, loop / REFERENCE)
    assert all(added <= 2 * LIMIT * scale for _, added in rows.values())
