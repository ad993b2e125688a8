"""Guarantee 11: a run changes nothing global, and what the configuration asked for is put back."""

from __future__ import annotations

import builtins
import copyreg
import gc
import logging
import os
import signal
import sys
import threading
import warnings

import pytest
import torch

from support.tiny import Tiny, tiny_config

ASKED = {
    "plain": {},
    "deterministic": {"deterministic": True},
    "gc": {"gc__interval": 2},
    "everything": {
        "deterministic": True,
        "gc__interval": 3,
        "log": True,
        "tensorboard": True,
        "heartbeat__enabled": True,
        "ema__enabled": True,
        "progress": True,
        "precision": "bf16",
    },
}


def world():
    """What other code in the process relies on, without the modules that torch loads by itself."""
    root = logging.getLogger()
    return {
        "builtins": {name: id(value) for name, value in vars(builtins).items() if name != "_"},
        "streams": (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook),
        "root logger": (root.level, list(root.handlers), list(root.filters), logging.getLoggerClass()),
        "logging": (logging.raiseExceptions, logging.root.manager.disable),
        "warnings": (warnings.showwarning, list(warnings.filters)),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
        "gc": (gc.isenabled(), gc.get_threshold(), list(gc.callbacks)),
        "torch functions": {
            name: id(getattr(torch, name)) for name in ("save", "load", "tensor", "stack", "no_grad", "compile")
        },
        "optimizers": {name: id(value) for name, value in vars(torch.optim).items() if isinstance(value, type)},
        "module methods": {name: id(value) for name, value in vars(torch.nn.Module).items() if callable(value)},
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "process group": torch.distributed.is_initialized(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def without_ours(copyreg_table):
    return {kind for kind in copyreg_table if not kind.__module__.startswith("danling")}


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Run once, so that what torch, TensorBoard and rich load on first use is loaded."""
    with Tiny(tiny_config(tmp_path_factory.mktemp("warm"), **ASKED["everything"])) as runner:
        runner.train()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("ending", ["finished", "failed", "half built"])
def test_the_world_is_as_it_was(tmp_path, asked, ending):
    tables = without_ours(copyreg.dispatch_table)
    before = world()
    config = tiny_config(tmp_path, **ASKED[asked])
    if ending == "finished":
        with Tiny(config) as runner:
            runner.train()
    elif ending == "failed":
        runner = Tiny(config)
        runner.on("step", lambda runner, event: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.train()
    else:

        class Broken(Tiny):
            def __init__(self, config):
                super().__init__(config)
                raise KeyError("half built")

        with pytest.raises(KeyError):
            Broken(config)
    after = world()
    for name, value in before.items():
        assert after[name] == value, name
    assert without_ours(copyreg.dispatch_table) == tables


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_runs_side_by_side_end_in_any_order(tmp_path, order):
    before = world()
    asked = ASKED["everything"]
    runners = [Tiny(tiny_config(tmp_path, name=f"run{number}", epochs=1, **asked)) for number in range(3)]
    for number in order:
        assert torch.are_deterministic_algorithms_enabled() and not gc.isenabled()
        runners[number].train()
        runners[number].close()
    after = world()
    for name, value in before.items():
        assert after[name] == value, name


def test_while_it_runs_streams_and_print_are_pythons_own(tmp_path):
    kept = print, sys.stdout, sys.stderr
    seen = []
    with Tiny(tiny_config(tmp_path, epochs=1, progress=True)) as runner:
        runner.on("step", lambda runner, event: seen.append((print, sys.stdout, sys.stderr)))
        runner.train()
    assert seen == [kept] * 6
