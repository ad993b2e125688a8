"""Finding and loading the compiled kernel libraries, and telling what came of it."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from danling.tensors.kernels.schemas import INTERFACE

_BUILD = "build it again: `uv sync --reinstall-package danling-tensors` in a checkout, else reinstall the package"
_FOLDER = Path(__file__).parent
_LIBRARIES: dict[str, dict[str, Any]] = {}


def _find(device: str) -> Path | None:
    for suffix in (".so", ".pyd", ".dylib"):
        path = _FOLDER / f"libdanling_{device}{suffix}"
        if path.exists():
            return path
    return None


def _refuse(device: str, state: dict[str, Any], error: str) -> dict[str, Any]:
    warnings.warn(
        f"danling's {device} kernels could not be loaded, slower torch code serves instead: {error}",
        RuntimeWarning,
        stacklevel=3,
    )
    return {**state, "error": error}


def _load(device: str) -> dict[str, Any]:
    state: dict[str, Any] = {"loaded": False, "path": None, "error": None, "built_with": None}
    path = _find(device)
    if path is None:
        state["error"] = "not built"
        return state
    state["path"] = str(path)
    if device == "cuda" and torch.version.cuda is None:
        state["error"] = "this torch is built without CUDA"
        return state
    needs_avx2 = device == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if needs_avx2 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        state["error"] = "this CPU has no AVX2"
        return state
    if os.environ.get("DANLING_KERNELS") == "0":
        state["error"] = "switched off by DANLING_KERNELS=0"
        return state
    # Loading registers the kernels for good, so whether they are the right ones is read from the file.
    if f"interface={INTERFACE}".encode() not in path.read_bytes():
        return _refuse(device, state, f"{path} is damaged, or built for another version of danling-tensors; {_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return _refuse(device, state, str(error))
    state["loaded"] = True
    built_with = ctypes.CDLL(str(path)).danling_built_with
    built_with.restype = ctypes.c_char_p
    state["built_with"] = dict(item.split("=", 1) for item in built_with().decode().split(";"))
    return state


def load() -> None:
    """Load the libraries that lie beside this file and fit the installed torch."""
    for device in ("cpu", "cuda"):
        _LIBRARIES[device] = _load(device)


def info() -> dict[str, Any]:
    """Which compiled kernels are in use, and why.

    Returns:
        A dict with ``cpu`` and ``cuda``, each of ``loaded``, ``path``, ``error`` and ``built_with`` (versions and
        architectures); ``reference_only``, true if no compiled kernel is in use; and ``reason``, the same in words.

    Examples:
        >>> from danling.tensors import kernels
        >>> sorted(kernels.info())
        ['cpu', 'cuda', 'reason', 'reference_only']
    """
    libraries = {device: dict(state) for device, state in _LIBRARIES.items()}
    parts = [
        f"{device}: {'compiled kernels' if state['loaded'] else 'torch reference (' + state['error'] + ')'}"
        for device, state in libraries.items()
    ]
    return {
        **libraries,
        "reference_only": not any(state["loaded"] for state in libraries.values()),
        "reason": "; ".join(parts),
    }
