"""Shapes, masks, nested inputs, dtypes and bad input."""

from __future__ import annotations

import math

import pytest
import torch

import danling.metrics.functional as F
from danling.metrics import (
    GlobalMetrics,
    MetricFunc,
    OnlineMetrics,
    StreamMetrics,
    multiclass_metrics,
    regression_metrics,
)
from danling.metrics import preprocess as P

T = torch.tensor
CONTAINERS = [GlobalMetrics, OnlineMetrics, StreamMetrics]


class Nested:
    """What is read of a NestedTensor: `concat`, `mask`, `mask_value`, `tensor`."""

    def __init__(self, elements, mask_value=False, padding=0):
        self.elements = elements
        self.mask_value = mask_value
        self.padding = padding

    @property
    def concat(self):
        return torch.cat(self.elements)

    @property
    def tensor(self):
        return torch.nn.utils.rnn.pad_sequence(self.elements, batch_first=True, padding_value=self.padding)

    @property
    def mask(self):
        lengths = T([len(e) for e in self.elements])
        inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return inside ^ self.mask_value


def ragged(seed=0, lengths=(3, 1, 5), classes=4):
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, classes, generator=g) for n in lengths]
    y = [torch.randint(0, classes, (n,), generator=g) for n in lengths]
    return x, y


def average(metrics, *args, **kwargs):
    metrics.update(*args, **kwargs)
    return metrics.average()


def make(cls, *metrics):
    metrics = metrics or (F.multiclass_accuracy(4), F.multiclass_log_loss(4), F.multiclass_exact_match(4))
    return cls(*metrics)


@pytest.mark.parametrize("mask_value", [False, True])
@pytest.mark.parametrize("sides", ["both", "scores", "targets", "dense with mask"])
@pytest.mark.parametrize("cls", CONTAINERS)
def test_nested_inputs_equal_per_element_computation(cls, sides, mask_value):
    x, y = ragged()
    expected = make(GlobalMetrics)
    for a, b in zip(x, y):
        expected.update(a[None], b[None], mask=torch.ones(1, len(b), dtype=torch.bool))
    nx, ny = Nested(x, mask_value, math.nan), Nested(y, mask_value, 99)  # no padding value may matter
    mask = nx.mask ^ mask_value
    given = {
        "both": (nx, ny),
        "scores": (nx, ny.tensor),
        "targets": (nx.tensor, ny),
        "dense with mask": (nx.tensor, ny.tensor),
    }[sides]
    metrics = make(cls)
    ours = average(metrics, *given, **({"mask": mask} if sides == "dense with mask" else {}))
    for name, value in expected.average().items():
        assert ours[name] == pytest.approx(value, rel=1e-6), name


def test_real_nested_tensors():
    tensors = pytest.importorskip("danling.tensors")
    if not hasattr(tensors, "NestedTensor"):
        pytest.skip("danling.tensors has no NestedTensor")
    x, y = ragged()
    expected = average(multiclass_metrics(4), torch.cat(x), torch.cat(y))
    for sides in ((tensors.NestedTensor(x), tensors.NestedTensor(y)), (Nested(x), tensors.NestedTensor(y))):
        assert average(multiclass_metrics(4), *sides) == expected


def test_nested_inputs_that_do_not_fit():
    x, y = ragged()
    _, other = ragged(lengths=(2, 2, 5))
    with pytest.raises(ValueError, match=r"\[3, 1, 5\].*\[2, 2, 5\]"):
        make(GlobalMetrics).update(Nested(x), Nested(other))
    with pytest.raises(ValueError, match="lengths"):
        make(GlobalMetrics).update(Nested(x), Nested(y[:2]))
    with pytest.raises(ValueError, match="mask of shape"):
        make(GlobalMetrics).update(Nested(x), torch.zeros(3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="brings its own"):
        make(GlobalMetrics).update(Nested(x), Nested(y), mask=torch.ones(3, 5, dtype=torch.bool))


def test_class_dims():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (5, 3), generator=g)
    last = torch.randn(5, 3, 4, generator=g)
    expected = average(multiclass_metrics(4), last.reshape(-1, 4), y.reshape(-1))
    assert average(multiclass_metrics(4), last, y) == expected  # (N, L, C)
    assert average(multiclass_metrics(4), last.movedim(-1, 1), y) == expected  # (N, C, L)
    images = torch.randn(2, 4, 6, 7, generator=g), torch.randint(0, 4, (2, 6, 7), generator=g)
    flat = images[0].movedim(1, -1).reshape(-1, 4), images[1].reshape(-1)
    assert average(multiclass_metrics(4), *images) == average(multiclass_metrics(4), *flat)


