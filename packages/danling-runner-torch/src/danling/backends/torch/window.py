"""One window: the micro-batches behind an update, and the factor that makes their weighted mean exact.

The weights of all micro-batches, and with several ranks of all ranks, are known before the first forward. Each loss is multiplied
by its factor once and gradients are never rescaled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


class Window:
    """The micro-batches of the update in progress.

    Attributes:
        batches: the micro-batches of this rank.
        weights: of each of them; None where losses are added.
        factors: what each loss is multiplied by; None stands for 1.
        index: micro-batches that are done.
        applied: whether the window ended in an update.
        fillers: from this index on micro-batches only keep ranks in step and count for nothing.
        awaited: what takes in the sums over ranks, while nothing has waited for them; see `settle`.
    """

    __slots__ = (
        "batches", "weights", "factors", "index", "applied", "fillers", "weighs", "samples", "tokens", "awaited",
    )  # fmt: skip

    samples: int
    tokens: Any

    def __init__(self) -> None:
        self.samples, self.tokens = 0, 0
        self.open([None], [1])

    def open(
        self,
        batches: Sequence[Any],
        weights: Sequence[Any],
        *,
        total: Any = None,
        degree: int = 1,
        fillers: int | None = None,
        awaited: Callable[[], None] | None = None,
    ) -> Window:
        """Begin a window.

        Args:
            batches: the micro-batches of this rank.
            weights: of each of them.
            total: sum of the weights over all data ranks; None is the sum of `weights`.
            degree: data ranks that gradients are averaged over.
            fillers: index of the first micro-batch that counts for nothing.
            awaited: finds the sums, which are on their way from other ranks, and calls `weigh`.
        """
        self.batches = batches
        self.weights = weights
        self.index = 0
        self.applied = False
        self.fillers = len(batches) if fillers is None else fillers
        self.awaited = awaited
        if awaited is None:
            self.weigh(total, degree)
        return self

    def settle(self) -> None:
        """Take in the sums over ranks, if that has not been done: factors are known from here on."""
        awaited, self.awaited = self.awaited, None
        if awaited is not None:
            awaited()

    def weigh(self, total: Any, degree: int) -> None:
        """Work out the factors of the losses; see `open`."""
        weights = self.weights
        if weights[0] is None:  # losses are added, over the window and over ranks that average
            self.weighs = True
            self.factors: list[Any] | None = None if degree == 1 else [float(degree)] * len(weights)
            return
        if total is None:
            total = weights[0] if len(weights) == 1 else sum(weights)
        self.weighs = isinstance(total, Tensor) or total > 0
        if degree == 1 and len(weights) == 1:
            self.factors = None
        elif self.weighs:
            factors = [weight * degree / total for weight in weights]
            equal = len(factors) == 1 and type(factors[0]) is float and factors[0] == 1.0
            self.factors = None if equal else factors
        else:
            self.factors = [0.0] * len(weights)

    def open_one(self, batch: Any, weight: Any) -> None:
        """Begin a window of one micro-batch in one process."""
        self.batches = [batch]
        self.weights = [weight]
        self.index = 0
        self.fillers = 1
        self.applied = False
        self.factors = self.awaited = None
        self.weighs = weight is None or isinstance(weight, Tensor) or weight > 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def factor(self) -> Any:
        """What the loss of the micro-batch in hand is multiplied by; None stands for 1."""
        self.settle()
        return None if self.factors is None else self.factors[self.index]

    @property
    def weight(self) -> Any:
        """The weight of the micro-batch in hand; None where losses are added."""
        return self.weights[self.index]

    @property
    def is_last(self) -> bool:
        """Whether the micro-batch in hand ends the window."""
        return self.index == len(self.batches) - 1

    @property
    def is_filler(self) -> bool:
        """Whether the micro-batch in hand counts for nothing."""
        return self.fillers <= self.index < len(self.batches)
