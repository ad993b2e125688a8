"""Intervals: how often something happens, counted in epochs or in optimizer updates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

UNITS = ("epochs", "steps")
_TEXT = re.compile(r"\s*(\d+)\s*(?:(epoch|step)s?)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Interval:
    """Every `count` epochs or updates; a count of 0 means never.

    Examples:
        >>> Interval.parse("500 steps", "epochs")
        Interval(count=500, unit='steps')
        >>> Interval.parse(2, "epochs")
        Interval(count=2, unit='epochs')
        >>> str(Interval(1, "epochs")), bool(Interval(0, "steps"))
        ('1 epoch', False)
    """

    count: int
    unit: str

    @classmethod
    def parse(cls, value: Any, default_unit: str) -> Interval:
        """Read an interval from a number, or from text such as `"500 steps"` or `"2 epochs"`.

        Args:
            value: the count, with or without its unit; an `Interval` is returned as it is.
            default_unit: `"epochs"` or `"steps"`, for a value without a unit.

        Raises:
            ValueError: for anything that is not a whole number of at least 0 with one of the two units.
        """
        if default_unit not in UNITS:
            raise ValueError(f"the unit of an interval is one of {', '.join(UNITS)}, not {default_unit!r}")
        if isinstance(value, Interval):
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value, default_unit)
        match = _TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(
                f"{value!r} is not an interval: give a whole number, '500 steps' or '2 epochs', or 0 for never"
            )
        unit = f"{match[2].lower()}s" if match[2] else default_unit
        return cls(int(match[1]), unit)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return f"{self.count} {self.unit[:-1] if self.count == 1 else self.unit}"

    def due(self, count: int) -> bool:
        """Return whether `count` epochs or updates (of this unit) complete an interval.

        Examples:
            >>> [step for step in range(7) if Interval(3, "steps").due(step)]
            [3, 6]
        """
        return self.count > 0 and count > 0 and count % self.count == 0
