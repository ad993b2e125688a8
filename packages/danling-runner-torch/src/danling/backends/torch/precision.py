"""Which number formats a run computes in: autocast around forward and criterion, and the scaler that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from danling.runners.errors import ConfigError

_NAMES = {
    "fp32": None,
    "float32": None,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    # fp8 replaces the matrix products of linear layers; everything around them runs in bf16.
    "fp8": torch.bfloat16,
    "fp8_torchao": torch.bfloat16,
    "fp8_te": torch.bfloat16,
}


@dataclass(frozen=True)
class Precision:
    """What `precision` of the configuration means on one kind of device.

    Attributes:
        name: as configured; `fp32` when nothing is.
        dtype: what autocast computes in, or None for full precision.
        device_type: `cpu`, `cuda`, ...

    Example:
        >>> precision = Precision.resolve("bf16", torch.device("cpu"))
        >>> with precision.autocast():
        ...     torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
        torch.bfloat16
        >>> Precision.resolve(None, torch.device("cpu")).dtype is None
        True
    """

    name: str
    dtype: torch.dtype | None
    device_type: str

    @classmethod
    def resolve(cls, name: str | None, device: torch.device) -> Precision:
        """Read the configured name.

        Raises:
            ConfigError: an unknown name, or fp16 without an accelerator.
        """
        key = "fp32" if name is None else name.lower()
        if key not in _NAMES:
            raise ConfigError(f"precision is {name!r}; it is one of {', '.join(_NAMES)}")
        dtype = _NAMES[key]
        if dtype is torch.float16 and device.type == "cpu":
            raise ConfigError(f"precision {name!r} needs an accelerator, and this run is on the CPU; use bf16 or fp32")
        return cls(key, dtype, device.type)

    @property
    def fp8_backend(self) -> str | None:
        """Return `any`, `torchao` or `te` when linear layers run in fp8, else None."""
        return {"fp8": "any", "fp8_torchao": "torchao", "fp8_te": "te"}.get(self.name)

    def autocast(self) -> AbstractContextManager:
        """Return the context for forward and criterion; it must not enclose backward or the optimizer."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return the gradient scaler that fp16 needs, else None."""
        return torch.amp.GradScaler(self.device_type) if self.dtype is torch.float16 else None
