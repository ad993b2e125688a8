"""What a replica group that joins gets of one that is ahead. Random states and positions in the data stay a group's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .local import local_tensor
from .payload import load_optimizer_state, optimizer_state

COUNTERS = (
    "global_step", "micro_step", "epoch", "phase", "samples", "tokens", "skipped", "skipped_in_a_row", "row",
    "epoch_ended", "evaluated_step",
)  # fmt: skip


def shared_state(runner: Any) -> dict[str, Any]:
    """Counters, results, weights, average, optimizer, scheduler and scaler, live; of sharded tensors this rank's part."""
    train = runner.train_state.state_dict()
    averages = runner.ema_tensors() if runner.ema is not None else None
    state: dict[str, Any] = {
        "train": {name: train[name] for name in COUNTERS},
        "seed": runner.rng_state.seed,
        "results": runner.results.state_dict(),
        "best_at": runner._best_at,
        "model": {name: local_tensor(value) for name, value in runner.model_tensors().items()},
        "ema": averages and {name: local_tensor(value) for name, value in averages.items()},
        "ema_state": runner.ema.state_dict() if runner.ema is not None and averages is None else None,
        "sides": runner.side_states(),
    }
    if runner.optimizer is not None:
        found = optimizer_state(runner.optimizer, runner.iter_optimizer_named_parameters())
        values = {name: {key: local_tensor(v) for key, v in values.items()} for name, values in found["state"].items()}
        state["optimizer"] = {"state": values, "param_groups": found["param_groups"]}
    return state


def take_state(runner: Any, state: Mapping[str, Any]) -> None:
    """Take what `shared_state` gave in another group, on the rank with the same place in its group."""
    runner.train_state.load_state_dict(state["train"])
    runner.results.load_state_dict(state["results"])
    runner._best_at = state["best_at"]
    _copy(runner.model_tensors(), state["model"])
    sides = state["sides"]
    if runner.ema is not None:
        if state["ema"] is None:
            runner.ema.load_state_dict(state["ema_state"])
        else:
            _copy(runner.ema_tensors(), state["ema"])
        if "ema_updates" in sides:
            runner.ema.n_averaged.copy_(sides["ema_updates"])
    if runner.optimizer is not None:
        parameters = dict(runner.iter_optimizer_named_parameters())
        stored = state["optimizer"]
        values = {
            name: {key: _like(parameters[name], value) for key, value in values.items()}
            for name, values in stored["state"].items()
        }
        load_optimizer_state(runner.optimizer, {**stored, "state": values}, list(parameters.items()))
    for name in ("scheduler", "grad_scaler"):
        if (part := getattr(runner, name)) is not None:
            part.load_state_dict(sides[name])


@torch.no_grad()
def _copy(targets: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    if targets.keys() != values.keys():
        raise RuntimeError(f"replica groups train different models: {sorted(targets.keys() ^ values.keys())}")
    for name, target in targets.items():
        local_tensor(target).copy_(values[name])


def _like(parameter: Tensor, value: Any) -> Any:
    """State of the optimizer for a sharded parameter, sharded like it."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or not (isinstance(value, Tensor) and value.dim()):
        return value
    from torch.distributed.tensor import DTensor

    value = value.to(local_tensor(parameter).device)
    placements = parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
