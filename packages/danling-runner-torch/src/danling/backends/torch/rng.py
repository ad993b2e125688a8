"""The random state of a process, captured and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Return the states of Python, NumPy, torch and the device, as tensors and plain values.

    >>> state = capture_rng(torch.device("cpu"))
    >>> first = torch.rand(1), random.random(), np.random.rand()
    >>> restore_rng(state, torch.device("cpu"))
    >>> first == (torch.rand(1), random.random(), np.random.rand())
    True
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type not in ("cpu", "meta"):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture_rng` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "device" in state and device.type not in ("cpu", "meta"):
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
