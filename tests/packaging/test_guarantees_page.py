"""The page of guarantees names tests that exist."""

import re

from support.workspace import ROOT


def test_every_test_it_names_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 12))
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row.split("|")[3])
        assert files, row
        for name in files:
            assert (ROOT / "tests" / "runners" / name).exists(), name
