"""What the parallel runner adds to an update over FSDP2 driven by hand, on every rank: `sharded_ranks.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from danling.metrics import multiclass_metrics
from danling.runners import Runner
from support.paired import CHUNK, UPDATES, Paired, build


def by_hand():
    model, criterion, _ = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(batches):
        total = 0.0
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total

    return train


class Bench(Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.criterion, self.optimizer = build()
        self.dataloaders.train = Paired(by_hand)
        self.metrics = multiclass_metrics(10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = {
        "workspace_root": sys.argv[1],
        "steps": UPDATES,
        "log_interval": CHUNK,
        "eval_interval": 0,
        "progress": False,
    }
    config |= {"checkpoint.load_only": True, "stack": "parallel", "parallel.axes.shard": 2, "dataloader.batch_size": 32}
    with Bench(config) as runner:
        runner.train()
    path = Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json"
    pairs = runner.dataloaders.train
    path.write_text(json.dumps([*pairs.figures, *pairs.elapsed_figures]))
