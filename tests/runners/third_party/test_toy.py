"""A backend that somebody else writes: built, installed, listed, chosen, pickled, tested; and its mistakes, named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.ranks import run_ranks

HERE = Path(__file__).parent
UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))


def python(*arguments: str, site: Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python with one more site directory."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=180
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A site directory into which the wheel of danling-toy is installed."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(HERE / "danling_toy", folder / "source")
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("danling_toy-1.0-*.whl")
    install = [UV, "pip", "install", "-q", "--no-deps", "--offline", "--python", sys.executable, "--target"]
    subprocess.run([*install, str(folder / "site"), str(wheel)], check=True, timeout=120)
    return folder / "site"


def publish(site: Path, distribution: str, name: str, target: str, version: str = "2.0") -> None:
    """Put the metadata of a distribution with one engine into a site directory."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[danling.runners]\n{name} = {target}\n")


def test_it_is_listed_without_being_imported(site, tmp_path):
    code = "import sys; from danling.runners import cli; cli.main(['stacks', '--json']);"
    code += "print([m for m in ('torch', 'danling_toy') if m in sys.modules], file=sys.stderr)"
    done = python("-c", code, site=site, cwd=tmp_path)
    toy = {stack["name"]: stack for stack in json.loads(done.stdout)["stacks"]}["toy"]
    assert (toy["distribution"], toy["version"], toy["installed"]) == ("danling-toy", "1.0", True)
    assert toy["target"] == "danling_toy.runner:ToyRunner" and toy["problem"] is None
    assert done.stderr.strip() == "[]"


PICKLE = """
import pickle, sys
import danling as dl
from train import Lines
from danling_toy.runner import ToyRunner, usable
config = {"stack": "toy", "epochs": 1, "optim.type": "sgd", "optim.lr": 0.1, "workspace_root": sys.argv[1]}
with Lines(config) as runner:
    kind = type(runner)
    assert isinstance(runner, Lines) and isinstance(runner, ToyRunner) and isinstance(runner, dl.Runner)
    assert kind is not Lines and kind.__name__ == "Lines" and kind.__module__ == "train" and usable()[0]
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(kind, protocol)) is kind
with open("kind.pkl", "wb") as file:
    pickle.dump(kind, file)
"""


def test_the_combined_class_pickles_into_a_process_that_never_built_a_runner(site, tmp_path):
    shutil.copy(HERE / "train.py", tmp_path)
    (tmp_path / "script.py").write_text(PICKLE)
    python("script.py", str(tmp_path / "runs"), site=site, cwd=tmp_path)
    code = (
        "import pickle; kind = pickle.load(open('kind.pkl', 'rb')); print([base.__name__ for base in kind.__bases__])"
    )
    assert python("-c", code, site=site, cwd=tmp_path).stdout.strip() == "['Lines', 'ToyRunner']"


def choose(site: Path, cwd: Path, name: str = "toy") -> str:
    """The error of a script that asks for an engine."""
    code = f"from danling.runners.discovery import load_engine; load_engine({name!r})"
    done = python("-c", code, site=site, cwd=cwd, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_a_name_that_two_packages_claim(tmp_path):
    publish(tmp_path / "site", "danling-toy", "toy", "danling_toy.runner:ToyRunner")
    publish(tmp_path / "site", "toy-engines", "toy", "toy_engines:Other")
    error = choose(tmp_path / "site", tmp_path)
    assert error.endswith("the name is claimed by danling-toy and toy-engines; uninstall all but one"), error


def test_a_name_of_ours(tmp_path):
    publish(tmp_path / "site", "toy-engines", "torch", "toy_engines:Other")
    error = choose(tmp_path / "site", tmp_path, "torch")
    assert "StackError: stack 'torch': the name is claimed by danling-runner-torch and toy-engines" in error, error


@pytest.mark.parametrize("name", ["Toy", "toy-2", "2toy"])
def test_a_name_that_is_none(tmp_path, name):
    publish(tmp_path / "site", "danling-toy", name, "danling_toy.runner:ToyRunner")
    error = choose(tmp_path / "site", tmp_path, name)
    assert "a stack's name has lower case letters, digits and `_` only" in error, error


def test_a_broken_module(tmp_path):
    publish(tmp_path / "site", "danling-toy", "toy", "toy_engine:Toy")
    (tmp_path / "site" / "toy_engine.py").write_text("import a_library_that_is_missing\n")
    assert choose(tmp_path / "site", tmp_path) == (
        "danling.runners.errors.StackError: stack 'toy' of danling-toy 2.0 cannot be loaded from toy_engine:Toy: "
        "ModuleNotFoundError: No module named 'a_library_that_is_missing'"
    )


def test_a_class_that_is_no_runner(tmp_path):
    publish(tmp_path / "site", "danling-toy", "toy", "toy_engine:Toy")
    (tmp_path / "site" / "toy_engine.py").write_text("class Toy: pass\n")
    error = choose(tmp_path / "site", tmp_path)
    assert error.endswith(
        "stack 'toy' of danling-toy 2.0: toy_engine:Toy is no subclass of danling.runners.BaseRunner"
    ), error


def test_an_unknown_name_lists_it(site, tmp_path):
    error = choose(site, tmp_path, "tory")
    assert "unknown stack 'tory'; did you mean 'toy'?" in error and re.search(r"Installed: .*\btoy\b", error), error


def test_the_docs_show_the_package_as_it_is():
    """The walk-through includes the very files that are tested here."""
    page = (HERE.parents[2] / "docs" / "backends.md").read_text()
    included = re.findall(r'^--8<-- "(tests/.*)"$', page, re.M)
    assert {Path(name).name for name in included} == {"pyproject.toml", "runner.py"}
    for name in included:
        assert (HERE.parents[2] / name).is_relative_to(HERE) and (HERE.parents[2] / name).is_file()


@pytest.mark.slow
def test_an_unchanged_script_trains_on_it(site, tmp_path):
    """Two ranks; the same result as on DistributedDataParallel, and as in one process."""
    scores = {}
    for stack, nproc, size in (("toy", 2, 6), ("torch", 2, 6), ("toy", 1, 12)):
        arguments = ["--stack", stack, "--dataloader.batch_size", str(size), "--dataloader.drop_last", "false"]
        arguments += ["--workspace_root", str(tmp_path / f"{stack}{nproc}")]
        ended = run_ranks(HERE / "train.py", nproc, arguments, env={"PYTHONPATH": str(site)})
        found = re.search(r"stack: (\w+) score: (\S+)", ended[0].output)
        assert found and found[1] == stack, ended[0].output
        scores[stack, nproc] = float(found[2])
    assert scores["toy", 2] == pytest.approx(scores["torch", 2], rel=1e-6)
    assert scores["toy", 2] == pytest.approx(scores["toy", 1], rel=1e-5)


@pytest.mark.slow
def test_it_conforms(site, tmp_path):
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "danling.backends.torch.conformance"]
    done = python(*command, "--stack", "toy", "--nproc", "2", site=site, cwd=tmp_path)
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout and "skipped" not in done.stdout
