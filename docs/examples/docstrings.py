"""Texts of very different lengths without padding: which package of the standard library is a docstring from?

Usage:
    python docs/examples/docstrings.py                       # a transformer encoder on packed batches
    python docs/examples/docstrings.py --padded true         # the same model, data and order, padded and masked
"""

import ast
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn

import danling as dl

PACKAGES = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"]


class Config(dl.RunnerConfig):
    epochs: int = 8
    words: int = 2000
    width: int = 64
    padded: bool = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiment, self.score_name = "docstrings", "acc"
        self.optim.type, self.optim.lr = "adamw", 2e-3
        self.scheduler.type, self.scheduler.final_lr = "cosine", 1e-4
        self.dataloader.batch_size = 32


class Classifier(nn.Module):
    def __init__(self, words: int, width: int, padded: bool):
        super().__init__()
        self.padded = padded
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, text: dl.NestedTensor) -> torch.Tensor:
        if not self.padded:
            return self.head(self.encoder(self.embedding(text)).mean(1))
        values, mask = text.tensor, text.mask
        hidden = self.encoder(self.embedding(values), src_key_padding_mask=~mask)
        return self.head((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class Docstrings(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        self.datasets = splits(config.words)
        self.model = Classifier(config.words, config.width, config.padded)
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = dl.metrics.multiclass_metrics(len(PACKAGES), average="micro")


def splits(words: int) -> dict[str, list]:
    """Pairs of text, as word numbers that become a NestedTensor in a batch, and label; every fifth is held out."""
    texts = [(text, label) for label, package in enumerate(PACKAGES) for text in sorted(docstrings(package))]
    counts: dict[str, int] = {}
    for word in (word for text, _ in texts for word in text):
        counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=lambda word: (-counts[word], word))[: words - 1]
    number = {word: index for index, word in enumerate(common, 1)}  # 0 stands for rare words
    data = [(dl.tensor([number.get(word, 0) for word in text]), torch.tensor(label)) for text, label in texts]
    return {"train": [pair for i, pair in enumerate(data) if i % 5], "val": data[::5]}


def docstrings(package: str) -> set[tuple[str, ...]]:
    """The words of every docstring in a package, as long as there are at least five."""
    found = set()
    for file in (Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(tuple(re.findall(r"[a-z]+|[^\sa-z]", (ast.get_docstring(node) or "").lower())))
    return {text for text in found if len(text) >= 5}


if __name__ == "__main__":
    with Docstrings(Config().parse()) as runner:
        runner.train()
