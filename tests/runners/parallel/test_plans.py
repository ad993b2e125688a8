"""Split models equal unsplit ones: outputs, gradients and 20 updates in float64, on real ranks (see `plans_ranks.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("plans_ranks.py")
WARNINGS = {"PYTHONWARNINGS": "error::FutureWarning,error::DeprecationWarning:danling"}


def passes(nproc: int, *scenarios: str, timeout: float = 150.0) -> None:
    for result in run_ranks(SCRIPT, nproc, scenarios, timeout=timeout, env=WARNINGS):
        assert [line for line in result.output.splitlines() if line.startswith("passed")] == [
            f"passed {scenario}" for scenario in scenarios
        ]


def test_layers_split_by_heads_and_hidden_units() -> None:
    passes(2, "forward:tensor=2", "train:tensor=2", "checkpoint:tensor=2", "dropout", "ragged")


def test_models_that_split_themselves() -> None:
    passes(2, "styles:tensor=2", "vocabulary", "experts:expert=2")


def test_sequences_of_which_ranks_hold_parts() -> None:
    passes(2, "forward:context=2", "train:context=2", "ring")


@pytest.mark.slow
def test_two_axes_at_once_and_compiled() -> None:
    passes(
        4,
        "forward:tensor=2,context=2",
        "forward:tensor=4",
        "checkpoint:shard=2,tensor=2",
        "compiled:tensor=2,context=2",
    )
