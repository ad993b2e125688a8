"""Training equals a plain loop in one process on the concatenated batch, update by update."""

from __future__ import annotations

from typing import Any

import pytest

from .marks import shows
from .settings import Settings
from .worker import Place, scenario

UPDATES = 20
OPTIMIZERS = {
    "sgd": {"type": "sgd", "lr": 0.1, "momentum": 0.9},
    "adamw": {"type": "adamw", "lr": 1e-2, "eps": 1e-6, "weight_decay": 0.01},
}
CLIP = 0.05  # below most norms here, above some
CASES = {
    f"{optimizer}, accum_steps {accum}{', clipped' if clip else ''}": (optimizer, accum, clip)
    for optimizer in OPTIMIZERS
    for accum in (1, 3)
    for clip in (None, CLIP)
}


def train(place: Place, run: str, **values: Any) -> dict[str, Any]:
    """Train, and tell everything that a reference needs."""
    from .task import Task, weights

    options = {"steps": UPDATES, "log_interval": 1, "evaluate_splits": [], "checkpoint__load_only": True, **values}
    with Task(place.config(run, **options)) as runner:
        start = weights(runner)
        runner.record = True
        runner.train()
        end = weights(runner)
        return {
            "start": start,
            "end": end,
            "updates": runner.updates if place.rank == 0 else [],
            "logged": runner.logged,
            "seen": runner.seen,
            "data_rank": runner.data_rank,
            "counters": (runner.global_step, runner.train_state.skipped, runner.train_state.samples),
        }


@scenario
def reference(place: Place) -> dict[str, Any]:
    """Every combination of optimizer, accumulation and clipping."""
    found = {}
    for name, (optimizer, accum, clip) in CASES.items():
        optim = {f"optim__{key}": value for key, value in OPTIMIZERS[optimizer].items()}
        found[name] = train(place, name, accum_steps=accum, max_grad_norm=clip, **optim)
    return found


@scenario
def uneven_shares(place: Place) -> dict[str, Any]:
    """Data ranks whose loaders hold different numbers of micro-batches."""
    shares = [2 + 2 * (rank % 2) for rank in range(place.settings.nproc)]
    return train(place, "run", steps=None, epochs=2, accum_steps=3, task__shares=shares)


@scenario
def half_precision(place: Place) -> dict[str, Any]:
    """Training in bf16."""
    return train(place, "run", precision="bf16", task__dtype="float32", optim__momentum=0.9)


@scenario
def single_precision(place: Place) -> dict[str, Any]:
    """Training in float32, where the order of additions shows at once."""
    return train(place, "run", task__dtype="float32", optim__momentum=0.9)


def assert_equals_reference(
    found: list[dict[str, Any]], settings: Settings, optimizer: str, clip: float | None
) -> None:
    """Compare weights, losses and norms after every update."""
    import torch

    from .task import Reference, difference, windows

    tolerance = settings.tolerance
    plain = Reference(found[0]["start"], OPTIMIZERS[optimizer], clip)
    dtype = getattr(torch, settings.dtype)
    for index, (numbers, logged) in enumerate(zip(windows(found), found[0]["logged"], strict=True)):
        expected = plain.update(numbers, dtype)
        assert logged["loss"] == pytest.approx(expected["loss"], rel=tolerance), f"loss of update {index + 1}"
        if clip is not None:
            assert logged["grad_norm"] == pytest.approx(expected["grad_norm"], rel=max(tolerance, 1e-6))
        gap = difference(found[0]["updates"][index], expected["weights"])
        assert gap <= tolerance, f"weights after update {index + 1} differ from the reference by {gap:.1e}, relative"


@pytest.mark.parametrize("case", CASES)
@shows(5, "reference")
def test_updates_equal_one_process(found: list[Any], settings: Settings, case: str) -> None:
    """Weights, loss and gradient norm of 20 updates over uneven micro-batches."""
    optimizer, _, clip = CASES[case]
    ranks = [rank[case] for rank in found]
    assert ranks[0]["counters"][:2] == (UPDATES, 0)
    assert_equals_reference(ranks, settings, optimizer, clip)


@shows(5, "uneven_shares")
def test_uneven_shares_of_data(found: list[Any], settings: Settings) -> None:
    """Ranks that run out of data keep the others company and count for nothing."""
    import torch

    from .task import Reference, difference, windows

    plain = Reference(found[0]["start"], {"type": "sgd", "lr": 0.1})
    for numbers in windows(found):
        plain.update(numbers, getattr(torch, settings.dtype))
    assert difference(found[0]["end"], plain.weights()) <= settings.tolerance
    assert found[0]["counters"][2] == sum(map(len, windows(found)))


@shows(8, "reference")
def test_replicas_are_equal_at_the_start_and_at_the_end(found: list[Any]) -> None:
    """Whatever each rank drew, all train one model; and they still do after 20 updates."""
    for case in CASES:
        for when in ("start", "end"):
            states = [rank[case][when] for rank in found]
            for rank, state in enumerate(states):
                assert all(state[name].equal(value) for name, value in states[0].items()), (
                    f"{when}, rank {rank}: {case}"
                )


@shows(4, "reference")
def test_every_sample_is_trained_on_once_per_epoch(found: list[Any]) -> None:
    """Windows of all ranks together hold each sample once, in each whole epoch."""
    from .task import TRAIN, windows

    for case in CASES:
        numbers = [number for window in windows([rank[case] for rank in found]) for number in window]
        for first in range(0, len(numbers) - TRAIN + 1, TRAIN):
            assert sorted(numbers[first : first + TRAIN]) == list(range(TRAIN)), case


@shows(5, "half_precision")
def test_losses_in_bf16(found: list[Any], settings: Settings) -> None:
    """Losses in bf16 stay close to those of the reference."""
    from .task import Reference, windows

    if settings.bf16 is None:
        pytest.skip(f"{settings.claimant} has no bf16")
    plain = Reference(found[0]["start"], {"type": "sgd", "lr": 0.1, "momentum": 0.9})
    for index, (numbers, logged) in enumerate(zip(windows(found), found[0]["logged"], strict=True)):
        expected = plain.update(numbers)["loss"]
        assert logged["loss"] == pytest.approx(expected, rel=settings.bf16), f"loss of update {index + 1}"


@shows(5, "single_precision")
def test_weights_are_bit_for_bit_those_of_a_plain_loop(found: list[Any], settings: Settings) -> None:
    """One process, or two that average, and a loop as one would write it by hand: the same bits after every update."""
    import torch
    from torch.nn.functional import cross_entropy

    from .task import IGNORED, TRAIN, Sequences, build_model

    if not settings.bitwise or settings.nproc > 2:
        pytest.skip(f"{settings.claimant} with {settings.nproc} processes adds in an order of its own")
    model, data = build_model(torch.float32), Sequences(TRAIN, torch.float32)
    model.load_state_dict(found[0]["start"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    shares = [rank["seen"] for rank in sorted(found, key=lambda rank: rank["data_rank"])]
    for index, (expected, *batches) in enumerate(zip(found[0]["updates"], *shares, strict=True)):
        weights = [int((data.targets[batch] != IGNORED).sum()) for batch in batches]
        for batch, weight in zip(batches, weights, strict=True):
            if weight:
                loss = cross_entropy(model(data.inputs[batch]), data.targets[batch], ignore_index=IGNORED)
                (loss * (weight / sum(weights)) if len(batches) > 1 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        wrong = [name for name, value in model.state_dict().items() if not value.equal(expected[name])]
        assert not wrong, f"{wrong} after update {index + 1}"
