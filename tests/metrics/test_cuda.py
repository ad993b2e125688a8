"""On a CUDA device no update waits for it, and values equal those on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

import danling.metrics.functional as F
from danling.metrics import AverageMeter, AverageMeters, GlobalMetrics, OnlineMetrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
C = 4
TASKS = {
    "binary": [
        getattr(F, n)() for n in F.__all__ if n.startswith("binary_") and n not in ("binary_f1", "binary_fbeta")
    ],
    "multiclass": [
        getattr(F, n)(C, **({"k": 2} if "top_k" in n else {})) for n in F.__all__ if n.startswith("multiclass_")
    ],
    "multilabel": [getattr(F, n)(C) for n in F.__all__ if n.startswith("multilabel_")],
    "regression": [F.mse(), F.mae(), F.mape(), F.r2_score(), F.explained_variance(), F.pearson()],
    "ranking": [F.ndcg()],
}


def data(task, n=5000):
    g = torch.Generator().manual_seed(0)
    if task == "regression":
        y = torch.randn(n, generator=g)
        return y + torch.randn(n, generator=g), y
    if task == "multiclass":
        return torch.randn(n, C, generator=g), torch.randint(0, C, (n,), generator=g)
    shape = (n,) if task == "binary" else (n, C)
    return torch.randn(shape, generator=g), torch.randint(0, 2, shape, generator=g)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cls", [GlobalMetrics, OnlineMetrics])
@pytest.mark.parametrize("task", TASKS)
def test_updates_do_not_wait(task, cls, deterministic):
    x, y = data(task)
    metrics, reference = cls(TASKS[task]), cls(TASKS[task])
    cx, cy = x.cuda(), y.cuda()
    mask = torch.ones_like(cy, dtype=torch.bool)
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(0, 5000, 300):
            metrics.update(cx[i : i + 300], cy[i : i + 300], mask=mask[i : i + 300])
        metrics.update(cx, cy)  # larger than a block
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for _ in range(2):
        reference.update(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = metrics.average(), reference.average()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4, nan_ok=True), name


def test_meters_do_not_wait():
    meter, meters = AverageMeter(), AverageMeters()
    value = torch.tensor(2.0, device="cuda")
    weight = torch.tensor(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.update(value)
        meter.update(1.0)
        meter.update(value, n=weight)
        meter.update(4.0, n=weight)
        meters.update(loss=value, grad=torch.stack([value, value]), n=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.avg == pytest.approx((2 + 1 + 6 + 12) / 8) and meters.avg.loss == 2.0


def test_rows_may_be_kept_on_the_cpu():
    x, y = data("multiclass")
    metrics, reference = GlobalMetrics(F.multiclass_auroc(C), device="cpu"), GlobalMetrics(F.multiclass_auroc(C))
    for i in range(0, 5000, 300):
        metrics.update(x[i : i + 300].cuda(), y[i : i + 300].cuda())
        reference.update(x[i : i + 300], y[i : i + 300])
    assert metrics.average() == reference.average()
