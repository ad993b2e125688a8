"""Sums and weights as they are packed, merged, read and checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sync

if TYPE_CHECKING:
    from .meters import AverageMeter

_NAN = float("nan")


def pack_meters(meters: list[AverageMeter], kind: str, device: torch.device) -> list[Tensor]:
    """Return the tensors that carry sums and weights: kinds, all scalars together, then larger tensors."""
    kinds, scalars, larger = [], [], []
    for meter in meters:
        total, count = meter._last_totals() if kind == "batch" else meter._totals()
        if isinstance(total, Tensor) and total.dim():
            kinds.append(1)
            larger.append(total.to(device, torch.float64))
            larger.append(torch.as_tensor(count, dtype=torch.float64, device=device))
        else:
            kinds.append(0)
            scalars += [total, count]
    return [torch.tensor(kinds, device=device), stack_scalars(scalars, device), *larger]


def unpack_meters(names: list[str], parts: list[list[Tensor]]) -> list[tuple[Any, Any]]:
    """Add up what all ranks sent, in rank order.

    Raises:
        MetricSyncError: tensors of different shapes, or tensors and scalars, under one name.
    """
    totals: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in names]
    for rank, (kinds, scalars, *larger) in enumerate(parts):
        at, rest = 0, iter(larger)
        for entries, is_larger in zip(totals, kinds.tolist(), strict=True):
            if is_larger:
                entries.append((rank, next(rest), next(rest)))
            else:
                entries.append((rank, scalars[at], scalars[at + 1]))
                at += 2
    result = []
    for name, entries in zip(names, totals, strict=True):
        # A rank without data sends the scalar 0 with weight 0 and takes the shape of the others.
        filled = [e for e in entries if e[1].dim() or bool(e[2] > 0) or bool(e[1] != 0)]
        if len({tuple(e[1].shape) for e in filled}) > 1:
            shapes = ", ".join(f"rank {rank}: {tuple(total.shape)}" for rank, total, _ in filled)
            raise sync.MetricSyncError(f"ranks disagree: values of {name!r} have different shapes ({shapes})")
        chosen = filled or entries[:1]
        total, count = chosen[0][1], chosen[0][2]
        for _, other_total, other_count in chosen[1:]:
            total, count = total + other_total, count + other_count
        result.append((total, count))
    return result


def check_description(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a saved state has this description and a format that can be read."""
    if state.get("version") != 1 or "describe" not in state:
        raise ValueError("this is not a state of danling.metrics, or it was written by a newer version")
    if sync.fingerprint(state["describe"]) != sync.fingerprint(mine):
        raise ValueError(sync.explain([state["describe"], mine], ["the saved one", "this one"]))


def stack_scalars(values: list[Any], device: torch.device) -> Tensor:
    """Return numbers and 0-d tensors as one float64 tensor."""
    dtype = float64_on(device)
    if not any(isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=dtype, device=device)
    host = torch.tensor([0.0 if isinstance(v, Tensor) else float(v) for v in values], dtype=dtype, device=device)
    out = list(host.unbind(0))
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            out[i] = value.to(device, dtype)
    return torch.stack(out)


def read_scalars(values: list[Any]) -> list[Any]:
    """Return numbers for all 0-d tensors, copied to the host together, and float64 copies of larger ones."""
    where = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim() == 0]
    out = [v.to(float64_on(v.device), copy=True) if isinstance(v, Tensor) and v.dim() else v for v in values]
    if where:
        device = values[where[0]].device
        stacked = torch.stack([values[i].to(device, float64_on(device)) for i in where])
        for i, number in zip(where, stacked.tolist(), strict=True):
            out[i] = number
    return out


def ratio(total: Any, count: Any) -> Any:
    """Return total / count on the host, NaN where the count is 0."""
    if isinstance(total, Tensor) or isinstance(count, Tensor):
        count = torch.as_tensor(count, dtype=torch.float64, device=total.device if isinstance(total, Tensor) else None)
        return to_host(torch.where(count == 0, math.nan, total / count))
    return total / count if count else _NAN


def as_weight(n: Any) -> float:
    """Return a weight as an int or float, or raise if it is no finite number of at least 0."""
    if isinstance(n, bool) or not isinstance(n, numbers.Real):
        if getattr(n, "ndim", None) == 0 and hasattr(n, "item"):
            n = n.item()
        elif not isinstance(n, bool):
            raise TypeError(f"n must be a number or a tensor with one element, got {type(n).__name__}")
    n = int(n) if isinstance(n, numbers.Integral) else float(n)
    if not n >= 0 or n == math.inf:
        raise ValueError(f"n must be a finite number of at least 0, got {n}")
    return n


def float64_on(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def new_zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the widest float type; not an inference tensor, which could not be changed in place later."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=float64_on(like.device), device=like.device)


def to_host(x: Any) -> Any:
    """Return a number for a 0-d tensor, anything else as it is."""
    return x.item() if isinstance(x, Tensor) and x.dim() == 0 else x


def whole(count: Any, integral: bool) -> Any:
    """Return an integral count as an int."""
    return int(count) if integral and isinstance(count, float) else count


def copied(x: Any) -> Any:
    """Return a copy of a tensor, anything else as it is."""
    return x.clone() if isinstance(x, Tensor) else x
