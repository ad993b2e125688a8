"""Making a DeepSpeed engine in a process group of danling's, and giving everything back that it takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.nn import functional

from danling.runners.errors import ConfigError

from .quiet import quiet_import, without_compiling

_BASE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # an engine configuration needs these


def accelerator() -> Any:
    """The accelerator that DeepSpeed drives: `DS_ACCELERATOR`, or what it finds."""
    with quiet_import():
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()


def is_pipeline(model: Any) -> bool:
    """Whether a model is DeepSpeed's pipeline module; deepspeed is not imported to find out."""
    module = sys.modules.get("deepspeed.runtime.pipe.module")
    return module is not None and isinstance(model, module.PipelineModule)


def check_mapping(mapping: Mapping[str, Any]) -> None:
    """Let DeepSpeed read a mapping for an engine.

    Raises:
        ConfigError: what it objects to, after the key that is to blame.
    """
    error = _objection(mapping)
    if error is None:
        return
    base = {key: mapping[key] for key in _BASE}
    for key in mapping:
        if key not in base and (found := _objection({**base, key: mapping[key]})) is not None:
            raise ConfigError(f"deepspeed.{key}: {found}") from found
    raise ConfigError(f"deepspeed: {error}") from error


def _objection(mapping: Mapping[str, Any]) -> Exception | None:
    with quiet_import():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(dict(mapping))
        except Exception as error:  # of whatever kind: pydantic's, assertions, DeepSpeed's own
            return error
    return None


def start_engine(model: Any, optimizer: Any, mapping: Mapping[str, Any]) -> Any:
    """Make the engine.

    Args:
        model: the user's module, on its device.
        optimizer: that updates it; None lets the engine make one.
        mapping: see `read_settings`.

    Raises:
        ConfigError: DeepSpeed refuses the mapping for this model, optimizer or machine.
    """
    with quiet_import():
        import deepspeed

        with without_compiling():
            try:
                return deepspeed.initialize(model=model, optimizer=optimizer, config=dict(mapping))[0]
            except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
                raise ConfigError(f"deepspeed: {type(error).__name__}: {error}") from error


def announce_local_rank(local_rank: int) -> Callable[[], None]:
    """Set `LOCAL_RANK`, which engines read at any time; return a function that puts it back."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)

    def undo() -> None:
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = before

    return undo


def remember_functions() -> Callable[[], None]:
    """Return a function that puts back the functions of torch that engines of ZeRO 3 replace."""
    before = {name: getattr(functional, name) for name in ("linear", "embedding")}
    return lambda: vars(functional).update(before)


def destroy_groups() -> None:
    """Destroy the process group, and let DeepSpeed forget the groups that it has derived from it."""
    if not dist.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
