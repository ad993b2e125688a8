"""Failing saves are reported and a failing final save fails the run; nothing global is changed."""

import builtins
import gc
import json
import logging
import random
import signal
import sys
import warnings

import pytest
import torch

from danling.runners import CheckpointError
from danling.runners.atomic import read_json
from support.tiny import Tiny, tiny_config


def test_failing_saves_are_counted_and_the_final_one_fails_the_run(tmp_path):
    told = []
    runner = Tiny(tiny_config(tmp_path))
    runner.checkpoint_dir.write_text("a file where the directory should be")
    runner.on("save_error", lambda runner, event: told.append(event.global_step))
    with pytest.raises(CheckpointError, match="epoch-3 could not be saved"):
        runner.train()
    assert runner.global_step == 18 and len(told) >= 2
    summary = read_json(runner.dir / "summary.json")
    assert summary["status"] == "failed" and summary["error"]["type"] == "CheckpointError"
    health = summary["checkpoint_health"]
    assert health["failures"] == 3 and health["saves"] == 0 and "Error" in health["first_error"]


def test_a_save_of_ones_own_raises(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        runner.checkpoint_dir.write_text("in the way")
        with pytest.raises(CheckpointError, match="step-0 could not be saved"):
            runner.save_checkpoint()


def test_a_tracker_that_throws_is_disabled_and_named(tmp_path):
    class Broken:
        name = "broken"

        def log(self, scalars, *, global_step, epoch):
            raise OSError("no network")

        def flush(self):
            pass

        close = flush

    with Tiny(tiny_config(tmp_path, log_interval=1)) as runner:
        runner.trackers.add(Broken())
        runner.train()
    problems = {entry["service"]: entry for entry in read_json(runner.dir / "summary.json")["problems"]}
    assert problems["broken"]["first"] == "OSError: no network"


def test_the_best_is_saved_off_cadence_and_nothing_else(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=3, checkpoint__interval=0, patience=None)) as runner:
        runner.train()
        names = {info.name for info in runner.checkpoint_manager.list()}
        best = runner.checkpoint_manager.resolve("best").name
        assert best == f"epoch-{runner.best_index}" and names >= {best, "epoch-3"}


def test_an_empty_evaluation_does_not_lose_the_final_save(tmp_path):
    class Nothing(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.pop("val")
            self.dataloaders.val = []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no score
        with Nothing(tiny_config(tmp_path, epochs=1)) as runner:
            runner.train()
    assert (runner.checkpoint_dir / "epoch-1" / "manifest.json").exists()


def snapshot():
    return {
        "print": builtins.print,
        "stdout": (sys.stdout, sys.stderr, sys.excepthook),
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "dtype": torch.get_default_dtype(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "load": (torch.load, torch.save, torch.nn.Module.__call__, torch.optim.AdamW.step),
        "json": json.dumps,
        "random": random.random,
        "threads": torch.get_num_threads(),
    }


def test_nothing_global_changes(tmp_path):
    before = snapshot()
    with Tiny(tiny_config(tmp_path, epochs=1, deterministic=True, gc__interval=2, precision="bf16")) as runner:
        runner.train()
        assert torch.are_deterministic_algorithms_enabled() and not gc.isenabled()
    assert snapshot() == before


def test_it_is_all_put_back_after_an_error_too(tmp_path):
    before = snapshot()
    with pytest.raises(ZeroDivisionError):
        with Tiny(tiny_config(tmp_path, epochs=1, deterministic=True, gc__interval=2)) as runner:
            runner.on("step", lambda runner, event: 1 / 0)
            runner.train()
    assert snapshot() == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parallel__axes__tensor", 2, "parallel.axes.tensor"),
        ("checkpoint__backend", "dcp", "checkpoint.backend"),
        ("ft__enabled", True, "ft.enabled"),
        ("precision", "fp16", "needs an accelerator"),
    ],
)
def test_what_this_engine_cannot_honour_is_refused(tmp_path, key, value, message):
    if torch.cuda.is_available() and key == "precision":
        pytest.skip("there is an accelerator")
    with pytest.raises(ValueError, match=message):
        Tiny(tiny_config(tmp_path, stack="torch", **{key: value}))
