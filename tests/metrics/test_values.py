"""Values that need a definition: no data, one class, constants, ties, NaN; and that warnings come once per read."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import danling.metrics.functional as F
from danling.metrics import (
    GlobalMetrics,
    NonFinitePredictionWarning,
    OnlineMetrics,
    StreamMetrics,
    UndefinedMetricWarning,
)

MODES = {"global": GlobalMetrics, "online": OnlineMetrics, "stream": StreamMetrics}
EXACT = [GlobalMetrics, OnlineMetrics]
T = torch.tensor
EVERYTHING = {
    "binary": [
        getattr(F, n)() for n in F.__all__ if n.startswith("binary_") and n not in ("binary_f1", "binary_fbeta")
    ],
    "multiclass": [getattr(F, n)(6) for n in F.__all__ if n.startswith("multiclass_")],
    "multilabel": [getattr(F, n)(6) for n in F.__all__ if n.startswith("multilabel_")],
    "regression": [F.mse(), F.rmse(), F.mae(), F.mape(), F.r2_score(), F.explained_variance(), F.pearson()],
}


def read(metric, x, y, container=GlobalMetrics, **options):
    metrics = container(metric, **options)
    metrics.update(x, y)
    return metrics.average()[metric.name]


@pytest.mark.parametrize("container", MODES.values(), ids=MODES)
@pytest.mark.parametrize("task", EVERYTHING)
@pytest.mark.parametrize("state", ["never updated", "zero rows", "all ignored"])
def test_without_data_everything_is_nan_in_silence(task, container, state):
    metrics = container(EVERYTHING[task])
    shape = {"binary": (0,), "regression": (0,)}.get(task, (0, 6))
    if state == "zero rows":
        metrics.update(
            torch.empty(shape),
            torch.empty(
                shape if task != "multiclass" else (0,), dtype=torch.float32 if task == "regression" else torch.int64
            ),
        )
    if state == "all ignored":
        if task == "regression":
            pytest.skip("regression ignores NaN targets only on request")
        rows = (3, *shape[1:])
        metrics.update(torch.rand(rows), torch.full(rows if task != "multiclass" else (3,), -100))
    for values in (metrics.average(), metrics.value()):
        assert list(values) == [m.name for m in EVERYTHING[task]]
        assert all(math.isnan(v) for v in values.values()), values


@pytest.mark.parametrize("container", EXACT)
def test_zero_denominators(container):
    x, y = T([0.1, 0.2]), T([0, 0])
    for build in (F.binary_precision, F.binary_recall, F.binary_f1_score, F.binary_fbeta_score, F.binary_jaccard_index):
        assert read(build(), x, y, container) == 0.0
        assert read(build(zero_division=0.5), x, y, container) == 0.5
    assert read(F.binary_specificity(), T([0.9]), T([1]), container) == 0.0


@pytest.mark.parametrize("container", EXACT)
def test_macro_leaves_out_absent_classes(container):
    x = torch.eye(4)[[0, 1, 1]]
    y = T([0, 1, 0])
    # Classes 2 and 3 occur nowhere; recalls are 1/2 and 1.
    assert read(F.multiclass_recall(4), x, y, container) == 0.75
    # A class that is predicted but never occurs counts as 0 for macro accuracy, and not at all when balanced.
    assert read(F.multiclass_accuracy(4), torch.eye(4)[[0, 2]], T([0, 0]), container) == 0.25
    assert read(F.multiclass_balanced_accuracy(4), torch.eye(4)[[0, 2]], T([0, 0]), container) == 0.5
    # Multilabel keeps all labels.
    assert read(F.multilabel_recall(2), T([[0.9, 0.1]]), T([[1, 0]]), container) == 0.5


@pytest.mark.parametrize("container", EXACT)
def test_one_class_only(container):
    x = T([0.2, 0.7])
    for y, auroc, auprc in ((T([1, 1]), math.nan, 1.0), (T([0, 0]), math.nan, math.nan)):
        with pytest.warns(UndefinedMetricWarning, match="AUROC is undefined"):
            assert math.isnan(read(F.binary_auroc(), x, y, container)) == math.isnan(auroc)
        if math.isnan(auprc):
            with pytest.warns(UndefinedMetricWarning, match="no positives"):
                assert math.isnan(read(F.binary_auprc(), x, y, container))
        else:
            assert read(F.binary_auprc(), x, y, container) == auprc


@pytest.mark.parametrize("container", EXACT)
def test_macro_ranking_averages_over_defined_classes(container):
    x, y = torch.eye(3)[[0, 1, 1]], T([0, 1, 0])
    with pytest.warns(UndefinedMetricWarning, match="AUROC of class 2"):
        assert read(F.multiclass_auroc(3), x, y, container) == pytest.approx(0.75)
    with pytest.warns(UndefinedMetricWarning):
        vector = read(F.multiclass_auroc(3, average=None), x, y, container)
    assert torch.allclose(vector, T([0.75, 0.75, math.nan], dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("container", EXACT)
def test_agreement_of_one_class(container):
    x, y = T([0.9, 0.8]), T([1, 1])
    assert read(F.mcc(), x, y, container) == 0.0
    assert math.isnan(read(F.binary_cohen_kappa(), x, y, container))
    assert read(F.mcc(task="multiclass", num_classes=3), torch.eye(3)[[0, 1]], T([0, 0]), container) == 0.0


@pytest.mark.parametrize("container", EXACT)
@pytest.mark.parametrize("offset", [0.0, 0.1, 1e6])
def test_constant_targets(container, offset):
    y = torch.full((7,), offset, dtype=torch.float64)
    metrics = container(F.r2_score(), F.explained_variance())
    for row in y:
        metrics.update(row[None], row[None])  # the merged state of constant data is constant
    assert metrics.average() == {"r2": 1.0, "explained_variance": 1.0}
    metrics.update(y[:1] + 1, y[:1])
    assert metrics.average() == {"r2": 0.0, "explained_variance": 0.0}
    assert math.isnan(read(F.r2_score(), y[:1], y[:1] + 1, container))
    with pytest.warns(UndefinedMetricWarning, match="Pearson"):
        assert math.isnan(read(F.pearson(), torch.arange(7.0).double(), y, container))


def test_rank_correlation_of_constants():
    x = torch.arange(4.0)
    for metric in (F.spearman(), F.kendall()):
        with pytest.warns(UndefinedMetricWarning, match="constant"):
            assert math.isnan(read(metric, x, torch.ones(4)))
        assert read(metric, x, x * 2 + 1) == pytest.approx(1.0)


@pytest.mark.parametrize("container", EXACT)
def test_pearson_keeps_nine_digits_at_an_offset(container):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5000, generator=g, dtype=torch.float64)
    x, y = a + 1e6, 0.5 * a + b + 1e6
    metrics = container(F.pearson())
    for i in range(0, 5000, 61):
        metrics.update(x[i : i + 61], y[i : i + 61])
    exact = torch.corrcoef(torch.stack([x - 1e6, y - 1e6]))[0, 1].item()
    assert metrics.avg.pearson == pytest.approx(exact, rel=1e-9)


def test_ndcg_without_relevant_documents():
    assert read(F.ndcg(), T([[0.3, 0.2], [0.9, 0.1]]), T([[0, 0], [1, 0]])) == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_nan_scores_never_pass_for_a_negative(mode):
    metrics = MODES[mode](F.binary_accuracy(), F.binary_auroc(), F.binary_log_loss())
    metrics.update(T([0.9, 0.1]), T([1, 0]))
    metrics.update(T([0.9, math.nan]), T([1, 0]))
    with pytest.warns(NonFinitePredictionWarning, match="^1 valid"):
        values = metrics.average()
    assert all(math.isnan(v) for v in values.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = metrics.average()  # cached: one warning per read of new data
    assert all(math.isnan(v) for v in again.values())


def test_nan_in_ignored_rows_is_no_matter():
    assert read(F.binary_accuracy(), T([0.9, math.nan]), T([1, -100])) == 1.0


@pytest.mark.parametrize("container", EXACT)
def test_infinite_logits(container):
    x = T([[math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 3.0], [1e6, -1e6, 0.0]])
    y = T([0, 2, 0])
    values = container(F.multiclass_accuracy(3, average="micro"), F.multiclass_log_loss(3), from_logits=True)
    values.update(x, y)
    assert values.average() == {"acc": 1.0, "log_loss": 0.0}


@pytest.mark.parametrize("container", MODES.values(), ids=MODES)
def test_what_is_a_logit_is_decided_over_all_data(container):
    metrics = container(F.binary_accuracy(), F.binary_log_loss())
    metrics.update(T([0.3, 0.4]), T([1, 1]))  # as probabilities both wrong, as logits both right
    assert metrics.val.acc == metrics.avg.acc == 0.0
    metrics.update(T([-3.0, 3.0]), T([0, 1]))
    assert metrics.avg.acc == 1.0
    metrics.update(T([0.3, 0.4]), T([1, 1]))
    assert metrics.val.acc == metrics.avg.acc == 1.0
    metrics.reset()
    metrics.update(T([0.3, 0.4]), T([1, 1]))
    assert metrics.avg.acc == 0.0


@pytest.mark.parametrize("container", MODES.values(), ids=MODES)
def test_probabilities_that_are_none(container):
    metrics = container(F.binary_accuracy(), from_logits=False)
    metrics.update(T([0.3, 1.4]), T([1, 1]))
    with pytest.raises(ValueError, match="from_logits=False"):
        metrics.average()


def test_threshold_is_strict():
    assert read(F.binary_accuracy(threshold=0.5), T([0.5]), T([1])) == 0.0
    assert read(F.binary_accuracy(threshold=0.5), T([0.0, 9.0]), T([1, 1])) == 0.5  # sigmoid(0) is not above 0.5
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 4
    for threshold in (0.1, 0.3, 0.9):
        expected = (logits.sigmoid() > threshold).double().mean().item()
        ours = read(
            F.binary_accuracy(threshold=threshold), logits, torch.ones(2000, dtype=torch.long), from_logits=True
        )
        assert ours == pytest.approx(expected, abs=1e-12)


def test_micro_accuracy_is_the_share_of_correct_rows():
    x = torch.eye(3)[[0, 0, 0, 1]]
    assert F.accuracy(x, T([0, 0, 1, 1]), num_classes=3, average="micro") == 0.75


def test_several_thresholds_and_ignored_values_in_one_container():
    metrics = GlobalMetrics(
        low=F.binary_accuracy(threshold=0.3),
        high=F.binary_accuracy(threshold=0.5),
        all=F.binary_accuracy(ignore_index=None),
        not_one=F.binary_accuracy(ignore_index=1),
    )
    metrics.update(T([0.4, 0.9, 0.1]), T([1, 1, 0]))
    assert metrics.avg.round(4) == {"low": 1.0, "high": 0.6667, "all": 0.6667, "not_one": 1.0}


@pytest.mark.parametrize("deviation", [0.01, 0.5, 2.0, 10.0])
def test_online_rankings_are_within_their_error_bound(deviation):
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, 3, (3000,), generator=g)
    x = deviation * (torch.randn(3000, 3, generator=g) + torch.nn.functional.one_hot(y, 3))
    metrics = [F.multiclass_auroc(3), F.multiclass_auprc(3), F.multiclass_auroc(3, average=None, name="each")]
    online, exact = OnlineMetrics(metrics, from_logits=True), GlobalMetrics(metrics, from_logits=True)
    for container in (online, exact):
        for i in range(0, 3000, 100):
            container.update(x[i : i + 100], y[i : i + 100])
    bound = online.error_bound()
    for name in ("auroc", "auprc"):
        assert abs(online.avg[name] - exact.avg[name]) <= bound[name] + 1e-12
    assert ((online.avg.each - exact.avg.each).abs() <= bound.each + 1e-12).all()
    # Softmax scores of the largest deviation saturate at 1 in float32, where many of them share the last bin.
    assert bound.auroc <= {0.01: 0.05, 10.0: 2e-3}.get(deviation, 1e-3)
    if deviation >= 0.5:
        assert abs(online.avg.auroc - exact.avg.auroc) <= 1e-4


def test_online_refuses_what_needs_all_predictions():
    with pytest.raises(ValueError, match="spearman.*GlobalMetrics"):
        OnlineMetrics(F.spearman())
    with pytest.raises(ValueError, match="GlobalMetrics"):
        OnlineMetrics(lambda p, t: 0.0)


@pytest.mark.parametrize(
    "deviation, auroc, auprc",
    [(0.01, 0.025, 0.05), (0.5, 1e-3, 2e-3), (1.0, 1e-3, 2e-3), (4.0, 1e-3, 2e-3), (10.0, 1e-3, 2e-3)],
)
def test_documented_error_bounds(deviation, auroc, auprc):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (2000,), generator=g)
    x = deviation * (torch.randn(2000, generator=g) + y)
    online, exact = OnlineMetrics(F.binary_auroc(), F.binary_auprc()), GlobalMetrics(F.binary_auroc(), F.binary_auprc())
    for metrics in (online, exact):
        metrics.update(x, y)
    bound = online.error_bound()
    assert bound.auroc <= auroc and bound.auprc <= auprc
    assert abs(online.avg.auroc - exact.avg.auroc) <= (bound.auroc if deviation < 0.1 else 1e-4)
    assert abs(online.avg.auprc - exact.avg.auprc) <= bound.auprc
