"""The short way through plain steps, on several ranks that each take it or not: the bits of the long one."""

import json

import pytest

from support.ranks import run_ranks

SCRIPT = """
import json, os, sys, torch
from copy import deepcopy
from torch import nn

import danling as dl
from danling.backends.torch import training
from danling.metrics import multiclass_metrics
from support.tiny import tiny_config

folder, settings, case = sys.argv[1], json.loads(sys.argv[2]), None
rank = int(os.environ["RANK"])
G = torch.Generator().manual_seed(rank)
X, Y = torch.randn(48, 6, generator=G), torch.randint(0, 3, (48,), generator=G)
taken = [0]


class Unsized:
    num_workers = 0

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Sized(Unsized):
    def __len__(self):
        return len(self.batches)


def batches():
    pairs = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 48, 4)]
    if case in ("equal", "stop"):
        return Sized(pairs)
    pairs[2 + rank] = (X[8:12], torch.full((4,), -100))  # weight zero
    pairs[4] = [X[16 : 19 - rank], Y[16 : 19 - rank]]
    pairs[6 + rank] = {"input": X[24:28], "target": Y[24:28]}
    if case == "uneven":
        return Sized(pairs[: 12 - 2 * rank])
    return Unsized(pairs[: 12 - 2 * rank])


class Short(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = multiclass_metrics(3)
        self.dataloaders.train = batches()
        self.states, calls = [], [0]
        self.on("log", lambda runner, event: self.states.append(deepcopy(runner.train_state.state_dict())))
        inner = self.criterion

        def criterion(prediction, target):
            calls[0] += 1
            if case == "stop" and calls[0] == 5 and rank == 1:
                self.request_stop("enough")
            return inner(prediction, target)

        if case == "stop":
            self.criterion = criterion


class Long(Short):
    def record_loss(self, loss):
        super().record_loss(loss)


updates = training.plain_updates


def counted(runner, feed):
    train = updates(runner, feed)

    def count(*arguments):
        before = runner.global_step
        try:
            return train(*arguments)
        finally:
            taken[0] += runner.global_step - before

    return count


training.plain_updates = counted
found = {}
for case in sys.argv[3:]:
    for cls in (Short, Long):
        taken[0] = 0
        config = tiny_config(f"{folder}/{case}/{cls.__name__}", epochs=2, log_interval=5, dataloader__batch_size=4, **settings)
        with cls(config) as runner:
            results = runner.train()
            seen = {
                "weights": {name: value.tolist() for name, value in runner.export_state().items()},
                "rows": [] if case == "stop" else [results[epoch] for epoch in (1, 2)],
                "state": runner.train_state.state_dict(),
                "states": runner.states,
            }
        found[f"{case} {cls.__name__}"] = seen, taken[0]
json.dump(found, open(f"{folder}/rank{rank}.json", "w"), default=str)
"""

STACKS = {
    "ddp": {},
    "fsdp2": {"stack": "parallel", "parallel.axes.shard": 2},
}


CASES = ("equal", "uneven", "unsized", "stop")


@pytest.mark.parametrize("stack", STACKS)
def test_short_and_long_way_give_the_same_bits_on_two_ranks(tmp_path, request, stack):
    tests = str(request.config.rootpath / "tests")
    settings = {key.replace(".", "__"): value for key, value in STACKS[stack].items()}
    script = f"import sys; sys.path.insert(0, {tests!r})\n{SCRIPT}"
    run_ranks(script, 2, [str(tmp_path), json.dumps(settings), *CASES], timeout=120)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        taken = {}
        for case in CASES:
            (short, taken[case]), (long, none) = found[f"{case} Short"], found[f"{case} Long"]
            assert short == long, case
            assert none == 0
        # Of 12 windows per epoch the first and the last go the long way, and those with a batch that is no plain pair; a stop
        # that one rank asks for in the fifth window comes after the sixth.
        assert (taken["equal"], taken["stop"]) == (20, 5)
        assert min(taken.values()) >= 4
