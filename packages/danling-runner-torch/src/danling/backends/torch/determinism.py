"""Deterministic algorithms while any run asks for them; when the last of these ends, everything is as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"

_asking: list[object] = []
_before: tuple[Any, ...] = ()


def ask_for_determinism() -> Callable[[], None]:
    """Switch deterministic algorithms on, and the choices of cuDNN and TF32 off.

    Returns:
        What takes the request back.

    Examples:
        >>> first, second = ask_for_determinism(), ask_for_determinism()
        >>> first()
        >>> torch.are_deterministic_algorithms_enabled()
        True
        >>> second()
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """
    global _before
    backends, request = torch.backends, object()
    if not _asking:
        _before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.benchmark,
            backends.cudnn.deterministic,
            backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32,
            os.environ.get(CUBLAS),
        )
    _asking.append(request)
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    backends.cudnn.benchmark, backends.cudnn.deterministic = False, True
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False

    def take_back() -> None:
        if request in _asking:
            _asking.remove(request)
            if not _asking:
                _put_back()

    return take_back


def _put_back() -> None:
    backends = torch.backends
    torch.use_deterministic_algorithms(_before[0], warn_only=_before[1])
    backends.cudnn.benchmark, backends.cudnn.deterministic = _before[2:4]
    backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = _before[4:6]
    if _before[6] is None:
        os.environ.pop(CUBLAS, None)
