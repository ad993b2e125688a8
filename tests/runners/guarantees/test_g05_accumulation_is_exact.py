"""Guarantee 5: whatever the cut into micro-batches and ranks, an update has the gradients of one big batch."""

import json

import pytest
import torch
from torch import nn

from support.ranks import run_ranks

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
CLASSES = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(6))
IGNORED = CLASSES.clone()
IGNORED[[1, 2, 3, *range(7, 9), 13, *range(20, 24)]] = -100  # whole micro-batches among them
# Micro-batches of each of two ranks, uneven in number and size.
CUTS = [[(0, 7), (7, 9), (9, 13)], [(13, 20), (20, 24)]]
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
CASES = {
    "mean": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "ignored": (nn.CrossEntropyLoss(), IGNORED),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), IGNORED),
    "class probabilities": (nn.CrossEntropyLoss(), torch.softmax(INPUTS[:, :3], 1)),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), torch.softmax(INPUTS[:, :3], 1)),
    "elements": (nn.MSELoss(), INPUTS[:, :3] * 2),
    "function": (lambda prediction, target: nn.functional.cross_entropy(prediction, target), CLASSES),
}
SCRIPT = """
import json, os, sys, torch
sys.path[:0] = {paths!r}
from test_g05_accumulation_is_exact import CASES, CUTS, INPUTS
from support.tiny import Tiny, tiny_config

class Cut(Tiny):
    def __init__(self, config):
        super().__init__(config)
        self.datasets.clear()
        self.model = self.model.double()
        self.criterion, targets = CASES[self.config.tiny.case]
        self.dataloaders.train = [(INPUTS[a:b], targets[a:b]) for a, b in CUTS[self.rank]]

    def train_step(self, data):
        return super(Tiny, self).train_step(data)

    def optimizer_step(self):
        self.gradients = [p.grad.tolist() for p in self.model.parameters()]
        return super().optimizer_step()

found = {{}}
for number, case in enumerate(CASES):
    config = tiny_config(f"{{sys.argv[1]}}/{{number}}", accum_steps=3, epochs=1, optim__type="sgd", tiny__dropout=0.0)
    with Cut({{**config, "tiny.case": case, "checkpoint.load_only": True}}) as runner:
        start = [p.tolist() for p in runner.model.parameters()]
        runner.train()
        found[case] = [start, runner.gradients, runner.results[1]["train"]["loss"], runner.global_step]
json.dump(found, open(f"{{sys.argv[1]}}/rank{{runner.rank}}.json", "w"))
"""


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tests = request.config.rootpath / "tests"
    run_ranks(SCRIPT.format(paths=[str(tests), str(request.path.parent)]), 2, [str(folder)], timeout=200)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one_batch(found, case):
    first, second = (rank[case] for rank in found)
    assert first == second
    start, gradients, reported, updates = first
    criterion, targets = CASES[case]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(torch.tensor(value, dtype=torch.float64))
    loss = criterion(model(INPUTS), targets)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-11, atol=1e-13)
    assert reported == pytest.approx(loss.item() / (len(INPUTS) if case == "sum" else 1), rel=1e-11)
    assert updates == 1
