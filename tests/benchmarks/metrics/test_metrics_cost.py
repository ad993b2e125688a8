"""Cost of metrics as ratios within one run, one CPU thread; prints a table and writes JSON.

The JSON goes to `metrics.json` in the folder `DANLING_BENCH_DIR` (default `build/bench`).
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
import torchmetrics as tm

import danling.metrics.functional as F
from danling.metrics import AverageMeter, OnlineMetrics, StreamMetrics, multiclass_metrics

pytestmark = pytest.mark.bench
ROWS: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    lines = [f"{'what':44s} {'ours':>12s} {'reference':>12s} {'ratio':>8s} {'bound':>8s}"]
    for name, row in ROWS.items():
        lines.append(
            f"{name:44s} {row['ours']:>10.2f} {row['unit']} {row['reference']:>9.2f} {row['unit']} "
            f"{row['ratio']:>8.3f} {row['bound']:>8.3f}"
        )
    print("\n" + "\n".join(lines))
    folder = Path(os.environ.get("DANLING_BENCH_DIR", "build/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(ROWS, indent=1) + "\n")


def paired(first, second, calls=160, rounds=15):
    """Median CPU time per call of two functions, measured in turns, in microseconds: other processes disturb it least."""
    for _ in range(20):
        first(), second()
    times = ([], [])
    for _ in range(rounds):
        for function, sink in zip((first, second), times):
            start = time.thread_time()
            for _ in range(calls):
                function()
            sink.append((time.thread_time() - start) / calls * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def record(name, ours, reference, bound, unit="us"):
    ROWS[name] = {"ours": ours, "reference": reference, "ratio": ours / reference, "bound": bound, "unit": unit}
    assert ours <= bound * reference, f"{name}: {ours:.2f} {unit} against {reference:.2f} {unit}"


def collection(classes):
    options = {"task": "multiclass", "num_classes": classes}
    return tm.MetricCollection(
        {
            "auroc": tm.AUROC(**options),
            "auprc": tm.AveragePrecision(**options),
            "acc": tm.Accuracy(average="macro", **options),
            "f1": tm.F1Score(average="macro", **options),
            "mcc": tm.MatthewsCorrCoef(**options),
        },
        compute_groups=True,
    )


@pytest.mark.parametrize("mode", ["global", "online"])
def test_update_of_the_default_set(mode):
    x, y = torch.randn(256, 10), torch.randint(0, 10, (256,))
    ours, theirs = multiclass_metrics(10, mode=mode), collection(10)
    theirs.update(x, y)  # finds the compute groups
    theirs.reset()
    # 160 calls of 256 rows are ten blocks of 4,096, so that folding is included in full.
    first, second = paired(lambda: ours.update(x, y), lambda: theirs.update(x, y))
    record(f"update, default multiclass set, {mode}", first, second, 1 / 3)


def test_average_meter_number():
    ours, theirs, value = AverageMeter(), tm.MeanMetric(), torch.tensor(0.5)
    first, second = paired(lambda: ours.update(0.5), lambda: theirs.update(value), calls=1000)
    # 2 µs stands against 21 µs of MeanMetric on the machine where the bound was set.
    record("AverageMeter.update(float)", first, second, 2 / 21)


def test_average_meter_tensor():
    ours, theirs, value = AverageMeter(), tm.MeanMetric(), torch.tensor(0.5)
    first, second = paired(lambda: ours.update(value), lambda: theirs.update(value), calls=1000)
    record("AverageMeter.update(0-d tensor)", first, second, 1 / 2)


def test_compute_of_the_default_set():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 100, (102400,), generator=g)
    x = torch.randn(102400, 100, generator=g) + 2 * torch.nn.functional.one_hot(y, 100)
    ours, theirs = multiclass_metrics(100), collection(100)
    for i in range(0, len(x), 1024):
        ours.update(x[i : i + 1024], y[i : i + 1024])
        theirs.update(x[i : i + 1024], y[i : i + 1024])
    times = ([], [])
    for _ in range(3):
        ours._version += 1  # or the second read would be answered from the cache
        start = time.thread_time()
        mine = ours.average()
        times[0].append(time.thread_time() - start)
        for metric in theirs.values(copy_state=False):
            metric._computed = None
        start = time.thread_time()
        other = theirs.compute()
        times[1].append(time.thread_time() - start)
    for name, value in mine.items():
        assert value == pytest.approx(float(other[name]), abs=1e-6), name
    first, second = (statistics.median(t) * 1e3 for t in times)
    record("compute, default set, 102400 x 100", first, second, 1 / 2.5, "ms")


def test_stream_update_is_reported():
    x, y = torch.randn(256, 10), torch.randint(0, 10, (256,))
    ours, theirs = StreamMetrics(F.multiclass_accuracy(10), F.multiclass_f1_score(10)), collection(10)
    theirs.update(x, y)
    theirs.reset()
    first, second = paired(lambda: ours.update(x, y), lambda: theirs.forward(x, y), calls=10, rounds=5)
    record("StreamMetrics.update against forward", first, second, 1.0)


def test_import_cost():
    script = "import time, torch; a = time.thread_time(); import danling.metrics as m; {}print(time.thread_time() - a)"
    times = {}
    for name, extra in (("bare", ""), ("with the factories", "m.multiclass_metrics; ")):
        runs = [
            float(subprocess.run([sys.executable, "-c", script.format(extra)], capture_output=True, check=True).stdout)
            for _ in range(5)
        ]
        times[name] = statistics.median(runs)
    torch_time = "import time; a = time.process_time(); import torch; print(time.process_time() - a)"
    reference = float(subprocess.run([sys.executable, "-c", torch_time], capture_output=True, check=True).stdout)
    for name, seconds in times.items():
        # 0.15 s stands against about 1.5 s for torch itself.
        record(f"import danling.metrics, {name}", seconds * 1e3, reference * 1e3, 0.1, "ms")


def test_memory_of_online_metrics_is_constant():
    script = """
import resource, torch
from danling.metrics import multiclass_metrics
metrics = multiclass_metrics(10, mode="online")
x, y = torch.randn(4000, 10), torch.randint(0, 10, (4000,))
def feed(n):
    for _ in range(n):
        metrics.update(x, y)
    metrics.average()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = feed(10)
print(feed(250) - first)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    grown = int(done.stdout)
    assert grown < 4096, f"peak memory grew by {grown} KiB over a million rows"


@pytest.mark.parametrize("deviation, auroc, auprc", [(0.5, 1e-3, 2e-3), (2.0, 1e-3, 2e-3), (10.0, 1e-3, 2e-3)])
def test_error_bound_of_4096_bins(deviation, auroc, auprc):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (2000,), generator=g)
    x = deviation * (torch.randn(2000, generator=g) + y)
    online = OnlineMetrics(F.binary_auroc(), F.binary_auprc(), from_logits=True)
    online.update(x, y)
    bound = online.error_bound()
    ROWS[f"error bound of AUROC, deviation {deviation}"] = {
        "ours": bound.auroc * 1e6,
        "reference": auroc * 1e6,
        "ratio": bound.auroc / auroc,
        "bound": 1.0,
        "unit": "e-6",
    }
    assert bound.auroc <= auroc and bound.auprc <= auprc
