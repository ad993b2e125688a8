"""The value is a function of the multiset of samples: any cut into batches and ranks gives the value of one batch."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import danling.metrics.functional as F
from danling.metrics import GlobalMetrics, OnlineMetrics

C = 3
KEPT_ONLY = {"spearman", "kendall"}


def descriptors(task: str, online: bool) -> dict:
    width = {"binary": [], "multiclass": [C], "multilabel": [C], "regression": [1]}[task]
    if task == "regression":
        names = ["mse", "rmse", "mae", "mape", "r2_score", "explained_variance", "pearson", "spearman", "kendall"]
        return {n: getattr(F, n)(1, ignore_nan=True) for n in names if not (online and n in KEPT_ONLY)}
    found = {
        n: getattr(F, n)(*width) for n in F.__all__ if n.startswith(f"{task}_") and n != "multiclass_top_k_accuracy"
    }
    found["mcc"] = F.mcc(task=task, **({} if task == "binary" else {"num_classes": C, "num_labels": C}))
    for suffix in ("accuracy", "f1_score", "auroc", "auprc"):
        if task != "binary":
            for average in ("micro", "weighted", None):
                found[f"{suffix}_{average}"] = getattr(F, f"{task}_{suffix}")(*width, average=average)
    if task == "multiclass":
        found["top2"] = F.multiclass_top_k_accuracy(C, k=2)
        found["k2"] = F.multiclass_recall(C, k=2)
        found["perplexity"] = F.perplexity(C)
    else:
        found["low"] = getattr(F, f"{task}_f1_score")(*width, threshold=0.2)
    return found


ALL = {
    (task, online): descriptors(task, online)
    for task in ("binary", "multiclass", "multilabel", "regression")
    for online in (False, True)
}

SCORES = {
    "probabilities": st.floats(0, 1, width=32),
    "logits": st.floats(-8, 8, width=32),
    "ties": st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    "extreme": st.sampled_from([-math.inf, math.inf, 1e6, -1e6, 0.0, 0.5, 1.0, 1e-30, 88.0]),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def data_sets(draw, task):
    n = draw(st.integers(0, 24))
    dtype = draw(st.sampled_from(DTYPES))
    width = C if task in ("multiclass", "multilabel") else 1
    if task == "regression":
        numbers = draw(
            st.sampled_from([st.floats(-4, 4, width=32), st.sampled_from([1e6, 1e6 + 1, 1e6 + 2]), st.just(3.0)])
        )
        x = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64)
        y = torch.tensor(
            draw(st.lists(st.one_of(numbers, st.just(math.nan)), min_size=n, max_size=n)), dtype=torch.float64
        )
        return x, y
    # Different ranges in different rows: no batch may decide on its own what is a logit.
    kinds = draw(st.lists(st.sampled_from(list(SCORES)), min_size=1, max_size=3))
    rows = [draw(st.lists(SCORES[kinds[i % len(kinds)]], min_size=width, max_size=width)) for i in range(n)]
    x = torch.tensor(rows, dtype=torch.float64).reshape(n, width).to(dtype)
    top = C - 1 if task == "multiclass" else 1
    labels = draw(st.sampled_from([st.integers(0, top), st.sampled_from([0, top, -100]), st.just(-100), st.just(top)]))
    if task == "multilabel":
        flat = draw(st.lists(labels, min_size=n * C, max_size=n * C))
        return x, torch.tensor(flat, dtype=torch.int64).reshape(n, C)
    y = torch.tensor(draw(st.lists(labels, min_size=n, max_size=n)), dtype=torch.int64)
    return (x if task == "multiclass" else x.reshape(n)), y


@st.composite
def cuts(draw, n):
    """An order of the rows, cuts into batches (empty ones too), and a rank for each batch."""
    order = draw(st.permutations(range(n)))
    edges = sorted(draw(st.lists(st.integers(0, n), max_size=6)))
    edges = [0, *edges, n]
    batches = [list(order[a:b]) for a, b in zip(edges, edges[1:])]
    return [(draw(st.integers(0, 2)), batch) for batch in batches], draw(st.permutations(range(3)))


@pytest.mark.parametrize("from_logits", ["auto", True])
@pytest.mark.parametrize("online", [False, True], ids=["global", "online"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_any_cut_gives_the_value_of_one_batch(task, online, from_logits, data):
    x, y = data.draw(data_sets(task))
    batches, ranks = data.draw(cuts(len(x)))
    cls = OnlineMetrics if online else GlobalMetrics
    make = cls(ALL[task, online], from_logits=from_logits)
    whole, parts = make, [copy.deepcopy(make) for _ in range(3)]
    whole.update(x, y)
    for rank, batch in batches:
        parts[rank].update(x[batch], y[batch])
    first, *others = (parts[r] for r in ranks)
    for other in others:
        first.merge(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, many = whole.average(), first.average()
    for name in one:
        a, b = torch.as_tensor(one[name], dtype=torch.float64), torch.as_tensor(many[name], dtype=torch.float64)
        exact = task != "regression" and not any(w in name for w in ("loss", "calibration", "perplexity"))
        tolerance = {} if exact else {"rtol": 1e-9, "atol": 1e-9}
        if exact:
            assert torch.equal(torch.nan_to_num(a, -7.0), torch.nan_to_num(b, -7.0)), (name, a, b)
        else:
            torch.testing.assert_close(b, a, equal_nan=True, msg=name, **tolerance)
    assert whole.count == first.count


@pytest.mark.parametrize("online", [False, True], ids=["global", "online"])
def test_blocks_of_any_size(online):
    """Batches around the size of the waiting block fold to the same counts."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20000, C, generator=g) * 3, torch.randint(0, C, (20000,), generator=g)
    metrics = [F.multiclass_auroc(C), F.multiclass_f1_score(C)] if online else [F.multiclass_f1_score(C)]
    values = set()
    for size in (1, 4095, 4096, 4097, 20000, 777):
        container = (OnlineMetrics if online else GlobalMetrics)(metrics)
        for batch, target in (
            zip(x[:9000].split(size), y[:9000].split(size)) if size == 1 else zip(x.split(size), y.split(size))
        ):
            container.update(batch, target)
        if size == 1:
            for batch, target in zip(x[9000:].split(500), y[9000:].split(500)):
                container.update(batch, target)
        values.add(tuple(container.average().values()))
    assert len(values) == 1, values


def test_every_metric_is_covered():
    covered = {f"{type(m).__name__}" for metrics in ALL.values() for m in metrics.values()}
    assert {"CountMetric", "BalancedAccuracy", "CohenKappa", "MatthewsCorrelation", "Auroc", "Auprc"} <= covered
    assert {"CalibrationError", "LogLossMetric", "Perplexity", "TopKAccuracy", "ExactMatchRatio"} <= covered
    assert {"MomentMetric", "Spearman", "Kendall"} <= covered
