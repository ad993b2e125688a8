"""The short way through a plain step gives the bits of the long one, and steps aside where a step is not plain."""

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
    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = multiclass_metrics(3)
        self.dataloaders.train = batches()
        self.seen = []
        self.on("step", lambda runner, event: runner.seen.append(event.global_step))


class Hooked(Plain):
    def forward(self, model, data):
        return super().forward(model, data)


def run(cls, folder, **settings):
    with cls(tiny_config(folder, epochs=3, log_interval=2, **settings)) as runner:
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
def test_short_and_long_way_give_the_same_bits(tmp_path, settings):
    short, long = run(Plain, tmp_path / "a", **settings), run(Hooked, tmp_path / "b", **settings)
    assert (short[0], long[0]) == (True, False)
    assert all(map(torch.equal, short[1], long[1]))
    assert short[2:] == long[2:]
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
