"""A run leaves nothing behind in its process."""

from __future__ import annotations

from typing import Any

from .decisions import STORY
from .marks import shows
from .worker import Place, scenario


def world() -> dict[str, Any]:
    """What other code in the process relies on."""
    import builtins
    import gc
    import logging
    import os
    import signal
    import sys
    import threading
    import warnings

    import torch

    root = logging.getLogger()
    names = ("save", "load", "tensor", "stack", "no_grad", "compile")
    return {
        "builtins": {name: id(value) for name, value in vars(builtins).items() if name != "_"},
        "streams": [id(stream) for stream in (sys.stdout, sys.stderr)],
        "hooks": [id(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook)],
        "root logger": (root.level, len(root.handlers), logging.raiseExceptions, logging.root.manager.disable),
        "warnings": (id(warnings.showwarning), len(warnings.filters)),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "torch": {name: id(getattr(torch, name)) for name in names},
        "optimizers": {name: id(value) for name, value in vars(torch.optim).items() if isinstance(value, type)},
        "module methods": {name: id(value) for name, value in vars(torch.nn.Module).items() if callable(value)},
        "defaults": (str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "grad": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "process group": torch.distributed.is_initialized(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


@scenario
def three_runs(place: Place) -> dict[str, Any]:
    """One run to load what libraries load on first use, then one that ends well, and one that ends badly."""
    from .task import Task

    options = {**STORY, "steps": 4, "gc__interval": 2, "deterministic": True, "heartbeat__enabled": True}
    worlds = {}
    for name in ("first", "good", "bad"):
        runner = Task(place.config(name, **options))
        if name == "bad":
            runner.on("step", lambda runner, event: 1 / 0)
        try:
            runner.train()
        except ZeroDivisionError:
            pass
        finally:
            runner.close()
        worlds[name] = world()
    return worlds


@shows(11, "three_runs")
def test_nothing_global_changes(found: list[Any]) -> None:
    """Builtins, streams, signals, torch functions, defaults, threads and groups are as they were."""
    for rank in found:
        for name, value in rank["first"].items():
            assert rank["good"][name] == value, f"{name} after a run"
            assert rank["bad"][name] == value, f"{name} after a run that failed"
