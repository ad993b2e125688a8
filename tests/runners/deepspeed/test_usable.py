"""When `stack: auto` may choose DeepSpeed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import torch

from danling.backends.deepspeed import usable


def test_importing_the_backend_does_not_import_deepspeed() -> None:
    code = "import danling.backends.deepspeed, sys; print('deepspeed' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_without_an_accelerator_the_reason_says_how_to_choose_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert usable() == (False, "no accelerator: choose it with --stack deepspeed")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert usable() == (True, "")


def test_without_deepspeed_the_reason_names_the_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    verdict, reason = usable()
    assert not verdict and "pip install danling[deepspeed]" in reason
