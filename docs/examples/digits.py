"""Scanned digits: train a small convolutional network, keep checkpoints, continue where it stopped.

Usage:
    python docs/examples/digits.py                                   # train
    python docs/examples/digits.py --auto_resume true --epochs 12    # go on for two more epochs
    python docs/examples/digits.py --help                            # every option
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import danling as dl
from danling.metrics import multiclass_metrics


class Config(dl.RunnerConfig):
    epochs: int = 10
    width: int = 32

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiment, self.score_name = "digits", "acc"
        self.optim.type, self.optim.lr, self.optim.weight_decay = "adamw", 5e-3, 1e-2
        self.scheduler.type, self.scheduler.final_lr = "cosine", 1e-4
        self.dataloader.batch_size = 32


class Digits(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        self.datasets = splits()
        self.model = nn.Sequential(
            nn.Conv2d(1, config.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(config.width, 2 * config.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8 * config.width, 10),
        )
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = multiclass_metrics(10, average="micro")


def splits():
    """1797 images of 8 by 8 pixels: 1200 to train on, 297 to choose by, 300 to report."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data = [(images[part], torch.tensor(labels)[part]) for part in order.split([1200, 297, 300])]
    return {name: TensorDataset(*part) for name, part in zip(("train", "val", "test"), data, strict=True)}


if __name__ == "__main__":
    with Digits(Config().parse()) as runner:
        runner.train()
