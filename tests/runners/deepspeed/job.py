"""Runs of a small classifier one after the other in the ranks of one world; what each of them did goes to a file per rank.

job.py FOLDER RUNS        RUNS: a list in JSON of configurations, with the keys of `play` beside danling's
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.tiny import Tiny, tiny_config


class Job(Tiny):
    """Starts from other weights on every rank but the first, and records the weights after each update."""

    poisoned: int | None = None
    muted: int | None = None
    watched = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.rank:
            torch.nn.init.normal_(self.model[0].weight)
        self.set_seed()
        self.weights: list[list[float]] = []
        if self.watched:
            self.on("step", lambda runner, event: runner.weights.append(flat_weights(runner)))

    def train_step(self, data: Any) -> tuple[Any, Any]:
        if self.rank == self.world_size - 1 and self.train_state.micro_step == self.poisoned:
            data = (data[0] * torch.nan, *data[1:])
        return super().train_step(data)

    def loss_weight(self, batch: Any) -> float:
        return 0.0 if self.train_state.micro_step // self.accum_steps == self.muted else len(batch[0])


def flat_weights(runner: Any) -> list[float]:
    """All floating weights and buffers in a row; on the main process alone."""
    state = runner.export_state(ema=False)
    return [x for value in state.values() if value.is_floating_point() for x in value.flatten().tolist()]


def play(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train once.

    Args:
        run: `at`: folder of the run below the common one; `stop`: update after which to stop; `poisoned`: micro-step at which
            the last rank gets NaN; `muted`: window without weight; `watched`: whether weights are recorded at each update;
            anything else is configuration.
        folder: common to all runs.
    """
    stop, at = run.pop("stop", None), run.pop("at")
    keys = {key: run.pop(key) for key in ("poisoned", "muted", "watched") if key in run}
    with type("Job", (Job,), keys)(tiny_config(folder / at, **run)) as runner:
        if stop is not None:
            runner.on("step", lambda runner, event: event.global_step == stop and runner.request_stop("test"))
        resumed_at = runner.global_step
        skips: list[int] = []
        runner.on("skip", lambda runner, event: skips.append(event.global_step))
        runner.train()
        buffers = [buffer.tolist() for buffer in runner.unwrap(runner.model).buffers()]
        runner.export(folder / f"{at}.safetensors")
        state = runner.train_state
        return {
            "weights": runner.weights or [flat_weights(runner)],
            "final": flat_weights(runner),
            "losses": runner.losses,
            "seen": runner.seen,
            "results": runner.results.rows(),
            "steps": [state.global_step, state.micro_step, state.skipped],
            "skips": skips,
            "resumed_at": resumed_at,
            "scheduler": runner.scheduler and runner.scheduler.state_dict().get("last_epoch"),
            "lr": runner.optimizer.param_groups[0]["lr"],
            "norm": None if runner.grad_norm is None else float(runner.grad_norm),
            "buffers": buffers,
            "entries": [entry.tolist() for entry in runner.infer("val", gather=True)],
            "problems": len(runner.problems),
            "directory": str(runner.dir),
        }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = [play(run, folder) for run in json.loads(sys.argv[2])]
    import os

    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(outcomes))
