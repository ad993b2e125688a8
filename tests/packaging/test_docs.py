"""Every Python example on a page of the docs runs, all of a page in one process, in order."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.workspace import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
# A block with this mark above it is shown, not run: it needs a cluster, a file of the reader's, or never ends.
SKIP = "<!-- not run -->"


def blocks(text: str) -> list[str]:
    found = re.findall(rf"({SKIP}\s*)?^```python\n(.*?)^```", text, re.M | re.S)
    return [code for skip, code in found if not skip and "--8<--" not in code]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=lambda page: page.stem)
def test_examples_run(page, tmp_path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks(page.read_text())))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert result.returncode == 0, f"{page.name}\n{result.stderr}"
