"""Runs of `layouts.py` whose model may be the docs' mixture of experts: `plans_runs.py scenarios.json`, on every rank.

A run with `model: experts` uses that, with `model: staged` one that a pipeline cuts; the rest is as in `layouts.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import layouts
import torch
from torch import nn

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "experts.py"
Plain, run_plain = layouts.Model, layouts.run


class Sparse(runpy.run_path(str(EXAMPLE))["Language"]):
    """The example's model, with the state that is no tensor of `layouts.Model`."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__(layouts.VOCABULARY, layouts.WIDTH, 2, 4, 12)
        self.notes = "fresh"

    get_extra_state, set_extra_state = Plain.get_extra_state, Plain.set_extra_state


class ClassesSecond(nn.Module):
    """Where the criterion wants them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous()


class Staged(nn.Sequential):
    """A model that a pipeline cuts by itself."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        layers = [nn.TransformerEncoderLayer(layouts.WIDTH, 2, 12, dropout, batch_first=True) for _ in range(2)]
        head = nn.Linear(layouts.WIDTH, layouts.VOCABULARY)
        super().__init__(nn.Embedding(layouts.VOCABULARY, layouts.WIDTH), *layers, head, ClassesSecond())
        self.notes = "fresh"


MODELS = {"experts": Sparse, "staged": Staged}


def run(root: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    layouts.Model = MODELS.get(overrides.pop("model", None), Plain)
    return run_plain(root, overrides)


def main(arguments: list[str]) -> None:
    layouts.run = run
    sys.argv[1:] = arguments
    layouts.main()


if __name__ == "__main__":
    main(sys.argv[1:])
