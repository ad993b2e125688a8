"""What the step of the weights and the schedules cost, as ratios within one run, on one CPU thread.

Times are CPU times of the thread, so that other work on the machine does not count. The table goes to the screen, JSON
to the folder `DANLING_BENCH_DIR` (default `build/bench`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from danling.optim import LRScheduler, OptimizerStep

pytestmark = pytest.mark.bench
ROWS: dict[str, dict] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    print(f"\n{'what':46s} {'danling':>12s} {'reference':>12s} {'result':>10s} {'bound':>8s}")
    for name, row in ROWS.items():
        print(f"{name:46s} {row['ours']:12.2f} {row['reference']:12.2f} {row['result']:10.3f} {row['bound']:8.3f}")
    folder = Path(os.environ.get("DANLING_BENCH_DIR", "build/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "optim.json").write_text(json.dumps(ROWS, indent=1) + "\n")


def paired(ours, reference, calls, rounds=41):
    """Median times per call of two functions in microseconds, and the medians of their differences and ratios.

    They take turns, and what is compared is the two halves of one turn, which saw the same machine.
    """
    turns = []
    for turn in range(-2, rounds):
        times = {}
        for function in (ours, reference) if turn % 2 else (reference, ours):
            start = time.thread_time()
            for _ in range(calls):
                function()
            times[function] = (time.thread_time() - start) / calls * 1e6
        if turn >= 0:
            turns.append((times[ours], times[reference]))
    median = statistics.median
    return (
        median(a for a, _ in turns),
        median(b for _, b in turns),
        median(a - b for a, b in turns),
        median(a / b for a, b in turns),
    )


def record(name, ours, reference, result, bound):
    ROWS[name] = {"ours": ours, "reference": reference, "result": result, "bound": bound, "unit": "us"}
    assert result <= bound, ROWS[name]


def parameters(count, *shape):
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape)
    return params


def test_the_step_adds_little_to_the_optimizer():
    def prepare(wrap):
        params = parameters(4, 8, 8)
        grads = [param.grad for param in params]
        optimizer = torch.optim.AdamW(params)
        update = OptimizerStep(optimizer)

        def refill():
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

        def ours():
            refill()
            update.step()

        def theirs():
            refill()
            optimizer.step()
            optimizer.zero_grad()

        return ours if wrap else theirs

    # 5 us where the two calls take 94 us.
    ours, theirs, difference, _ = paired(prepare(True), prepare(False), 100)
    record("more than optimizer.step + zero_grad, 4 params", ours, theirs, difference / theirs, 5 / 94)


@pytest.mark.parametrize(("count", "size"), [(200, 64), (20, 8)])
def test_clipping_costs_what_torchs_does(count, size):
    params = parameters(count, size, size)
    update = OptimizerStep(torch.optim.SGD(params), clip_norm=1e6)  # never reached; the work is the same
    ours, theirs, _, ratio = paired(
        update.clip_gradients, lambda: nn.utils.clip_grad_norm_(params, 1e6, foreach=True), max(5, 2000 // count)
    )
    record(f"clip by norm / torch, {count} of {size} x {size}", ours, theirs, ratio, 1.1)


def test_the_fused_check_beats_a_loop():
    params = parameters(200, 64, 64)
    update = OptimizerStep(torch.optim.SGD(params))
    ours, theirs, _, ratio = paired(
        lambda: bool(update.has_nan_inf_grad()),
        lambda: any(not bool(param.grad.isfinite().all()) for param in params),
        10,
    )
    record("non-finite check / loop, 200 of 64 x 64", ours, theirs, ratio, 0.2)


def test_a_schedule_steps_in_microseconds():
    def prepare(kind, *args):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = kind(optimizer, *args)
        optimizer.step()
        return scheduler.step

    # 10 us where torch's takes 2 us.
    ours, theirs, _, ratio = paired(
        prepare(LRScheduler, 10**7), prepare(torch.optim.lr_scheduler.CosineAnnealingLR, 10**7), 1000
    )
    record("LRScheduler.step / torch's cosine, one group", ours, theirs, ratio, 5.0)


@pytest.mark.parametrize(
    ("what", "bound"), [("danling.optim", 0.05), ("danling.optim.schedulers, danling.optim.optimizers", 0.1)]
)
def test_importing_costs_little_over_torch(what, bound):
    code = (
        "from time import thread_time as now\n"
        f"a = now(); import torch; b = now(); import {what}; c = now(); print(c - b, b - a)"
    )
    times = [map(float, subprocess.check_output([sys.executable, "-c", code]).split()) for _ in range(5)]
    ours, theirs = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
    name = "import danling.optim / torch" + (", with the registries" if "," in what else "")
    # The bounds are seconds where importing torch takes 2.8.
    record(name, ours, theirs, ours / theirs, bound / 2.8)