def test_ambiguous_class_dim():
    x, y = torch.randn(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*\(2, 4\).*channel_dim"):
        multiclass_metrics(4).update(x, y)
    first = average(multiclass_metrics(4, F.multiclass_accuracy(4, average="micro"), channel_dim=1), x, y)
    last = average(multiclass_metrics(4, F.multiclass_accuracy(4, average="micro"), channel_dim=-1), x, y)
    assert first.acc == (x.argmax(1) == y).double().mean() and last.acc == (x.argmax(2) == y).double().mean()


@pytest.mark.parametrize(
    "x, y",
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)),  # five classes instead of four
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 4, 2), torch.zeros(3, 3, dtype=torch.long)),
    ],
)
def test_shapes_that_do_not_fit(x, y):
    metrics = multiclass_metrics(4)
    with pytest.raises(ValueError, match="shape") as error:
        metrics.update(x, y)
    assert str(tuple(x.shape)) in str(error.value) and str(tuple(y.shape)) in str(error.value)
    assert metrics.count == 0


def test_single_samples_and_columns():
    one = average(multiclass_metrics(4, F.multiclass_accuracy(4, average="micro")), torch.eye(4)[2], T(2))
    assert one.acc == 1.0
    assert F.accuracy(T([[0.9], [0.2]]), T([1, 1])) == 0.5
    assert F.accuracy(T([0.9, 0.2]), T([[1], [1]])) == 0.5
    assert F.accuracy(torch.eye(4)[[1, 2]], T([[1], [1]]), num_classes=4, average="micro") == 0.5
    assert F.accuracy(T([[0.9]]), T([[1]])) == 1.0  # the batch dim is never squeezed away
    labels = GlobalMetrics(F.multiclass_accuracy(4, average="micro"))
    assert average(labels, T([1, 2, 3]), T([1, 2, 0])).acc == pytest.approx(2 / 3)


def test_zero_rows_have_any_number_of_classes():
    metrics = multiclass_metrics(4)
    metrics.update(torch.empty(0, 7), torch.empty(0, dtype=torch.long))
    metrics.update(torch.eye(4), torch.arange(4))
    assert metrics.avg.acc == 1.0


def test_sequences():
    assert F.accuracy([0.9, 0.1, 0.8], [1, 0, 0]) == pytest.approx(2 / 3)
    assert F.accuracy([T([0.9, 0.1]), T([0.8])], [T([1, 0]), T([0])]) == pytest.approx(2 / 3)
    assert F.accuracy([], [], task="binary") != F.accuracy([], [], task="binary")  # NaN


def test_partly_ignored_labels():
    x, y = T([[0.9, 0.2], [0.8, 0.7]]), T([[1, -100], [0, 1]])
    assert F.accuracy(x, y, num_labels=2, average="micro") == pytest.approx(2 / 3)
    assert F.exact_match(x, y, num_labels=2) == 0.5


def test_masks():
    x, y = torch.eye(4)[[0, 1, 2, 3]], T([0, 0, 2, 9])
    mask = T([True, True, True, False])
    for cls in CONTAINERS:
        metrics = cls(F.multiclass_accuracy(4, average="micro"))
        assert average(metrics, x, y, mask=mask).acc == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="mask of shape"):
        multiclass_metrics(4).update(x, y, mask=mask[:3])
    with pytest.raises(TypeError, match="bool"):
        multiclass_metrics(4).update(x, y, mask=mask.float())


