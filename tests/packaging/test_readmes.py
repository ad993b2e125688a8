"""Every Python example in a README runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.workspace import ROOT, packages

READMES = [ROOT / "README.md", *(package.folder / "README.md" for package in packages())]
EXAMPLE = ROOT / "docs" / "examples" / "digits.py"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_examples_run(readme, tmp_path) -> None:
    examples = [block for block in blocks(readme.read_text()) if block.strip() != EXAMPLE.read_text().strip()]
    assert examples, f"{readme} shows no example"
    for code in examples:
        script = tmp_path / "example.py"
        script.write_text(code)
        result = subprocess.run(
            [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=240
        )
        assert result.returncode == 0, f"{code}\n{result.stderr}"


def test_the_front_page_shows_the_example_as_it_is() -> None:
    assert EXAMPLE.read_text().strip() in (ROOT / "README.md").read_text()
