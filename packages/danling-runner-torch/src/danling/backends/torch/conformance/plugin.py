"""The suite as a pytest plugin: its options, its tests, its processes. `pytest_danling` registers it when it is needed."""

from __future__ import annotations

import importlib
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .forks import Forks
from .marks import shown_by
from .ranks import RankResult, run_ranks
from .settings import Settings, parse_override
from .worker import MODULES

FOLDER = Path(__file__).parent
SCRIPT = f"import sys\nfrom {__package__}.worker import main\nmain(sys.argv[1:])\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("danling", "conformance suite of danling")
    group.addoption("--stack", default="torch", help="engine under test")
    group.addoption("--nproc", type=int, default=2, help="processes")
    group.addoption("--set", action="append", default=[], metavar="KEY=VALUE", help="a configuration key for every run")
    group.addoption("--dtype", help="of model and data, instead of what the engine's class says")
    group.addoption("--tolerance", type=float, help="relative difference from the reference, likewise")


# The files are collected here and imported by their full name: pytest would otherwise take this folder for a part of a top-level
# package `torch`, because `danling.backends` is a namespace without a file.


class _File(pytest.Module):
    def _getobj(self) -> Any:
        return importlib.import_module(f"{__package__}.{self.path.stem}")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A plain folder instead of a package, from the suite upwards."""
    return pytest.Dir.from_parent(parent, path=path) if path == FOLDER or path in FOLDER.parents else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The files of the suite that hold tests."""
    if file_path.parent == FOLDER and file_path.stem in MODULES:
        return _File.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """What this run of the suite is about."""
    option = request.config.option
    overrides = dict(map(parse_override, option.set))
    return Settings.of(
        option.stack, option.nproc, dtype=option.dtype, tolerance=option.tolerance, overrides=overrides or None
    )


@pytest.fixture(autouse=True)
def _claimed(request: pytest.FixtureRequest, settings: Settings) -> None:
    shown = shown_by(request.function)
    if shown is not None and shown.guarantee not in settings.guarantees:
        pytest.skip(f"guarantee {shown.guarantee} is not claimed by {settings.claimant}")


class Jobs:
    """Starts the processes of the suite and reads what they found.

    Args:
        settings: of the suite.
        folder: for everything they write.
        forks: what starts them quickly; None starts a Python for each.
    """

    def __init__(self, settings: Settings, folder: Path, forks: Forks | None) -> None:
        self.settings, self.folder, self.forks = settings, folder, forks
        self.file = folder / "settings.json"
        self.file.write_text(settings.dumps())

    def run(
        self, job: str, *names: str, check: bool = True, **env: str
    ) -> tuple[list[dict[str, Any]], list[RankResult]]:
        """Run scenarios in new processes.

        Args:
            job: name of the folder; of several jobs with one name the later ones find the runs of the earlier ones.
            names: of the scenarios.
            check: fail when a process does not come to its end.
            env: further environment variables.

        Returns:
            For each rank what each scenario found, and how each rank ended.
        """
        folder = self.folder / job
        folder.mkdir(exist_ok=True)
        for file in folder.glob("rank*.pkl"):
            file.unlink()
        nproc, args = self.settings.nproc, [str(self.file), str(folder), *names]
        limit = 60.0 + 30 * len(names)
        if self.forks is None:
            ended = run_ranks(SCRIPT, nproc, args, timeout=limit, env=env, check=check)
        else:
            ended = self.forks.run(nproc, args, timeout=limit, env=env, check=check)
        for result in ended:
            print(f"--- {job}, rank {result.rank}: exit {result.returncode}\n{result.output}")
        return [_read(folder / f"rank{rank}.pkl") for rank in range(self.settings.nproc)], ended


def _read(path: Path) -> dict[str, Any]:
    outcomes = {}
    with open(path, "rb") as file:
        while file.peek(1):  # type: ignore[attr-defined]
            name, good, value = pickle.load(file)
            outcomes[name] = value if good else _Failure(value)
    return outcomes


class _Failure(str):
    """The traceback of a scenario that raised."""


@pytest.fixture(scope="session")
def jobs(settings: Settings) -> Iterator[Jobs]:
    """For tests that need processes of their own."""
    import torch

    with tempfile.TemporaryDirectory(prefix="danling-conformance-") as folder:
        if torch.accelerator.is_available():
            yield Jobs(settings, Path(folder), None)
        else:
            with Forks(settings.stack) as forks:
                yield Jobs(settings, Path(folder), forks)


@pytest.fixture(scope="session")
def _outcomes(request: pytest.FixtureRequest, settings: Settings, jobs: Jobs) -> list[dict[str, Any]]:
    """All scenarios that the selected tests need, run one after the other by one set of processes."""
    names: dict[str, None] = {}
    for item in request.session.items:
        shown = shown_by(getattr(item, "function", None))
        if shown is not None and shown.guarantee in settings.guarantees:
            names |= dict.fromkeys(shown.scenarios)
    return jobs.run("main", *names)[0]


@pytest.fixture
def found(request: pytest.FixtureRequest, _outcomes: list[dict[str, Any]]) -> Any:
    """What the scenario of a test found, one value per rank; a tuple of such lists when it names several scenarios."""
    shown = shown_by(request.function)
    assert shown is not None, "a test that uses `found` says what it needs with `shows`"
    names = shown.scenarios
    values = tuple(agreed(name, [outcomes[name] for outcomes in _outcomes]) for name in names)
    return values[0] if len(values) == 1 else values


def agreed(name: str, values: Sequence[Any]) -> list[Any]:
    """What all ranks found; an assertion that no scenario raised."""
    failed = [f"rank {rank}:\n{value}" for rank, value in enumerate(values) if isinstance(value, _Failure)]
    assert not failed, f"scenario {name} failed on " + "\n".join(failed)
    return list(values)
