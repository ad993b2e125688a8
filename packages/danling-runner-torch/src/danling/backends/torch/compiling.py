"""`torch.compile` for a run: the model keeps its names, and the compiler's cache can travel with the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danling.runners.errors import ConfigError

_ARTIFACTS = "compile-cache.bin"
_ARGUMENTS = ("backend", "mode", "fullgraph", "dynamic", "options")


def compile_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for `torch.compile` from the `compile` section; what is None is left to torch.

    Raises:
        ConfigError: `mode` together with `options`.

    Example:
        >>> compile_arguments({"enable": True, "backend": "eager", "mode": None, "fullgraph": True})
        {'backend': 'eager', 'fullgraph': True}
    """
    if settings.get("mode") is not None and settings.get("options"):
        raise ConfigError("compile.mode and compile.options exclude each other: a mode is a preset of options")
    return {
        key: dict(settings[key]) if key == "options" else settings[key]
        for key in _ARGUMENTS
        if settings.get(key) is not None and not (key == "options" and not settings[key])
    }


def compile_model(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """Compile `model` in place and return it: parameter names and `isinstance` do not change.

    Args:
        model: the user's module.
        settings: the `compile` section of the configuration.
    """
    optimize_ddp = settings.get("optimize_ddp")
    if optimize_ddp is not None:
        value = {"true": True, "false": False}.get(str(optimize_ddp).lower(), optimize_ddp)
        torch._dynamo.config.optimize_ddp = value
    model.compile(**compile_arguments(settings))
    return model


def load_artifacts(folder: str | os.PathLike | None) -> bool:
    """Fill torch's compiler caches from an earlier run; return whether there was something to load."""
    path = None if folder is None else Path(folder) / _ARTIFACTS
    if path is None or not path.is_file():
        return False
    return torch.compiler.load_cache_artifacts(path.read_bytes()) is not None


def save_artifacts(folder: str | os.PathLike | None) -> Path | None:
    """Write torch's compiler caches of this process for the next run; return the file, or None without any."""
    if folder is None:
        return None
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return None
    path = Path(folder) / _ARTIFACTS
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(saved[0])
    temporary.replace(path)
    return path
