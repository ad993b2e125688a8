"""Wheels of everything, and of one piece alone, installed into bare environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from support.workspace import ROOT, packages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]


def uv(*args: str, **kwargs) -> str:
    environment = {**os.environ, "UV_EXCLUDE_NEWER": SETTINGS["exclude-newer"], "DANLING_BUILD_CUDA": "0"}
    environment.pop("VIRTUAL_ENV", None)
    result = subprocess.run([UV, *args], capture_output=True, text=True, env=environment, **kwargs)
    assert result.returncode == 0, f"uv {' '.join(args)}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Build every wheel of the workspace from its published metadata alone."""
    folder = tmp_path_factory.mktemp("wheels")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(SETTINGS["constraint-dependencies"]))
    uv("build", "--all-packages", "--wheel", "--no-sources", "-o", str(folder), cwd=ROOT)
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.name}  {wheel.stat().st_size / 1024:.0f} KiB")
    return folder


def environment(tmp_path: Path, wheels: Path, *requirements: str) -> Path:
    """Install the requirements into a new virtual environment that holds nothing else; return its Python."""
    uv("venv", "-q", "--python", sys.executable, str(tmp_path / "env"))
    python = tmp_path / "env" / "bin" / "python"
    uv(
        "pip", "install", "-q", "--python", str(python), "--find-links", str(wheels),
        "--constraint", str(wheels / "constraints.txt"), *requirements,
        cwd=tmp_path,
    )  # fmt: skip
    return python


def check(python: Path, code: str, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=cwd, env=clean, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_package_yields_one_wheel_with_its_own_files(wheels: Path) -> None:
    names: dict[str, str] = {}
    for package in packages():
        found = list(wheels.glob(f"{package.name.replace('-', '_')}-{package.project['version']}-*.whl"))
        assert len(found) == 1, f"{package.name}: {found}"
        for name in zipfile.ZipFile(found[0]).namelist():
            if ".dist-info/" in name:
                continue
            assert name not in names, f"{name} is in {names[name]} and {package.name}"
            names[name] = package.name
            assert not re.search(r"\.(cpp|cu|cuh|h)$", name), f"{package.name} ships the source {name}"
    assert "danling/__init__.py" in names and names["danling/__init__.py"] == "danling"


ALONE = {
    "danling-tensors": """
import torch
from danling.tensors import NestedTensor
x = NestedTensor([torch.ones(2, 3), torch.ones(4, 3)])
assert x.tensor.shape == (2, 4, 3) and x.sum().item() == 18
""",
    "danling-metrics": """
import torch
from danling.metrics import multiclass_metrics
m = multiclass_metrics(num_classes=3)
m.update(torch.eye(3), torch.arange(3))
assert m.average()["acc"] == 1.0
""",
    "danling-optim": """
import torch
from danling.optim import OPTIMIZERS, SCHEDULERS, OptimizerStep
layer = torch.nn.Linear(2, 1)
optimizer = OPTIMIZERS.build(layer.parameters(), type="adamw", lr=0.1)
scheduler = SCHEDULERS.build(optimizer, type="cosine", total_steps=10)
layer(torch.ones(1, 2)).sum().backward()
assert OptimizerStep(optimizer, scheduler).step().stepped
""",
    "danling-runner-core": """
import importlib.util, sys, tempfile, os
assert importlib.util.find_spec("torch") is None
from danling.runners import RunnerConfig, Results
import danling.utils
config = RunnerConfig()
config.epochs = 3
config.validate()
path = os.path.join(tempfile.mkdtemp(), "x.json")
assert danling.utils.load(danling.utils.save({"a": 1}, path)) == {"a": 1}
""",
}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_one_piece_alone(name: str, wheels: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, wheels, name)
    installed = uv("pip", "list", "--python", str(python), cwd=tmp_path)
    assert re.findall(r"^danling\S*", installed, re.M) == [name]
    check(python, ALONE[name], tmp_path)


def test_everything_together(wheels: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, wheels, "danling")
    check(python, "import danling, sys; assert 'torch' not in sys.modules", tmp_path)
    for name, code in ALONE.items():
        if name != "danling-runner-core":
            check(python, code, tmp_path)
    check(python, "import danling as dl; dl.NestedTensor, dl.Runner, dl.RunnerConfig, dl.AverageMeter", tmp_path)
    stacks = subprocess.run([python.with_name("danling"), "stacks"], capture_output=True, text=True, cwd=tmp_path)
    assert stacks.returncode == 0, stacks.stderr
    assert "torch" in stacks.stdout and "danling-runner-torch" in stacks.stdout
    # A backend that is not installed names what brings it.
    code = """
import danling as dl
try:
    dl.DeepSpeedRunner
except ImportError as error:
    print(error)
"""
    assert "pip install" in check(python, code, tmp_path)


JOB = """
import danling as dl
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Parity(dl.Runner):
    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.criterion = nn.CrossEntropyLoss()
        bits = torch.cartesian_prod(*[torch.arange(2.0)] * 4)
        self.datasets.train = self.datasets.val = TensorDataset(bits, bits.sum(1).long() % 2)

config = dl.Config({"workspace_root": "runs", "epochs": 2, "optim.type": "adamw", "dataloader.batch_size": 4})
with Parity(config.parse()) as runner:
    runner.train()
    print(f"trained {runner.global_step} updates on {runner.stack}")
"""
# What each extra is for: the stack that it brings, how a job uses it, and what the command does with it.
EXTRAS: dict[str, tuple[str, list[str], list[str]]] = {
    "accelerate": ("accelerate", [], []),
    "deepspeed": ("deepspeed", ["--deepspeed.zero_optimization.stage", "2"], []),
    "parallel": ("parallel", ["--parallel.axes.shard", "2"], []),
    "optimizers": ("torch", [], []),
    "plot": ("torch", [], ["plot", "runs/lin/exp", "-o", "curves.png"]),
    "tensorboard": ("torch", ["--tensorboard", "true"], []),
    "wandb": ("torch", ["--wandb.enabled", "true", "--wandb.mode", "disabled"], []),
    "all": ("deepspeed", ["--deepspeed.zero_optimization.stage", "3"], ["plot", "runs/lin/exp", "-o", "curves.png"]),
}


def test_every_extra_is_tried() -> None:
    umbrella = next(package for package in packages() if package.name == "danling")
    assert sorted(EXTRAS) == sorted(umbrella.project["optional-dependencies"])


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_names(extra: str, wheels: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, wheels, f"danling[{extra}]")
    stack, options, verb = EXTRAS[extra]
    folder = python.parent
    # No compiler is found on this PATH, and DeepSpeed must not look for an accelerator.
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "CUDA_HOME")}
    clean |= {"PATH": str(folder), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    listed = {row.split()[0]: row for row in run(f"{folder}/danling", "stacks").splitlines()[1:]}
    bare = {"accelerate", "deepspeed", "parallel"} - ({stack} if extra != "all" else set(listed))
    assert listed[stack].endswith("installed")
    assert all(f"pip install danling-runner-{name}" in listed[name] for name in bare)
    (tmp_path / "train.py").write_text(JOB)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if stack == "parallel" else []
    told = run(str(python), *launch, "train.py", "--stack", stack, *options)
    assert f"updates on {stack}" in told
    if verb:
        (run_directory,) = (tmp_path / "runs" / "lin" / "exp").iterdir()
        run(f"{folder}/danling", *(str(run_directory) if word == "runs/lin/exp" else word for word in verb))
        assert (tmp_path / "curves.png").stat().st_size > 1000
