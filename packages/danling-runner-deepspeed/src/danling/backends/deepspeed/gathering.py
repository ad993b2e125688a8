"""Whole weights of a module that ZeRO 3 has split over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from danling.backends.torch.payload import unwrap


def gathered(parameters: Iterable[nn.Parameter], *, modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which split parameters are whole on every rank; all ranks enter it.

    Args:
        parameters: those that are not split are left alone.
        modifier_rank: changes that this rank makes are given to all; without it there must be none.
    """
    from deepspeed.runtime.zero import GatheredParameters

    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return GatheredParameters(split, modifier_rank=modifier_rank, enabled=bool(split))


@torch.no_grad()
def whole_state(model: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The state dict of a module, put together in host memory; all ranks call it.

    One module after the other is gathered, so that no more than its own parameters are whole on a device at any time.

    Args:
        model: wrapped or not.
        keep: whether this rank wants the result; the others get an empty mapping.
    """
    module = unwrap(model)
    state: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own = dict(part.named_parameters(recurse=False, remove_duplicate=False))
        with gathered(own.values()):
            if keep:
                for name, value in own.items():
                    if id(value) not in seen:
                        seen[id(value)] = value.detach().to("cpu", copy=True)
                    state[f"{prefix}.{name}" if prefix else name] = seen[id(value)]
    if not keep:
        return {}
    whole = {}
    for name, value in module.state_dict().items():
        whole[name.replace("_orig_mod.", "")] = state.get(name, value)
    return whole