def test_masks_from_the_second_batch_on():
    metrics = GlobalMetrics(F.multiclass_auroc(4), acc=F.multiclass_accuracy(4, average="micro"))
    x = torch.eye(4)
    metrics.update(x, torch.arange(4))
    metrics.update(x, torch.zeros(4, dtype=torch.long), mask=T([True, False, False, False]))
    metrics.update(x, torch.arange(4))
    assert metrics.avg.acc == 1.0 and metrics.count == 9


@pytest.mark.parametrize("cls", CONTAINERS)
@pytest.mark.parametrize(
    "metric, x, y",
    [
        (F.multiclass_accuracy(4), torch.eye(4), T([0, 1, 4, -1])),
        (F.binary_accuracy(), T([0.1, 0.2, 0.3]), T([0, 2, 7])),
        (F.multilabel_accuracy(2), torch.rand(2, 2), T([[0, 3], [-1, 1]])),
    ],
)
def test_targets_out_of_range_raise_when_read(cls, metric, x, y):
    metrics = cls(metric)
    metrics.update(x, y)
    for read in (metrics.average, metrics.value, metrics.average):
        with pytest.raises(ValueError, match="2 target values are out of range"):
            read()
    metrics.reset()
    assert math.isnan(metrics.average()[metric.name])


def test_labels_out_of_range_and_no_scores():
    metrics = GlobalMetrics(F.multiclass_accuracy(4))
    metrics.update(T([0, 5]), T([0, 1]))
    with pytest.raises(ValueError, match="1 predicted labels"):
        metrics.average()
    with pytest.raises(ValueError, match="needs? scores"):
        F.auroc(T([0, 1]), T([0, 1]), num_classes=3)


def test_wrong_types():
    with pytest.raises(TypeError, match="integers, got torch.float32"):
        multiclass_metrics(4).update(torch.rand(2, 4), torch.rand(2))
    with pytest.raises(TypeError, match="floating point.*torch.int64"):
        regression_metrics().update(torch.rand(2), T([1, 2]))
    with pytest.raises(TypeError, match="input must be"):
        multiclass_metrics(4).update("text", T([1]))
    with pytest.raises(TypeError, match="input must hold numbers"):
        multiclass_metrics(4).update(["a"], T([1]))
    with pytest.raises(ValueError, match="meta.*cpu|cpu.*meta"):
        multiclass_metrics(4).update(torch.empty(2, 4, device="meta"), T([1, 2]))
    with pytest.raises(ValueError, match="from_logits"):
        GlobalMetrics(F.binary_accuracy(), from_logits="maybe")


def test_rows_of_another_kind():
    metrics = GlobalMetrics(F.multiclass_auroc(4), F.multiclass_accuracy(4))
    metrics.update(torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match="earlier"):
        metrics.update(torch.arange(4), torch.arange(4))
    assert metrics.count == 4


def test_given_tensors_are_copied():
    for cls in CONTAINERS:
        x, y = torch.eye(4).clone(), torch.arange(4)
        metrics = cls(F.multiclass_accuracy(4))
        metrics.update(x, y)
        x.zero_(), y.zero_()
        assert metrics.avg.acc == metrics.val.acc == 1.0


def test_updates_under_autograd_and_inference_mode():
    for cls in CONTAINERS:
        metrics = cls(F.multiclass_accuracy(4), F.multiclass_auroc(4))
        with torch.inference_mode():
            metrics.update(torch.eye(4), torch.arange(4))
        scores = torch.eye(4, requires_grad=True)
        metrics.update(scores * 1.0, torch.arange(4))
        with torch.inference_mode():
            metrics.update(torch.eye(4), torch.arange(4))
        assert metrics.avg.acc == 1.0


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for cls in CONTAINERS:
            metrics = cls(F.multiclass_calibration_error(4), F.multiclass_auroc(4))
            assert average(metrics, torch.eye(4), torch.arange(4)).auroc == 1.0
    finally:
        torch.use_deterministic_algorithms(False)


