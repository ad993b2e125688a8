"""Values against scikit-learn and torchmetrics, on random, imbalanced, tied and degenerate data."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tmf
import torchmetrics.functional.classification as tmc

import danling.metrics.functional as F
from danling.metrics import GlobalMetrics, OnlineMetrics, StreamMetrics

C = 5
DATA = ("random", "imbalanced", "tied", "missing class", "perfect", "half precision")


def multiclass(kind: str, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(DATA.index(kind))
    y = torch.randint(0, C, (n,), generator=g)
    x = torch.randn(n, C, generator=g)
    if kind == "imbalanced":
        y = torch.where(torch.rand(n, generator=g) < 0.9, 0, y)
    if kind == "tied":
        x = x.round()
    if kind == "missing class":
        y = y.clamp(max=C - 2)
    if kind == "perfect":
        x = torch.nn.functional.one_hot(y, C) * 4.0
    if kind == "half precision":
        x = x.half().float()
    return x.softmax(1), y


def binary(kind: str, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(DATA.index(kind) + 10)
    y = (torch.rand(n, generator=g) < (0.03 if kind == "imbalanced" else 0.4)).long()
    y[0], y[1] = 1, 0
    p = torch.rand(n, generator=g)
    if kind == "tied":
        p = (p * 4).round() / 4
    if kind == "perfect":
        p = y * 0.5 + 0.3
    return p, y


def multilabel(kind: str, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [binary(kind, n) for _ in range(3)]
    g = torch.Generator().manual_seed(7)
    rows = [torch.randperm(n, generator=g) for _ in parts]
    return torch.stack([p[r] for (p, _), r in zip(parts, rows)], 1), torch.stack(
        [t[r] for (_, t), r in zip(parts, rows)], 1
    )


def value(metric, x, y, **options):
    containers = [GlobalMetrics(metric, **options)]
    if not metric.scores and not metric.preds_targets:
        containers.append(OnlineMetrics(metric, **options))
    values = []
    for container in containers:
        for i in range(0, len(x), 37):
            container.update(x[i : i + 37], y[i : i + 37])
        values.append(container.average()[metric.name])
    if len(values) == 2:
        torch.testing.assert_close(torch.as_tensor(values[0]), torch.as_tensor(values[1]), rtol=1e-9, atol=1e-12)
    return values[0]


def close(ours, theirs, tolerance=1e-6):
    np.testing.assert_allclose(
        np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float), atol=tolerance, rtol=tolerance
    )


AVERAGES = ("micro", "macro", "weighted", None)
SK = {
    "precision": sk.precision_score,
    "recall": sk.recall_score,
    "f1_score": sk.f1_score,
    "jaccard_index": sk.jaccard_score,
}
TM = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
    "f1_score": "f1_score",
    "fbeta_score": "fbeta_score",
    "hamming_loss": "hamming_distance",
    "jaccard_index": "jaccard_index",
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("suffix", TM)
def test_multiclass_counts(suffix, kind):
    x, y = multiclass(kind)
    for average in AVERAGES:
        extra = {"beta": 2.0} if suffix == "fbeta_score" else {}
        ours = value(getattr(F, f"multiclass_{suffix}")(C, average=average, **extra), x, y)
        reference = getattr(tmc, f"multiclass_{TM[suffix]}")
        theirs = reference(x, y, num_classes=C, average=average or "none", **extra)
        close(ours, theirs)
        if suffix in SK and average is not None and kind != "missing class":
            close(ours, SK[suffix](y, x.argmax(1), average=average, zero_division=0))


@pytest.mark.parametrize("suffix", TM)
def test_two_classes_are_not_binary(suffix):
    x, y = multiclass("random")
    x, y = x[:, :2].softmax(1), y.clamp(max=1)
    for average in AVERAGES:
        extra = {"beta": 2.0} if suffix == "fbeta_score" else {}
        ours = value(getattr(F, f"multiclass_{suffix}")(2, average=average, **extra), x, y)
        reference = getattr(tmc, f"multiclass_{TM[suffix]}")
        close(ours, reference(x, y, num_classes=2, average=average or "none", **extra))
    close(value(F.multiclass_balanced_accuracy(2), x, y), sk.balanced_accuracy_score(y, x.argmax(1)))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("suffix", ["accuracy", "precision", "recall", "f1_score"])
def test_multiclass_top_k(suffix, k):
    x, y = multiclass("random")
    for average in ("micro", "macro"):
        ours = value(getattr(F, f"multiclass_{suffix}")(C, average=average, k=k), x, y)
        close(ours, getattr(tmc, f"multiclass_{suffix}")(x, y, num_classes=C, average=average, top_k=k))
    close(value(F.multiclass_top_k_accuracy(C, k=k), x, y), sk.top_k_accuracy_score(y, x, k=k))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("suffix", TM)
def test_binary_counts(suffix, kind):
    x, y = binary(kind)
    for threshold in (0.3, 0.5):
        ours = value(getattr(F, f"binary_{suffix}")(threshold=threshold), x, y)
        extra = {"beta": 1.0} if suffix == "fbeta_score" else {}
        close(ours, getattr(tmc, f"binary_{TM[suffix]}")(x, y, threshold=threshold, **extra))
        if suffix in SK:
            close(ours, SK[suffix](y, x > threshold, zero_division=0))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("suffix", TM)
def test_multilabel_counts(suffix, kind):
    x, y = multilabel(kind)
    for average in AVERAGES:
        extra = {"beta": 1.0} if suffix == "fbeta_score" else {}
        ours = value(getattr(F, f"multilabel_{suffix}")(3, average=average), x, y)
        close(ours, getattr(tmc, f"multilabel_{TM[suffix]}")(x, y, num_labels=3, average=average or "none", **extra))
        if suffix in SK:
            close(ours, SK[suffix](y, x > 0.5, average=average, zero_division=0))


@pytest.mark.parametrize("kind", DATA)
def test_balanced_accuracy_kappa_mcc(kind):
    x, y = multiclass(kind)
    labels = x.argmax(1)
    close(value(F.multiclass_balanced_accuracy(C), x, y), _quiet(sk.balanced_accuracy_score, y, labels))
    for weights in (None, "linear", "quadratic"):
        ours = value(F.multiclass_cohen_kappa(C, weights=weights), x, y)
        close(ours, sk.cohen_kappa_score(y, labels, weights=weights, labels=list(range(C))))
        close(ours, tmc.multiclass_cohen_kappa(x, y, num_classes=C, weights=weights or "none"))
    close(value(F.mcc(task="multiclass", num_classes=C), x, y), sk.matthews_corrcoef(y, labels))
    p, t = binary(kind)
    close(value(F.binary_balanced_accuracy(), p, t), sk.balanced_accuracy_score(t, p > 0.5))
    close(value(F.mcc(), p, t), sk.matthews_corrcoef(t, p > 0.5))
    close(value(F.binary_cohen_kappa(), p, t), sk.cohen_kappa_score(t, p > 0.5))
    p, t = multilabel(kind)
    close(value(F.mcc(task="multilabel", num_labels=3), p, t), sk.matthews_corrcoef(t.flatten(), p.flatten() > 0.5))
    each = [sk.balanced_accuracy_score(t[:, i], p[:, i] > 0.5) for i in range(3)]
    close(value(F.multilabel_balanced_accuracy(3, average=None), p, t), each)
    close(value(F.multilabel_balanced_accuracy(3), p, t), np.mean(each))


@pytest.mark.parametrize("kind", [k for k in DATA if k != "missing class"])
def test_rankings(kind):
    x, y = multiclass(kind)
    hot = torch.nn.functional.one_hot(y, C)
    for average in AVERAGES:
        close(value(F.multiclass_auroc(C, average=average), x, y), sk.roc_auc_score(hot, x, average=average))
        close(value(F.multiclass_auprc(C, average=average), x, y), sk.average_precision_score(hot, x, average=average))
    close(value(F.multiclass_auroc(C), x, y), tmc.multiclass_auroc(x, y, num_classes=C))
    close(value(F.multiclass_auprc(C), x, y), tmc.multiclass_average_precision(x, y, num_classes=C))
    p, t = binary(kind)
    close(value(F.binary_auroc(), p, t), sk.roc_auc_score(t, p))
    close(value(F.binary_auprc(), p, t), sk.average_precision_score(t, p))
    p, t = multilabel(kind)
    for average in AVERAGES:
        close(value(F.multilabel_auroc(3, average=average), p, t), sk.roc_auc_score(t, p, average=average))
        close(value(F.multilabel_auprc(3, average=average), p, t), sk.average_precision_score(t, p, average=average))


@pytest.mark.parametrize("kind", DATA)
def test_likelihood_and_calibration(kind):
    x, y = multiclass(kind)
    close(value(F.multiclass_log_loss(C), x, y), _quiet(sk.log_loss, y, x, labels=list(range(C))), 1e-5)
    logits = x.clamp(min=1e-6).log() - 1
    close(value(F.multiclass_log_loss(C), logits, y), torch.nn.functional.cross_entropy(logits, y), 1e-5)
    ours = value(F.perplexity(C), logits, y)
    close(ours, tmf.text.perplexity(logits[None], y[None]), 1e-4)
    for norm in ("l1", "l2", "max"):
        for bins in (10, 15):
            ours = value(F.multiclass_calibration_error(C, norm=norm, n_bins=bins), x, y)
            close(ours, tmc.multiclass_calibration_error(x, y, num_classes=C, norm=norm, n_bins=bins), 1e-5)
    p, t = binary(kind)
    eps = torch.finfo(torch.float32).eps
    close(value(F.binary_log_loss(), p, t), sk.log_loss(t, p.clamp(eps, 1 - eps).double()), 1e-5)
    for norm in ("l1", "l2", "max"):
        ours = value(F.binary_calibration_error(norm=norm), p, t)
        close(ours, tmc.binary_calibration_error(p, t, norm=norm, n_bins=15), 1e-5)
    p, t = multilabel(kind)
    loss = torch.nn.functional.binary_cross_entropy(p.clamp(eps, 1 - eps).double(), t.double())
    close(value(F.multilabel_log_loss(3), p, t), loss, 1e-5)


def test_exact_match():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (50, 2), generator=g)
    x = (torch.nn.functional.one_hot(y, 3) + torch.rand(50, 2, 3, generator=g) * 1.6).movedim(-1, 1)
    ours = value(F.multiclass_exact_match(3), x, y)
    assert 0 < ours < 1
    close(ours, tmc.multiclass_exact_match(x, y, num_classes=3))
    p, t = multilabel("random")
    close(value(F.multilabel_exact_match(3), p, t), tmc.multilabel_exact_match(p, t, num_labels=3))
    close(value(F.multilabel_exact_match(3), p, t), sk.accuracy_score(t, p > 0.5))


@pytest.mark.parametrize("top_k", [None, 3])
def test_ndcg(top_k):
    g = torch.Generator().manual_seed(0)
    scores, relevance = torch.rand(20, 8, generator=g), torch.randint(0, 4, (20, 8), generator=g)
    tied = (scores * 3).round()
    for s in (scores, tied):
        close(value(F.ndcg(top_k), s, relevance), sk.ndcg_score(relevance, s, k=top_k))


def regression(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    y = torch.randn(150, generator=g, dtype=torch.float64)
    x = 0.7 * y + 0.4 * torch.randn(150, generator=g, dtype=torch.float64)
    if kind == "tied":
        return x.round(), y.round()
    if kind == "offset":
        return x + 1e6, y + 1e6
    return x, y


@pytest.mark.parametrize("kind", ["random", "tied", "offset"])
def test_regression(kind):
    import scipy.stats

    x, y = regression(kind)
    references = {
        "mse": sk.mean_squared_error(y, x),
        "rmse": sk.root_mean_squared_error(y, x),
        "mae": sk.mean_absolute_error(y, x),
        "r2_score": sk.r2_score(y, x),
        "explained_variance": sk.explained_variance_score(y, x),
        "pearson": scipy.stats.pearsonr(x, y)[0],
        "spearman": scipy.stats.spearmanr(x, y)[0],
        "kendall": scipy.stats.kendalltau(x, y)[0],
    }
    for name, reference in references.items():
        close(value(getattr(F, name)(), x, y), reference, 1e-9)
    close(value(F.mape(), x, y), tmf.mean_absolute_percentage_error(x, y), 1e-6)


def test_regression_outputs():
    x, y = torch.rand(40, 3).double(), torch.rand(40, 3).double()
    for multioutput in ("uniform_average", "raw_values", "variance_weighted"):
        close(value(F.r2_score(3, multioutput=multioutput), x, y), sk.r2_score(y, x, multioutput=multioutput))
        ours = value(F.explained_variance(3, multioutput=multioutput), x, y)
        close(ours, sk.explained_variance_score(y, x, multioutput=multioutput))
    close(value(F.mse(3), x, y), sk.mean_squared_error(y, x, multioutput="raw_values"))
    close(value(F.spearman(3), x, y), tmf.spearman_corrcoef(x, y), 1e-6)


@pytest.mark.parametrize("reader", ["logits", "probabilities"])
def test_logits_and_probabilities_agree(reader):
    x, y = multiclass("random")
    logits = x.log()
    metrics = [F.multiclass_auroc(C), F.multiclass_auprc(C), F.multiclass_accuracy(C), F.multiclass_log_loss(C)]
    containers = [GlobalMetrics(metrics), GlobalMetrics(metrics), StreamMetrics(metrics), StreamMetrics(metrics)]
    for container, data in zip(containers, (x, logits, x, logits)):
        container.update(data, y)
    for a, b in ((0, 1), (2, 3)):
        for name in containers[a]:
            close(containers[a].average()[name], containers[b].average()[name])


def _quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
