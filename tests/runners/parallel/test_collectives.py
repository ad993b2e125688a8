"""What ranks exchange in an update: what FSDP2 does by itself, and one exchange of a few numbers."""

import json

from support.ranks import run_ranks

SCRIPT = """
import json, os, sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from danling.runners import Runner

root, rank = sys.argv[1], int(os.environ["RANK"])
torch.manual_seed(0)
DATA = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))


def build():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss()


class Small(Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.criterion = build()
        self.datasets.train = DATA


class Count:
    def __init__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def __enter__(self):
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        found = {event.key: event.count for event in self.profile.key_averages()}
        self.found = {name: found[name] for name in sorted(found) if name.startswith("c10d::")}


config = {"workspace_root": root, "steps": 5, "optim.type": "sgd", "optim.lr": 0.1, "dataloader.batch_size": 4,
          "dataloader.shuffle": False, "eval_interval": 0, "log_interval": 0, "log": False, "progress": False,
          "checkpoint.load_only": True, "stack": "parallel", "parallel.axes.shard": 2}
counts = {}
with Small(config) as runner:
    runner.on("step", lambda runner, event: steps[event.global_step]())
    count = Count()
    steps = {1: lambda: None, 2: count.__enter__, 3: lambda: None, 4: lambda: count.__exit__(None, None, None), 5: int}
    runner.train()
    counts["danling"] = count.found

    model, criterion = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        if step:
            count.__enter__()
        for x, y in [DATA[:4], DATA[4:8]]:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    count.__exit__(None, None, None)
    counts["by hand"] = count.found
json.dump(counts, open(f"{root}/rank{rank}.json", "w"))
"""


def test_an_update_has_one_collective_more_than_fsdp2_makes(tmp_path):
    run_ranks(SCRIPT, 2, [str(tmp_path)], timeout=120)
    for rank in range(2):
        counts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        by_hand, danling = counts["by hand"], counts["danling"]
        assert sum(by_hand.values()) > 4, by_hand
        assert danling == {**by_hand, "c10d::_allgather_base_": by_hand.get("c10d::_allgather_base_", 0) + 2}
