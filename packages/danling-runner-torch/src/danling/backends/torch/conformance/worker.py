"""One rank of the suite: runs scenarios one after the other and writes down what each of them found."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .settings import Settings

MODULES = ("training", "decisions", "checkpoints", "evaluation", "surroundings")
SCENARIOS: dict[str, Callable[[Place], Any]] = {}


class Place:
    """Where a scenario runs.

    Attributes:
        settings: of the suite.
        folder: for the runs of this scenario; all ranks share it.
        rank: of this process.
        last: whether this is the last rank.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.rank = int(os.environ["RANK"])
        self.last = self.rank == int(os.environ["WORLD_SIZE"]) - 1

    def config(self, run: str = "run", **values: Any) -> dict[str, Any]:
        """The configuration of one run of this scenario."""
        from .task import task_config

        return task_config(self.settings, self.folder / run, **values)


def scenario(function: Callable[[Place], Any]) -> Callable[[Place], Any]:
    """Register a function that every rank runs; what it returns reaches the test, one value per rank."""
    SCENARIOS[function.__name__] = function
    return function


def main(arguments: Sequence[str]) -> None:
    """Run scenarios.

    Args:
        arguments: file with the settings, folder for everything, names of the scenarios.
    """
    settings = Settings.loads(Path(arguments[0]).read_text())
    folder = Path(arguments[1])
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
    with open(folder / f"rank{os.environ['RANK']}.pkl", "ab") as file:
        for name in arguments[2:]:
            began = time.monotonic()
            print(f"=== {name}", flush=True)
            try:
                outcome = (name, True, SCENARIOS[name](Place(settings, folder / name)))
            except (Exception, SystemExit, KeyboardInterrupt):
                traceback.print_exc()
                outcome = (name, False, traceback.format_exc())
            print(f"=== {name}: {time.monotonic() - began:.2f} s", flush=True)
            pickle.dump(outcome, file)
            file.flush()


if __name__ == "__main__":
    from danling.backends.torch.conformance import worker  # the module that scenarios register with, not __main__

    worker.main(sys.argv[1:])
