"""The configuration page: its tables are the table, and its code runs."""

import re
from pathlib import Path

import pytest

from danling.runners import RunnerConfig
from danling.runners.reference import refresh

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_tables_of_the_page_are_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == refresh(page), "run: python -m danling.runners.reference docs/configuration.md"


def test_every_row_of_describe_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8").replace("\\|", "|")
    for row in RunnerConfig().describe():
        assert f"| `{row.name}` | {row.type} |" in page and f"| {row.meaning} | {row.allowed} |" in page


def test_the_code_of_the_page_runs():
    namespace: dict = {"__name__": "configuration_page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="<!-- keys -->"):
        refresh("# Configuration\n")
