"""A script of a user, who knows nothing of any engine."""

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling as dl


class Lines(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.criterion = nn.MSELoss()
        x = torch.randn(61, 3, generator=torch.Generator().manual_seed(1))
        self.datasets.train = self.datasets.val = TensorDataset(x, x.sum(1, keepdim=True))


if __name__ == "__main__":
    config = dl.RunnerConfig({"epochs": 2, "optim.type": "sgd", "optim.lr": 0.1, "dataloader.batch_size": 6})
    config.parse()
    with Lines(config) as runner:
        results = runner.train()
        if runner.is_main_process:
            print("engine:", type(runner).__mro__[2].__name__, "stack:", runner.stack, "score:", results.best_score)
    sys.exit(0)
