"""On a GPU the host never waits for the device between log points."""

import pytest
import torch
from torch import nn

import danling as dl
from danling.metrics import multiclass_metrics
from support.tiny import tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class OnDevice(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = multiclass_metrics(3)
        generator = torch.Generator().manual_seed(0)
        inputs, targets = torch.randn(80, 6, generator=generator), torch.randint(0, 3, (80,), generator=generator)
        pairs = zip(inputs.pin_memory().split(4), targets.pin_memory().split(4), strict=True)
        self.dataloaders.train = list(pairs)


@pytest.mark.parametrize(
    "settings", [{}, {"accum_steps": 2}, {"max_grad_norm": 1.0}, {"precision": "bf16"}, {"ema__enabled": True}], ids=str
)
def test_no_update_waits_for_the_device(tmp_path, settings):
    config = tiny_config(tmp_path, epochs=1, log_interval=8, checkpoint__interval=0, **settings)
    total = 20 // settings.get("accum_steps", 1)
    with OnDevice(config) as runner:

        @runner.on("step")
        def watch(runner, event):
            # The first updates allocate, the eighth is followed by a log point and the last by the end of the epoch.
            between = 2 <= event.global_step % 8 < 7 and event.global_step < total
            torch.cuda.set_sync_debug_mode("error" if between else "default")

        try:
            runner.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert runner.global_step == total
