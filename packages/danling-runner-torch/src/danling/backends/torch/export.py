"""Weights for elsewhere: safetensors with the names of the user's module, tied tensors stored once."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danling.runners.atomic import fsync_dir, fsync_file
from danling.runners.errors import CheckpointError

ALIASES = "aliases"
DTYPES = {
    "fp64": torch.float64,
    "float64": torch.float64,
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def cast_floating(state: Mapping[str, Any], dtype: str | torch.dtype | None) -> dict[str, Any]:
    """Cast the floating tensors of a state dict; integer and boolean buffers stay as they are, tied tensors stay tied.

    Raises:
        ValueError: the dtype is none of fp64, fp32, bf16, fp16.

    Examples:
        >>> state = {"weight": torch.ones(1), "steps": torch.tensor(3)}
        >>> [value.dtype for value in cast_floating(state, "bf16").values()]
        [torch.bfloat16, torch.int64]
    """
    target = as_dtype(dtype)
    if target is None:
        return dict(state)
    done: dict[Any, Tensor] = {}
    result = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            key = _memory(value)
            value = done[key] if key in done else done.setdefault(key, value.to(target))
        result[name] = value
    return result


def write_safetensors(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights atomically.

    Tensors that share memory are stored once, under the first name; the metadata entry `aliases` is a JSON object of
    the other names with the name each stands for.

    Args:
        path: the file to make or replace.
        state: name → tensor.
        dtype: cast floating tensors.
        metadata: further text entries.

    Raises:
        OSError: it cannot be written; what was there stands.
        ValueError: an unknown dtype.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in cast_floating(state, dtype).items():
        if not isinstance(value, Tensor):
            continue
        key = _memory(value)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    entries = {"format": "pt", **(metadata or {}), ALIASES: json.dumps(aliases, sort_keys=True)}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, metadata=entries)
        fsync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; names in its `aliases` share their tensor.

    Raises:
        CheckpointError: it is damaged or no safetensors file.
        FileNotFoundError: there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
        return state | {name: state[target] for name, target in aliases.items()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name in `DTYPES`.

    Raises:
        ValueError: an unknown name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    try:
        return DTYPES[dtype.lower()]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(sorted(DTYPES))}, got {dtype!r}") from None


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.device
