"""The wheel of danling-tensors: with compiled kernels, without a compiler, from the sdist, and under other versions of torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from support.workspace import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
SOURCE = ROOT / "packages" / "danling-tensors"
OLDEST = "2.10.0"
NEWEST = "2.15.0"  # newest on the date in [tool.uv] exclude-newer

SMOKE = """
import json, sys, warnings
import torch  # which itself warns when it is alone, without NumPy
warnings.simplefilter("error")
from danling.tensors import kernels as k

offsets = torch.tensor([0, 2, 2, 5])
values = torch.tensor([[1.0, -1.0], [2.0, 0.0], [4.0, 3.0], [8.0, 3.0], [6.0, 1.0]], requires_grad=True)
parts = values.detach().split([2, 0, 3])
full = [0, 2]
fill = torch.tensor(-9.0)

padded = k.pad(values, offsets, None, [4], fill)
assert padded.shape == (3, 4, 2) and (padded[0, 2:] == -9).all() and padded[2, :3].equal(parts[2])
assert k.unpad(padded, offsets, None, 5).equal(values)
assert k.pad_list(parts, [4], fill).equal(padded)
assert k.pack(parts).equal(values) and torch.ops.danling.pack(parts).equal(values)
assert k.segment_expand(torch.tensor([1, 2, 3]), offsets, 5).tolist() == [1, 1, 3, 3, 3]
assert k.segment_sum(values, offsets).equal(torch.stack([p.sum(0) for p in parts]))
assert k.segment_mean(values, offsets)[full].allclose(torch.stack([parts[i].mean(0) for i in full]))
for name in ("max", "min"):
    value, where = getattr(k, f"segment_{name}")(values, offsets)
    for i in full:
        expected = getattr(parts[i], name)(0)
        assert value[i].equal(expected.values) and where[i].equal(expected.indices)
assert k.segment_softmax(values, offsets).allclose(torch.cat([p.softmax(0) for p in parts]))
assert k.segment_softmax(values, offsets, True).allclose(torch.cat([p.log_softmax(0) for p in parts]))
assert k.segment_logsumexp(values, offsets)[full].allclose(torch.stack([parts[i].logsumexp(0) for i in full]))
assert k.segment_cumsum(values, offsets).allclose(torch.cat([p.cumsum(0) for p in parts]))

(k.segment_softmax(padded.flatten(0, 1)[:5], offsets) * values).sum().backward()
assert values.grad.isfinite().all()
values.grad = None
k.segment_logsumexp(values, offsets)[full].sum().backward()
assert values.grad.allclose(torch.cat([p.softmax(0) for p in parts]))
try:
    k.segment_sum(values, offsets[:-1])
except RuntimeError:
    pass
else:
    raise AssertionError("offsets that do not fit were taken")

from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode() as mode:
    fake = torch.ops.danling.pad(torch.empty(5, 2), torch.empty(4, dtype=torch.int64), None, [4], torch.empty(()))
    assert fake.shape == (3, 4, 2)
print(json.dumps({"torch": torch.__version__, "python": sys.version_info[:2], **k.info()}))
"""


def clean_environment(**more: str) -> dict[str, str]:
    unwanted = ("PYTHONPATH", "VIRTUAL_ENV", "DANLING_KERNELS", "DANLING_BUILD_CUDA")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    return {**environment, "UV_NO_CONFIG": "1", **more}


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean_environment(**more)
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def copy_of_the_sources(folder: Path) -> Path:
    """The package without anything that was built in place."""
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "build", "dist", "__pycache__")
    return Path(shutil.copytree(SOURCE, folder / "danling-tensors", ignore=ignore))


def build(source: Path, out: Path, *what: str, **more: str) -> tuple[Path, str]:
    """Build with this environment's torch and setuptools; return the one file that came out, and what was said."""
    log = run(sys.executable, "-m", "build", "--no-isolation", *what, "-o", out, source, cwd=out.parent, **more)
    (file,) = out.iterdir()
    return file, log


def bare_environment(folder: Path, torch: str, python: str = sys.executable) -> Path:
    """A new virtual environment with that torch and nothing else; return its Python."""
    run(UV, "venv", "-q", "--python", python, folder, cwd=folder.parent)
    interpreter = folder / "bin" / "python"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    newest = settings["exclude-newer"]
    run(UV, "pip", "install", "-q", "--exclude-newer", newest, "--python", interpreter, torch, cwd=folder.parent)
    return interpreter


