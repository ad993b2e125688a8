"""The torch reference of the kernels serves wherever no library is loaded: the same tests pass on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ON_KERNELS = (
    "sum or mean or max or min or softmax or norm or std or cumsum or pad or cat or view or loss or embedding or select"
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "arguments",
    [
        ["kernels/test_semantics.py", "kernels/test_gradients.py", "test_construction.py", "test_autograd.py"],
        ["oracle", "-k", ON_KERNELS],
    ],
    ids=["kernels", "ops"],
)
def test_without_compiled_kernels(arguments: list[str]) -> None:
    paths = [str(HERE / argument) if (HERE / argument).exists() else argument for argument in arguments]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *paths]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DANLING_KERNELS": "0"}, cwd=HERE.parents[1]
    )
    assert run.returncode == 0, run.stdout[-5000:]
