"""Samples of all families: every module here adds its `SAMPLES`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tensors.oracle.sample import Sample


def load() -> dict[str, list[Sample]]:
    """All samples by op name.

    Raises:
        ValueError: Two modules declare the same op.
    """
    found: dict[str, list[Sample]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem == "__init__":
            continue
        for name, samples in import_module(f"tensors.oracle.samples.{path.stem}").SAMPLES.items():
            if name in found:
                raise ValueError(f"{path.stem} declares samples for {name}, which another module has")
            found[name] = samples
    return found