def smoke(interpreter: Path, wheel: Path) -> dict:
    run(UV, "pip", "install", "-q", "--no-deps", "--reinstall", "--python", interpreter, wheel, cwd=wheel.parent)
    output = run(interpreter, "-c", SMOKE, cwd=wheel.parent)
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"torch"')))


def files_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return build(copy_of_the_sources(folder), folder / "out", "--wheel", DANLING_BUILD_CUDA="0")[0]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory) -> Path:
    import torch

    version = torch.__version__.split("+")[0]
    return bare_environment(tmp_path_factory.mktemp("bare") / "env", f"torch=={version}")


def test_the_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"danling_tensors-[\d.]+-py3-none-\w+\.whl", wheel.name)
    assert "any" not in wheel.name
    names = files_of(wheel)
    assert {"danling/tensors/py.typed", "danling/tensors/kernels/libdanling_cpu.so"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if re.search(r"csrc|setup\.py|\.(cpp|cu|cuh|h)$", name)]
    assert "danling/__init__.py" not in names


def test_the_library_has_no_python_symbol(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = zipfile.ZipFile(wheel).extract("danling/tensors/kernels/libdanling_cpu.so", tmp_path)
    symbols = run("nm", "-D", "--undefined-only", library, cwd=tmp_path)
    assert "aoti_torch" in symbols
    assert not re.findall(r"\bU _?Py\w+", symbols)
    assert not re.findall(r"\bU _ZN?K?(?:2at|3c10)\w+", symbols)  # the C++ interface of torch, which changes


def test_the_wheel_in_a_bare_environment(wheel: Path, interpreter: Path) -> None:
    info = smoke(interpreter, wheel)
    assert info["cpu"]["loaded"], info
    assert not info["reference_only"]
    assert info["cuda"]["error"] == "not built"


def test_a_wheel_built_without_a_compiler(interpreter: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "bin"
    nothing.mkdir()
    # No folder of compilers on PATH, and the variables that name one point nowhere.
    missing = str(nothing / "c++")
    pure, log = build(
        copy_of_the_sources(tmp_path), tmp_path / "out", "--wheel", PATH=str(nothing), CXX=missing, CC=missing
    )
    assert pure.name.endswith("-py3-none-any.whl")
    assert "no C++ compiler" in log
    assert not [name for name in files_of(pure) if name.endswith(".so")]
    info = smoke(interpreter, pure)
    assert info["reference_only"]
    assert info["cpu"]["error"] == "not built"
    assert "torch reference" in info["reason"]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist, _ = build(copy_of_the_sources(tmp_path), tmp_path / "sdist", "--sdist")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("csrc/cuda/copy.cu") for name in archive.getnames())
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again, _ = build(source, tmp_path / "out", "--wheel", DANLING_BUILD_CUDA="0")
    assert again.name == wheel.name
    assert files_of(again) == files_of(wheel)


def test_wishes_that_cannot_be_met_fail_the_build(tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    command = [sys.executable, "setup.py", "build_ext"]
    bad = subprocess.run(
        command, cwd=source, env=clean_environment(DANLING_BUILD_CUDA="yes"), capture_output=True, text=True
    )
    assert bad.returncode != 0
    assert "must be auto, 0 or 1" in bad.stderr
    nowhere = clean_environment(DANLING_BUILD_CUDA="1", CXX=str(tmp_path / "c++"))
    bad = subprocess.run(command, cwd=source, env=nowhere, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "DANLING_BUILD_CUDA=1, but no C++ compiler" in bad.stderr


@pytest.mark.parametrize("torch", [OLDEST, NEWEST])
def test_one_wheel_for_every_torch(wheel: Path, torch: str, tmp_path: Path) -> None:
    info = smoke(bare_environment(tmp_path / "env", f"torch=={torch}"), wheel)
    assert info["torch"].startswith(torch)
    assert info["cpu"]["loaded"], info


def test_cuda_sources_compile_where_nvcc_is(tmp_path: Path) -> None:
    import torch

    if torch.version.cuda is None or shutil.which("nvcc") is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    source = copy_of_the_sources(tmp_path)
    # One architecture is enough to prove that the sources compile.
    built, _ = build(source, tmp_path / "out", "--wheel", DANLING_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert "danling/tensors/kernels/libdanling_cuda.so" in files_of(built)
