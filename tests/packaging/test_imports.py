"""`import danling` is light, and what is not installed says how to get it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time


def run(code: str, *flags: str) -> str:
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_danling_loads_neither_torch_nor_a_backend() -> None:
    code = "import danling, json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(run(code))
    heavy = {"torch", "numpy", "chanfig", "torchmetrics", "deepspeed", "accelerate", "rich"}
    assert not heavy & set(modules)
    assert not [name for name in modules if name.startswith("danling.backends")]


def test_import_danling_costs_little(record_property) -> None:
    def median(code: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    cost = median("import danling") - median("pass")
    record_property("import_danling_ms", round(cost * 1e3, 1))
    print(f"import danling: {cost * 1e3:.1f} ms over bare Python (budget 30 ms; reported, not asserted)")


def test_every_public_name_of_the_umbrella_resolves() -> None:
    code = """
import danling
missing = []
for name in danling.__all__:
    try:
        getattr(danling, name)
    except ImportError as error:
        missing.append(f"{name}: {error}")
print("\\n".join(missing))
"""
    lines = [line for line in run(code).splitlines() if line.strip()]
    # A name of a backend that is not part of this environment names the command that brings it.
    assert all("pip install" in line for line in lines), lines


def test_a_missing_piece_names_the_install() -> None:
    code = """
import sys
import importlib.abc

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("danling.tensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import danling
try:
    danling.NestedTensor
except ImportError as error:
    print(error)
"""
    assert "pip install danling-tensors" in run(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = """
import danling
try:
    danling.NestedTensr
except AttributeError as error:
    print(error)
"""
    assert "NestedTensr" in run(code)
