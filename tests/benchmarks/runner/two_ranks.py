"""What runners of two ranks add to an update over DDP and FSDP2 driven by hand, on every rank: `two_ranks.py FOLDER`.

Twice each: over the engine alone, and over the engine and one gather of a few numbers, which ranks need to agree on anything.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from danling.metrics import multiclass_metrics
from danling.runners import Runner
from support.paired import CHUNK, UPDATES, Paired, build

ENGINES = {
    "DDP": {"stack": "torch"},
    "FSDP2": {"stack": "parallel", "parallel.axes.shard": 2},
}


def by_hand(engine, meets):
    model, criterion, _ = build()
    if engine == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine, all_ranks = torch.zeros(12, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)

    def train(batches):
        total = 0.0
        for x, y in batches:
            work = dist.all_gather_into_tensor(all_ranks, mine, async_op=True) if meets else None
            loss = criterion(model(x), y)
            if work is not None:
                work.wait()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total

    return train


class Bench(Runner):
    def __init__(self, config, engine, meets):
        super().__init__(config)
        self.model, self.criterion, self.optimizer = build()
        self.dataloaders.train = Paired(partial(by_hand, engine, meets))
        self.metrics = multiclass_metrics(10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = {
        "workspace_root": sys.argv[1],
        "steps": UPDATES,
        "log_interval": CHUNK,
        "eval_interval": 0,
        "progress": False,
        "checkpoint.load_only": True,
        "dataloader.batch_size": 32,
    }
    rows = {}
    for engine, keys in ENGINES.items():
        for meets in (False, True):
            with Bench({**config, **keys}, engine, meets) as runner:
                runner.train()
            pairs = runner.dataloaders.train
            rows[f"{engine} and a gather" if meets else engine] = [*pairs.figures, *pairs.elapsed_figures]
    path = Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(rows))
