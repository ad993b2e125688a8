"""What one rank wants or suffers, all ranks do together: skip, stop, save. A stopped run goes on as if it had not been."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from .marks import shows
from .settings import Settings
from .training import train
from .worker import Place, scenario

# A run with everything in it that a resume can lose: dropout, augmentation, a schedule, an average, momentum, uneven windows.
STORY: dict[str, Any] = {
    "steps": 12,
    "eval_interval": "4 steps",
    "checkpoint__interval": "2 steps",
    "accum_steps": 2,
    "max_grad_norm": 0.5,
    "optim__type": "adamw",
    "optim__lr": 1e-2,
    "optim__momentum": None,
    "scheduler__type": "cosine",
    "ema__enabled": True,
    "ema__decay": 0.9,
    "task__dropout": 0.2,
    "task__augment": True,
}
STOP_AT = 5


def story(runner: Any) -> dict[str, Any]:
    """Everything that a run and its resumed twin must share, on this rank."""
    import random

    import torch

    from .task import weights

    return {
        "weights": weights(runner),
        "average": weights(runner, ema=True),
        "batches": dict(runner.batches),
        "results": runner.results.rows(),
        "best": runner.best_index,
        "counters": (runner.global_step, runner.micro_step, runner.epoch, runner.train_state.samples),
        "lr": [group["lr"] for group in runner.optimizer.param_groups],
        "draws": (random.random(), *torch.rand(2).tolist()),
    }


def assert_same_story(found: list[Any], expected: list[Any]) -> None:
    """Compare bit for bit, rank by rank; batches of the attempt that was killed are not among `found`."""
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in ("counters", "lr", "results", "best", "draws"):
            assert one[name] == other[name], f"{name} of rank {rank} after a resume"
        for name in ("weights", "average"):
            different = [key for key, value in other[name].items() if not value.equal(one[name][key])]
            assert not different, f"{name} of rank {rank} differ after a resume: {different}"
        for step, batch in one["batches"].items():
            assert batch == other["batches"][step], f"samples and loss of micro-step {step} of rank {rank}"


@scenario
def straight(place: Place) -> dict[str, Any]:
    """The run that nobody stops."""
    from .task import Task

    with Task(place.config(**STORY)) as runner:
        runner.train()
        return story(runner)


def stopped_and_resumed(place: Place, run: str, stop: Any) -> dict[str, Any]:
    from .task import Task

    config = place.config(run, auto_resume=True, **STORY)
    runner = Task(config)
    if place.last:
        runner.on("step", lambda runner, event: event.global_step == STOP_AT and stop(runner))
    code = None
    try:
        runner.train()
    except SystemExit as error:
        code = error.code
    finally:
        runner.close()
    with Task(config) as again:
        resumed_at = again.global_step
        again.batches.update(runner.batches)
        again.train()
        return {"code": code, "stopped": runner.global_step, "resumed": resumed_at, "story": story(again)}


@scenario
def request_on_one_rank(place: Place) -> dict[str, Any]:
    """The last rank asks for a stop."""
    return stopped_and_resumed(place, "run", lambda runner: runner.request_stop("conformance"))


@scenario
def signal_on_one_rank(place: Place) -> dict[str, Any]:
    """The last rank gets SIGTERM."""
    return stopped_and_resumed(place, "run", lambda runner: os.kill(os.getpid(), signal.SIGTERM))


@scenario
def save_asked_by_one_rank(place: Place) -> list[str]:
    """The last rank asks for a save in a run that makes none by itself."""
    from .task import Task

    with Task(place.config(steps=6, evaluate_splits=[], checkpoint__interval=0)) as runner:
        if place.last:
            runner.on("step", lambda runner, event: event.global_step == 3 and runner.request_save())
        runner.train()
        runner.checkpoint_manager.drain()
        runner.barrier()
        return [info.name for info in runner.checkpoint_manager.list()]


@scenario
def poisoned(place: Place) -> dict[float | None, Any]:
    """One micro-batch of the last data rank is NaN, with and without clipping."""
    options: dict[str, Any] = {"steps": 6, "accum_steps": 2, "task__poison": 4, "skip_nonfinite_grad": True}
    return {clip: train(place, f"clip {clip}", max_grad_norm=clip, **options) for clip in (None, 0.5)}


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@shows(7, "poisoned")
def test_a_nonfinite_gradient_on_one_rank_is_skipped_by_all(
    found: list[Any], settings: Settings, clip: float | None
) -> None:
    """The window of the NaN leaves no trace in the weights, and is counted."""
    import torch

    from .task import Reference, difference, windows

    ranks = [rank[clip] for rank in found]
    assert {rank["counters"][:2] for rank in ranks} == {(6, 1)}
    plain = Reference(ranks[0]["start"], {"type": "sgd", "lr": 0.1}, clip)
    for index, numbers in enumerate(windows(ranks)):
        if index != 2:  # micro-step 4 begins the third window of two
            plain.update(numbers, getattr(torch, settings.dtype))
    for rank in ranks:
        assert difference(rank["end"], plain.weights()) <= settings.tolerance


@pytest.mark.parametrize("name", ["request", "signal"])
@shows(7, "request_on_one_rank", "signal_on_one_rank")
def test_a_stop_on_one_rank_stops_all(found: Any, name: str) -> None:
    """All ranks stop after the same update, one window later at most, and save it."""
    ranks = found[name == "signal"]
    assert {rank["code"] for rank in ranks} == {143 if name == "signal" else None}
    stopped = {rank["stopped"] for rank in ranks}
    assert len(stopped) == 1 and stopped <= {STOP_AT, STOP_AT + 1}
    assert {rank["resumed"] for rank in ranks} == stopped


@pytest.mark.parametrize("name", ["request", "signal"])
@shows(3, "request_on_one_rank", "signal_on_one_rank", "straight")
def test_a_stopped_run_is_resumed_bit_for_bit(found: Any, name: str) -> None:
    """Weights, average, losses, results, schedule, samples and random states are those of the run that nobody stopped."""
    assert_same_story([rank["story"] for rank in found[name == "signal"]], found[2])


@shows(7, "save_asked_by_one_rank")
def test_a_save_asked_by_one_rank(found: list[Any]) -> None:
    """One rank's wish for a save is enough; training goes on."""
    for names in found:
        assert {"step-3", "step-4"} & set(names) and "step-6" in names, names