def test_dtypes_are_promoted():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        metrics = multiclass_metrics(4)
        metrics.update(torch.eye(4), torch.arange(4))
        metrics.update(torch.eye(4).to(dtype), torch.arange(4, dtype=torch.int32))
        assert metrics.avg.acc == 1.0
    assert F.accuracy(T([True, False]), T([True, True])) == 0.5
    assert F.accuracy(T([0.9, 0.1]), T([1.0, 0.0])) == 1.0


def test_preprocess_runs_first():
    metrics = GlobalMetrics(F.binary_accuracy(), preprocess=lambda x, y: (x["scores"], y["labels"]))
    assert average(metrics, {"scores": T([0.9])}, {"labels": T([1])}).acc == 1.0
    with pytest.raises(TypeError, match="preprocess"):
        GlobalMetrics(F.binary_accuracy(), preprocess="base")
    assert average(StreamMetrics(F.binary_accuracy(), preprocess=P.base_preprocess), T([0.9]), T([1])).acc == 1.0


def test_preprocess_functions():
    x, y = P.preprocess_classification(T([[2.0, 0.0]]), T([1]), num_classes=2)
    assert torch.allclose(x, T([[2.0, 0.0]]).softmax(1)) and y.tolist() == [1]
    x, y = P.preprocess_classification(T([[2.0, 0.0]]), T([[1, -100]]), num_labels=2)
    assert torch.allclose(x, T([[2.0, 0.0]]).sigmoid())
    assert P.preprocess_binary(T([0.2, 0.4]), T([0, -100]))[0].tolist() == pytest.approx([0.2])
    with pytest.raises(ValueError, match="out of range"):
        P.preprocess_multiclass(torch.eye(3), T([0, 1, 3]), 3)
    nested = P.base_preprocess(Nested([T([1.0]), T([2.0, 3.0])]), Nested([T([1]), T([2, 3])]))
    assert nested[0].tolist() == [1.0, 2.0, 3.0] and nested[1].tolist() == [1, 2, 3]


def test_plain_callables_get_the_valid_rows_as_given():
    seen = []

    def spy(preds, targets):
        seen.append((preds.clone(), targets.clone()))
        return 0.0

    for cls in (GlobalMetrics, StreamMetrics):
        seen.clear()
        metrics = cls(F.multiclass_accuracy(3), spy)
        metrics.update(T([[5.0, 1, 0], [0, 7, 0]]), T([0, -100]))
        metrics.average()
        assert seen[0][0].tolist() == [[5.0, 1.0, 0.0]] and seen[0][1].tolist() == [0]


def test_callables_without_a_task():
    error = {"own": lambda p, t: (p - t).abs().mean()}
    for cls in (GlobalMetrics, StreamMetrics):
        for shape in ((4,), (4, 3), (2, 3, 5), ()):
            x, y = torch.rand(shape), torch.rand(shape)
            assert average(cls(**error), x, y).own == pytest.approx((x - y).abs().mean().item()), shape
        # A column is aligned and not broadcast against a vector; -100.0 is a number like any other.
        assert average(cls(**error), T([[1.0], [2.0]]), T([1.0, -100.0])).own == 51.0
        with_task = cls(F.mse(), **error)
        assert average(with_task, T([1.0, 2.0]), T([1.0, -100.0])).own == 51.0 and with_task.avg.mse == 102.0**2 / 2


def test_own_descriptor_of_moments():
    class Bias(MetricFunc):
        def __init__(self):
            super().__init__(name="bias", moments=True, task="regression")

        def __call__(self, state):
            return -state.moments.mean_error

    for cls in CONTAINERS:
        assert average(cls(Bias()), T([1.0, 5.0]), T([0.0, -100.0])).bias == 53.0
