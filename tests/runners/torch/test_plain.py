"""The short way through a plain step gives the bits of the long one, and steps aside where a step is not plain."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import danling as dl
from danling.backends.torch.plain import FUSED, is_plain
from danling.metrics import multiclass_metrics
from support.tiny import tiny_config

G = torch.Generator().manual_seed(3)
X = torch.randn(40, 6, generator=G)
Y = torch.randint(0, 3, (40,), generator=G)
NOTHING = torch.full((4,), -100)


def batches():
    pairs = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)]
    pairs[3] = (X[12:16], NOTHING)  # weight zero
    pairs[5] = [X[20:23], Y[20:23]]
    pairs[7] = {"input": X[28:32], "target": Y[28:32]}
    return pairs


class Plain(dl.Runner):
    LISTENS = "step"

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = multiclass_metrics(3)
        self.dataloaders.train = batches()
        self.seen = []
        self.on(self.LISTENS, lambda runner, event: runner.seen.append(deepcopy(runner.train_state.state_dict())))


class Rarely(Plain):
    LISTENS = "log"  # nothing between log points, so that several updates pass in one go


class Hooked(Plain):
    def forward(self, model, data):
        return super().forward(model, data)


class HookedRarely(Rarely, Hooked):
    pass


def run(cls, folder, **settings):
    with cls(tiny_config(folder, epochs=3, log_interval=3, **settings)) as runner:
        plain = is_plain(runner)
        results = runner.train()
        state = runner.train_state.state_dict()
        return (
            plain,
            [p.detach().clone() for p in runner.model.parameters()],
            [results[epoch] for epoch in (1, 2, 3)],
            state,
            runner.seen,
        )


@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.1, "ema__enabled": True}, {"skip_nonfinite_grad": True}], ids=str
)
@pytest.mark.parametrize("pair", [(Plain, Hooked), (Rarely, HookedRarely)], ids=["step", "log"])
def test_short_and_long_way_give_the_same_bits(tmp_path, pair, settings):
    short, long = (run(cls, tmp_path / cls.__name__, **settings) for cls in pair)
    assert (short[0], long[0]) == (True, False)
    assert all(map(torch.equal, short[1], long[1]))
    assert short[2:] == long[2:]
    assert len(short[4]) == (27 if pair[0] is Plain else 9)
    assert short[3]["skipped"] == 3  # the batch without a target that counts, once per epoch


@pytest.mark.parametrize("settings", [{"accum_steps": 2}, {"precision": "bf16"}])
def test_not_plain_by_configuration(tmp_path, settings):
    with Plain(tiny_config(tmp_path, epochs=1, **settings)) as runner:
        assert not is_plain(runner)


def test_not_plain_once_a_hook_is_assigned(tmp_path):
    with Plain(tiny_config(tmp_path, epochs=1)) as runner:
        assert is_plain(runner)
        runner.backward = lambda loss: None
        assert not is_plain(runner)


def test_every_hook_that_is_left_out_exists():
    assert all(hasattr(dl.TorchRunner, name) for name in FUSED)


def test_a_loss_that_is_no_scalar(tmp_path):
    with Plain(tiny_config(tmp_path, epochs=1)) as runner:
        runner.criterion = nn.CrossEntropyLoss(reduction="none")
        with pytest.raises(ValueError, match="must be a scalar"):
            runner.train()


class Asking(Rarely):
    """Asks for something in the middle of a pass."""

    def __init__(self, config):
        super().__init__(config)
        self.dataloaders.train = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)]
        self.saved, self.calls, self.ask = [], 0, lambda: None
        self.on("save", lambda runner, event: runner.saved.append(event.global_step))
        inner = self.criterion

        def criterion(prediction, target):
            self.calls += 1
            if self.calls == 5:
                self.ask()
            return inner(prediction, target)

        self.criterion = criterion


def test_requests_are_served_after_the_update_they_fall_into(tmp_path):
    with Asking(tiny_config(tmp_path / "save", epochs=1, log_interval=0, checkpoint__async_enabled=False)) as runner:
        runner.ask = runner.request_save
        runner.train()
        assert runner.saved == [5, 10]
    with Asking(tiny_config(tmp_path / "stop", epochs=1, log_interval=0, checkpoint__async_enabled=False)) as runner:
        runner.ask = lambda: runner.request_stop("enough")
        runner.train()
        assert (runner.global_step, runner.saved) == (5, [5])
        assert runner.train_state.positions["train"]["samples"] == 5


def test_a_loader_without_a_length(tmp_path):
    class Unsized:
        def __iter__(self):
            return iter([(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)])

    with Asking(tiny_config(tmp_path, epochs=2, log_interval=0)) as runner:
        runner.dataloaders.train = Unsized()
        runner.train()
        assert (runner.global_step, runner.epoch, runner.train_state.samples) == (20, 2, 80)


def test_an_error_in_the_middle_leaves_what_was_done_counted(tmp_path):
    with Asking(tiny_config(tmp_path, epochs=1, log_interval=0)) as runner:
        runner.ask = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            runner.train()
        assert (runner.global_step, runner.micro_step, runner.train_state.samples) == (4, 4, 16)
        assert runner.train_state.positions["train"]["samples"] == 4


def test_skips_with_updates_between_them_are_not_in_a_row(tmp_path):
    class Gaps(Rarely):
        def __init__(self, config):
            super().__init__(config)
            pairs = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)]
            pairs[2] = pairs[5] = pairs[9] = (X[:4], NOTHING)
            self.dataloaders.train = pairs

    with Gaps(tiny_config(tmp_path, epochs=1, log_interval=0)) as runner:
        runner.train()
        assert (runner.train_state.skipped, runner.train_state.skipped_in_a_row) == (3, 1)
