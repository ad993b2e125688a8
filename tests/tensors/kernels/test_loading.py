"""Which implementation serves, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from danling.tensors import kernels
from danling.tensors.kernels.schemas import INTERFACE

SMOKE = """
import json, torch
from danling.tensors import kernels as k
offsets, values = torch.tensor([0, 2, 3]), torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
padded = k.pad(values, offsets, None, [2], torch.tensor(-1.0))
assert padded.tolist() == [[[1.0], [2.0]], [[4.0], [-1.0]]]
assert k.unpad(padded, offsets, None, 3).equal(values)
assert k.segment_sum(values, offsets).tolist() == [[3.0], [4.0]]
assert k.segment_max(values, offsets)[1].tolist() == [[1], [0]]
k.segment_logsumexp(values, offsets).sum().backward()
assert values.grad.allclose(k.segment_softmax(values.detach(), offsets))
print(json.dumps(k.info()))
"""


def smoke(**environment: str) -> tuple[dict, str]:
    chosen = {"DANLING_KERNELS": "1", **environment}  # whatever these tests run with themselves
    run = subprocess.run(
        [sys.executable, "-c", SMOKE], capture_output=True, text=True, env={**os.environ, **chosen}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_info_names_libraries_and_reasons() -> None:
    info = kernels.info()
    assert set(info) == {"cpu", "cuda", "reference_only", "reason"}
    for device in ("cpu", "cuda"):
        assert set(info[device]) == {"loaded", "path", "error", "built_with"}
        assert info[device]["loaded"] == (info[device]["error"] is None)
        assert device in info["reason"]
        if info[device]["loaded"]:
            assert info[device]["built_with"]["torch"].startswith("2.")
            assert Path(info[device]["path"]).exists()
    assert info["reference_only"] == (not (info["cpu"]["loaded"] or info["cuda"]["loaded"]))


def test_the_reference_can_be_chosen() -> None:
    info, errors = smoke(DANLING_KERNELS="0")
    assert info["reference_only"]
    assert not errors
    if kernels.info()["cpu"]["path"]:
        assert "DANLING_KERNELS=0" in info["reason"]


@pytest.mark.parametrize("kind", ["missing", "broken", "stale", "half"])
def test_a_missing_library_is_silent_and_an_unfit_one_warns(kind: str, tmp_path: Path) -> None:
    package = Path(kernels.__file__).parents[1]
    copy = tmp_path / "danling" / "tensors"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "*.pyd", "*.dylib", "__pycache__"))
    library = copy / "kernels" / "libdanling_cpu.so"
    mark = f"interface={INTERFACE}".encode()
    if kind == "broken":
        library.write_bytes(b"no library")
    elif kind == "stale":  # whole, but of other schemas
        built = kernels.info()["cpu"]["path"]
        if built is None:
            pytest.skip("no library is built here")
        contents = Path(built).read_bytes()
        assert contents.count(mark) == 1
        library.write_bytes(contents.replace(mark, b"interface=" + b"0" * len(INTERFACE)))
    elif kind == "half":  # of this version, and cut off
        library.write_bytes(b"\x7fELF" + mark)
    info, errors = smoke(PYTHONPATH=str(tmp_path))
    assert info["reference_only"]
    if kind == "missing":
        assert info["cpu"]["error"] == "not built"
        assert not errors
    else:
        assert errors.count("RuntimeWarning") == 1
        assert "could not be loaded" in errors
        assert ("another version" in errors and "--reinstall-package" in errors) == (kind != "half")
        assert info["cpu"]["path"].startswith(str(tmp_path))
