"""What the torch engine keeps in a checkpoint: weights, optimizer and the rest, under the names of the user's module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danling.runners.errors import CheckpointError, ResumeError

from .snapshot import HostBuffers as HostBuffers
from .snapshot import TorchSnapshot as TorchSnapshot
from .snapshot import read_file

MODEL = "model.pt"
EMA = "ema.pt"
OPTIMIZER = "optimizer.pt"
SHARDS = "dcp"
NESTED_UNDER = ("model", "module", "state_dict")


def rank_file(rank: int) -> str:
    """The file of what one rank alone knows.

    Examples:
        >>> rank_file(3)
        'ranks/rank-00003.pt'
    """
    return f"ranks/rank-{rank:05d}.pt"


# --------------------------------------------------------------------- state


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DDP, `torch.compile` and `AveragedModel`."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def clean_name(name: str) -> str:
    """Take the names of wrappers out of a parameter's name.

    Examples:
        >>> clean_name("module._orig_mod.encoder._orig_mod.weight")
        'encoder.weight'
    """
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("module.")


def model_state(model: nn.Module) -> dict[str, Any]:
    """The parameters and buffers of the unwrapped module, under the names the user gave them; not copied."""
    return {name.replace("_orig_mod.", ""): value for name, value in unwrap(model).state_dict().items()}


def load_model_state(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    skip: Iterable[str] = (),
    error: type[Exception] = ResumeError,
    source: Any = "the checkpoint",
) -> None:
    """Load weights into the unwrapped module; changes nothing when they do not fit.

    Args:
        model: wrapped or not.
        state: name → tensor; prefixes of wrappers are stripped when the module does not have them.
        strict: refuse missing and unexpected names; wrong shapes are always refused.
        skip: names to leave as they are.
        error: raised when something does not fit.
        source: named in the message.

    Raises:
        ResumeError: or `error`: lists missing and unexpected names and wrong shapes.
    """
    module = unwrap(model)
    own = module.state_dict()
    known = {name.replace("_orig_mod.", ""): name for name in own}
    skip = set(skip)
    found = {}
    for name, value in strip_prefixes(state, known).items():
        if name not in skip:
            found[known.get(name, name)] = value
    missing = [name for name, full in known.items() if full not in found and name not in skip]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in found.items()
        if name in own
        and isinstance(value, Tensor)
        and isinstance(own[name], Tensor)
        and value.shape != own[name].shape
    ]
    report_misfit(missing if strict else [], unexpected if strict else [], shapes, error=error, source=source)
    module.load_state_dict({name: value for name, value in found.items() if name in own}, strict=False)


def report_misfit(
    missing: list[str], unexpected: list[str], shapes: list[str], *, error: type[Exception], source: Any
) -> None:
    """Raise `error` with what does not fit, if anything does not."""
    found = {"missing": missing, "unexpected": unexpected, "wrong shapes": shapes}
    lines = [f"{what}: {_some(names)}" for what, names in found.items() if names]
    if lines:
        raise error(f"the weights of {source} do not fit the model; " + "; ".join(lines))


def strip_prefixes(state: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
    """Take `module.` and `_orig_mod.` out of the names, unless the names are `known` as they are.

    Examples:
        >>> strip_prefixes({"module.weight": 1})
        {'weight': 1}
    """
    known = set(known)
    if known and all(name in known for name in state):
        return dict(state)
    return {name if name in known else clean_name(name): value for name, value in state.items()}


def optimizer_state(optimizer: Any, names: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """The state of an optimizer, by parameter name instead of by position; not copied.

    Args:
        optimizer: a `torch.optim.Optimizer`.
        names: names and parameters, unwrapped.

    Raises:
        ValueError: the optimizer holds a parameter that has no name.
    """
    order = _positions(optimizer, names)
    state = optimizer.state_dict()
    return {
        "state": {order[index]: value for index, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_optimizer_state(
    optimizer: Any, state: Mapping[str, Any], names: Iterable[tuple[str, Tensor]], *, skip: Iterable[str] = ()
) -> None:
    """Load what `optimizer_state` gave, whatever the order of the parameters is now.

    Args:
        optimizer: of the same class and with the same groups.
        state: saved state.
        names: names and parameters of this run.
        skip: parameters whose state starts afresh.

    Raises:
        ResumeError: the groups hold other parameters; names them.
    """
    order = _positions(optimizer, names)
    place = {name: index for index, name in order.items()}
    current = optimizer.state_dict()["param_groups"]
    saved = state["param_groups"]
    mine = [sorted(order[index] for index in group["params"]) for group in current]
    theirs = [sorted(group["params"]) for group in saved]
    if mine != theirs:
        ours, others = {n for group in mine for n in group}, {n for group in theirs for n in group}
        if ours != others:
            what = f"missing: {_some(sorted(ours - others))}; unexpected: {_some(sorted(others - ours))}"
        else:
            what = f"the parameters are split into {len(theirs)} groups there and into {len(mine)} here, or otherwise"
        raise ResumeError(
            f"the optimizer state of the checkpoint does not fit; {what}. Add 'optimizer' to "
            "checkpoint.exclude_from_loading to start it afresh"
        )
    skip = set(skip)
    groups = [{**theirs, "params": list(ours["params"])} for theirs, ours in zip(saved, current, strict=True)]
    values = {place[name]: value for name, value in state["state"].items() if name not in skip}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _positions(optimizer: Any, names: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    by_id = {id(parameter): clean_name(name) for name, parameter in names}
    order: dict[int, str] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = by_id.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not part of the model; "
                    "its state could not be found again on a resume"
                )
            order[len(order)] = name
    return order


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ------------------------------------------------------------------- reading


def read_payload(directory: str | os.PathLike[str], rank: int = 0) -> dict[str, Any]:
    """Read the components in a checkpoint directory.

    Args:
        directory: of a verified checkpoint.
        rank: whose own file is read.

    Returns:
        `model`, `ema`, `optimizer`, `scheduler`, `grad_scaler`, `rng`, `dataloaders`, ...: those that are there. Of
        sharded components the tensors are read when they are asked for.
    """
    directory = Path(directory)
    payload: dict[str, Any] = {}
    if (directory / SHARDS).is_dir():
        from .dcp import stored_components

        payload |= stored_components(directory)
    for name, key in ((MODEL, "model"), (EMA, "ema")):
        if (directory / name).exists():
            payload[key] = read_file(directory / name)
    tensors = payload.pop("optimizer", {})
    for name in (OPTIMIZER, rank_file(rank)):
        if (directory / name).exists():
            payload |= read_file(directory / name)
    if "scalars" in payload.get("optimizer", {}):
        payload["optimizer"]["tensors"] = tensors
    return payload


def read_weights(source: str | os.PathLike[str], *, ema: bool = True) -> Mapping[str, Tensor]:
    """Read weights from a checkpoint directory, a `.safetensors` file, or a `.pt`, `.pth` or `.bin` state dict.

    Args:
        source: the directory or file.
        ema: prefer the moving average where a checkpoint has one.

    Returns:
        Name → tensor, without the prefixes of wrappers; tensors of a sharded checkpoint are read when asked for.

    Raises:
        CheckpointError: there are no weights in it, or it cannot be read safely.
    """
    path = Path(source)
    if (path / SHARDS).is_dir():
        from .dcp import stored_components

        stored = stored_components(path)
        return stored["ema"] if ema and "ema" in stored else stored["model"]
    if path.is_dir():
        for name in (EMA, MODEL) if ema else (MODEL,):
            if (path / name).exists():
                return strip_prefixes(read_file(path / name))
        raise CheckpointError(f"{path} holds no {MODEL}")
    if path.suffix == ".safetensors":
        from .export import read_safetensors

        return strip_prefixes(read_safetensors(path))
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: weights are read from .safetensors, .pt, .pth and .bin files")
    state = read_file(path)
    for key in NESTED_UNDER:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict of names and tensors")
    return strip_prefixes(state)
