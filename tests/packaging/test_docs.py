"""Every Python example in a README and on a page of the docs runs, those of a page in order, from an empty folder."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from support.workspace import ROOT, packages

EXAMPLE = ROOT / "docs" / "examples" / "digits.py"
PAGES = [ROOT / "README.md", *(p.folder / "README.md" for p in packages()), *sorted((ROOT / "docs").glob("*.md"))]
# A block with this mark above it is shown, not run: it needs a run of the reader's, a cluster, or never ends.
SKIP = "<!-- not run -->"


def blocks(page: Path) -> list[str]:
    """Return the runnable blocks of a page; those that are the digits example have a test of their own."""
    found = re.findall(rf"({SKIP}\s*)?^( *)```python\n(.*?)^ *```", page.read_text(), re.M | re.S)
    codes = [textwrap.dedent(code) for skip, _, code in found if not skip and "--8<--" not in code]
    return [code for code in codes if code.strip() != EXAMPLE.read_text().strip()]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.name)
def test_every_readme_has_an_example(package) -> None:
    assert blocks(package.folder / "README.md")


def test_the_front_page_shows_the_example_as_it_is() -> None:
    assert EXAMPLE.read_text().strip() in (ROOT / "README.md").read_text()
