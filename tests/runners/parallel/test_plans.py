"""Split models equal unsplit ones: outputs, gradients and 20 updates in float64, on real ranks (see `plans_ranks.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from danling.backends.torch.conformance.forks import Forks


@pytest.fixture(scope="module")
def passes():
    """Runs scenarios on ranks, which all have to pass; torch's own deprecations are errors there."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("PYTHONWARNINGS", "error::FutureWarning")
        forks = Forks("parallel", "plans_ranks:main")

    def run(nproc: int, *scenarios: str) -> None:
        for result in forks.run(nproc, scenarios, timeout=150):
            assert [line for line in result.output.splitlines() if line.startswith("passed")] == [
                f"passed {scenario}" for scenario in scenarios
            ]

    with forks:
        yield run


def test_layers_split_by_heads_and_hidden_units(passes) -> None:
    passes(2, "forward:tensor=2", "train:tensor=2", "checkpoint:tensor=2", "dropout", "ragged")


def test_models_that_split_themselves(passes) -> None:
    passes(2, "styles:tensor=2", "vocabulary", "experts:expert=2")


def test_sequences_of_which_ranks_hold_parts(passes) -> None:
    passes(2, "forward:context=2", "train:context=2", "ring")


@pytest.mark.slow
def test_two_axes_at_once_and_compiled(passes) -> None:
    passes(
        4,
        "forward:tensor=2,context=2",
        "forward:tensor=4",
        "checkpoint:shard=2,tensor=2",
        "compiled:tensor=2,context=2",
    )
