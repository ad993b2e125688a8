"""Says which guarantee a test of the suite belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

_NAME = "_danling_shows"


class Shown(NamedTuple):
    """What a test is about.

    Attributes:
        guarantee: number of the guarantee that it shows.
        scenarios: whose findings it needs.
    """

    guarantee: int
    scenarios: tuple[str, ...]


def shows(guarantee: int, *scenarios: str) -> Callable[[Any], Any]:
    """Decorate a test with what it is about.

    Args:
        guarantee: the test is skipped for an engine that does not claim it.
        scenarios: the test gets what they found in the fixture `found`.

    Example:
        >>> @shows(5, "reference")
        ... def test_sums(): ...
        >>> shown_by(test_sums)
        Shown(guarantee=5, scenarios=('reference',))
    """

    def decorate(test: Any) -> Any:
        setattr(test, _NAME, Shown(guarantee, scenarios))
        return test

    return decorate


def shown_by(test: Any) -> Shown | None:
    """What a test function is about; None for one of somebody else."""
    return getattr(test, _NAME, None)
