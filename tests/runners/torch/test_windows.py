"""Accumulation is the exact weighted mean: the gradients of one big batch."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from danling.backends.torch.weights import WeightRule
from danling.backends.torch.window import Window
from support.tiny import Tiny, tiny_config

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
CLASSES = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(6))
CUTS = [(0, 7), (7, 9), (9, 20)]  # three uneven micro-batches


def ignored():
    targets = CLASSES.clone()
    targets[[1, 2, 3, 7, 8, 15]] = -100  # the second micro-batch has nothing left
    return targets


CASES = {
    "mean": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "ignored": (nn.CrossEntropyLoss(), ignored()),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)), ignored()),
    "class probabilities": (nn.CrossEntropyLoss(), torch.softmax(INPUTS[:, :3], 1)),
    "elements": (nn.MSELoss(), INPUTS[:, :3] * 2),
    "function": (lambda p, t: nn.functional.cross_entropy(p, t), CLASSES),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_batch(tmp_path, case):
    criterion, targets = CASES[case]
    if isinstance(criterion, nn.Module):
        criterion = criterion.double()
    batches = [(INPUTS[a:b], targets[a:b]) for a, b in CUTS]
    found = {}

    class Watched(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.clear()
            self.model = self.model.double()
            self.criterion = criterion
            self.dataloaders.train = batches

        def train_step(self, data):
            return super(Tiny, self).train_step(data)

        def optimizer_step(self):
            found["gradients"] = [p.grad.clone() for p in self.model.parameters()]
            return super().optimizer_step()

    with Watched(tiny_config(tmp_path, accum_steps=3, steps=1, tiny__dropout=0.0, optim__type="sgd")) as runner:
        start = [p.detach().clone() for p in runner.model.parameters()]
        runner.train()
        assert (runner.global_step, runner.micro_step, runner.train_state.samples) == (1, 3, 20)
        reported = runner.results[1]["train"]["loss"]
    model = runner.model
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    loss = criterion(model(INPUTS), targets)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, want in zip(found["gradients"], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert reported == pytest.approx(loss.item() / (20 if case == "sum" else 1), rel=1e-12)


def test_a_window_of_weight_zero_is_skipped(tmp_path):
    nothing = torch.full((5,), -100)
    batches = [(INPUTS[:5].float(), nothing), (INPUTS[5:10].float(), CLASSES[5:10])]

    class Partly(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.clear()
            self.dataloaders.train = batches

        def train_step(self, data):
            return super(Tiny, self).train_step(data)

    with Partly(tiny_config(tmp_path, epochs=1)) as runner:
        runner.train()
        assert runner.global_step == 1 and runner.train_state.skipped == 1
        assert all(torch.isfinite(p).all() for p in runner.model.parameters())
        assert torch.isfinite(torch.tensor(runner.results[1]["train"]["loss"]))


def test_loss_weights_in_batches_come_first():
    rule = WeightRule(nn.CrossEntropyLoss())
    assert rule({"input": INPUTS, "target": CLASSES, "loss_weight": torch.tensor([1.0, 0.5])}) == 1.5
    with pytest.raises(ValueError, match="give it to all or to none"):
        rule({"input": INPUTS, "target": CLASSES})


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "3", torch.tensor(-2.0), torch.ones(3)], ids=str)
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(
        ValueError, match="a loss_weight is a number of at least 0, a tensor without dimensions or None"
    ):
        WeightRule(nn.CrossEntropyLoss(), lambda batch: weight)((INPUTS, CLASSES))


def test_weights_of_ones_own():
    for weight, used in ((2, 2), (0.5, 0.5), (np.int64(3), 3), (torch.tensor(1.5), 1.5), (None, None)):
        assert WeightRule(nn.CrossEntropyLoss(), lambda batch, weight=weight: weight)((INPUTS, CLASSES)) == used


def test_an_overridden_weight_is_used(tmp_path):
    class Own(Tiny):
        def loss_weight(self, batch):
            return 2.5

    with Own(tiny_config(tmp_path, epochs=1)) as runner:
        assert runner.weigh((INPUTS, CLASSES)) == 2.5
        runner.train()


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_factors_sum_to_the_degree_over_all_ranks(degree):
    window = Window()
    shares = [[3, 4], [0, 1], [2, 2], [5, 1], [1, 1]][:degree]
    total = sum(sum(share) for share in shares)
    found = [list(window.open([0, 0], share, total=total, degree=degree).factors) for share in shares]
    assert sum(sum(factors) for factors in found) == pytest.approx(degree)


def test_an_optimizer_of_ones_own_and_a_step_outside_the_loop(tmp_path):
    class Own(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    config = tiny_config(tmp_path)
    del config["optim.type"], config["optim.lr"]
    with Own(config) as runner:
        batch = next(iter(runner.dataloaders.train))
        before = runner.model[0].weight.clone()
        runner.train_step(batch)
        assert runner.global_step == 1 and not torch.equal(before, runner.model[0].weight)
        runner.evaluate()
        with pytest.raises(RuntimeError, match="belongs to training"):
            runner.mode = "evaluate"
            runner.step()


def test_one_process_is_bitwise_a_plain_loop(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2, tiny__val=0, checkpoint__load_only=True)) as runner:
        model = __import__("copy").deepcopy(runner.model)
        state = torch.get_rng_state()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        plain = []
        for epoch in range(2):
            runner.datasamplers.train.set_epoch(epoch)
            for x, y, _ in runner.dataloaders.train:
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                plain.append(loss.item())
        torch.set_rng_state(state)
        runner.train()
    assert runner.losses == plain
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), runner.model.parameters(), strict=True))
