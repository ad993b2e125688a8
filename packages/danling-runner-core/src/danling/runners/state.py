"""What a run remembers: counters, positions, restarts and the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class RunnerMode(StrEnum):
    """What a runner is doing; setting `runner.mode` applies it to the model and to its EMA copy.

    >>> RunnerMode("train") is RunnerMode.TRAIN, str(RunnerMode.INFER)
    (True, 'infer')
    """

    TRAIN = "train"
    EVALUATE = "evaluate"
    INFER = "infer"


class _State:
    """Plain data in, plain data out: what a checkpoint stores."""

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as a mapping of plain values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the fields that `state` has; the others keep their value."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            if item.name in state:
                setattr(self, item.name, state[item.name])


@dataclass
class TrainState(_State):
    """How far training has come.

    Attributes:
        global_step: updates applied.
        micro_step: micro-batches run.
        epoch: complete epochs.
        phase: `train`; `evaluate` while the evaluation of the current boundary is not finished; `done`.
        positions: for each train split of the epoch in progress how much of it is consumed.
        samples: samples seen by all ranks.
        tokens: tokens seen by all ranks, where batches tell.
        skipped: updates skipped because of non-finite gradients or of windows without weight.
        skipped_in_a_row: skipped since the last applied update.
        row: metrics of finished train passes that no result row holds yet.
        epoch_ended: whether the boundary in progress ends an epoch.
        evaluated_step: `global_step` of the last evaluation, -1 before the first.

    >>> state = TrainState(global_step=3)
    >>> other = TrainState()
    >>> other.load_state_dict(state.state_dict())
    >>> other == state
    True
    """

    global_step: int = 0
    micro_step: int = 0
    epoch: int = 0
    phase: str = "train"
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    epoch_ended: bool = False
    evaluated_step: int = -1


@dataclass
class ElasticState(_State):
    """What changes from one attempt to the next.

    Attributes:
        restart_count: restarts that the launcher has done before this process.
        world_size: processes of this attempt.
    """

    restart_count: int = 0
    world_size: int = 1


@dataclass
class RNGState(_State):
    """The seed in force; generator states themselves are captured at each save, per rank.

    Attributes:
        seed: what the configuration gave, or what was drawn.
        bias: what this process adds to it.
    """

    seed: int | None = None
    bias: int = 0


@dataclass
class RunnerState:
    """The three states of a runner: training, attempt, randomness."""

    train: TrainState = field(default_factory=TrainState)
    elastic: ElasticState = field(default_factory=ElasticState)
    rng: RNGState = field(default_factory=RNGState)

    def state_dict(self) -> dict[str, Any]:
        """Return all three as plain values."""
        return {"train": self.train.state_dict(), "elastic": self.elastic.state_dict(), "rng": self.rng.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore counters and seed; the attempt's own facts stay."""
        self.train.load_state_dict(state["train"])
        self.rng.seed = state.get("rng", {}).get("seed", self.rng.seed)
