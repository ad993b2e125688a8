"""An exponential moving average of weights that are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .local import live_state, local_tensor
from .payload import clean_name


class ShardedEMA:
    """Averages each rank's parts of the weights, by ``ema = decay * ema + (1 - decay) * weights``.

    The first update copies the weights; buffers are copied at every update. Half and bfloat16 weights are averaged in
    float32. There is no second model: to evaluate, the averages change places with the weights.

    Args:
        parts: what this rank holds of the model, in its final form.
        decay: in (0, 1).

    Attributes:
        n_averaged: how many updates went into the average.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> ema = ShardedEMA([layer], 0.9)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(layer.weight, value)
        ...     ema.update(layer)
        >>> with ema.swapped():
        ...     round(layer.weight.item(), 4)
        1.1
        >>> layer.weight.item()
        2.0
    """

    def __init__(self, parts: Sequence[nn.Module], decay: float) -> None:
        self.parts = list(parts)
        self.decay = decay
        self.n_averaged = torch.zeros((), dtype=torch.long)
        self._weights = live_state(self.parts)
        self.averages: dict[str, Tensor] = {}
        for name, value in self._weights.items():
            half = value.dtype in (torch.float16, torch.bfloat16) and name in self._parameters()
            self.averages[name] = (value.float() if half else value).detach().clone()

    def _parameters(self) -> set[str]:
        return {clean_name(name) for part in self.parts for name, _ in part.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def update(self, model: Any = None) -> None:
        """Take the present weights into the average."""
        self._weights = live_state(self.parts)
        first = not int(self.n_averaged)
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        parameters = self._parameters()
        for name, value in self._weights.items():
            average, current = local_tensor(self.averages[name]), local_tensor(value.detach())
            if first or name not in parameters or not (average.is_floating_point() or average.is_complex()):
                average.copy_(current)
            elif average.numel():
                olds, news = kinds.setdefault(average.dtype, ([], []))
                olds.append(average)
                news.append(current.to(average.dtype))
        for olds, news in kinds.values():
            torch._foreach_lerp_(olds, news, 1 - self.decay)
        self.n_averaged += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model hold the averages while the context is open."""
        weights = {name: local_tensor(value.detach()) for name, value in live_state(self.parts).items()}
        kept = {name: value.clone() for name, value in weights.items()}
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(local_tensor(self.averages[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in live_state(self.parts).items():
                    local_tensor(value.detach()).copy_(kept[name])

    def state(self) -> dict[str, Tensor]:
        """The averages, by the names of the whole model."""
        return self.averages
