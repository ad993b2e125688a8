"""Says which guarantee a test of the suite belongs to."""

from __future__ import annotations

from typing import Any

import pytest

MARK = "danling_shows"


def shows(guarantee: int, *scenarios: str) -> Any:
    """A mark for a test.

    Args:
        guarantee: its number; the test is skipped for an engine that does not claim it.
        scenarios: whose findings the test gets in the fixture `found`.
    """
    return getattr(pytest.mark, MARK)(guarantee, *scenarios)
