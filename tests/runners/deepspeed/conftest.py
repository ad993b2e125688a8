"""DeepSpeed on the CPU, in this process and in those that tests start."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
