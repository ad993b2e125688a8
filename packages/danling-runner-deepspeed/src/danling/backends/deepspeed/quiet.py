"""What DeepSpeed warns about and compiles without need, kept from the user by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ON_IMPORT: tuple[tuple[type[Warning], str], ...] = (
    # DeepSpeed and libraries that it imports still decorate functions for TorchScript.
    (DeprecationWarning, r"`torch\.jit\.script"),
)
_IN_STEPS: tuple[tuple[type[Warning], str], ...] = (
    # ZeRO 3 calls collectives by names that torch has replaced.
    (FutureWarning, r"`torch\.distributed\.all_gather_into_tensor` is deprecated"),
    (FutureWarning, r"`torch\.distributed\.reduce_scatter_tensor` is deprecated"),
)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Without the warnings that importing and starting DeepSpeed gives rise to."""
    with warnings.catch_warnings():
        for category, message in (*_ON_IMPORT, *_IN_STEPS):
            warnings.filterwarnings("ignore", message, category)
        yield


def quiet_steps() -> Callable[[], None]:
    """Keep the warnings of DeepSpeed's training steps away; return a function that takes that back."""
    before = list(warnings.filters)
    for category, message in _IN_STEPS:
        warnings.filterwarnings("ignore", message, category)
    added = [entry for entry in warnings.filters if entry not in before]

    def undo() -> None:
        for entry in added:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return undo


@contextmanager
def without_compiling() -> Iterator[None]:
    """Without the extension that DeepSpeed would compile on CPUs for inference, and that training never uses."""
    from deepspeed import ops

    name, names = "__compatible_ops__", vars(ops)  # made on first access, by running compilers
    before = names.get(name)
    names[name] = {}
    try:
        yield
    finally:
        del names[name]
        if before is not None:
            names[name] = before
