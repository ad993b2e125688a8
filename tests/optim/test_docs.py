"""Every Python example on the pages about optimizers and utilities runs, each page from top to bottom."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["optim.md", "utils.md"])
def test_the_examples_of_a_page_run(page, tmp_path):
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.M | re.S)
    assert len(found) >= 3
    script = tmp_path / "page.py"
    script.write_text("\n".join(textwrap.dedent(code) for _, code in found))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
