"""Construction, factories, registry, multi-task, saving, merging, members of MetricMeters, plots."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import subprocess
import sys

import pytest
import torch
import torchmetrics

import danling.metrics.functional as F
from danling.metrics import (
    METRICS,
    GlobalMetrics,
    MetricFunc,
    MetricMeter,
    MetricMeters,
    MetricState,
    MultiTaskMetrics,
    OnlineMetrics,
    StreamMetrics,
    binary_metrics,
    multiclass_metrics,
    multilabel_metrics,
    regression_metrics,
)

T = torch.tensor
DEFAULT = ["auroc", "auprc", "acc", "f1", "mcc"]


def data(n=60, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g) + torch.nn.functional.one_hot(y, classes), y


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a, b):
    assert str(a.dict()) == str(b.dict())


def containers():
    x, y = data()
    task = MultiTaskMetrics(a=multiclass_metrics(4), b=F.multiclass_accuracy(4), aggregate="macro")
    built = {
        "global": multiclass_metrics(4),
        "counts": GlobalMetrics(F.multiclass_f1_score(4), F.multiclass_log_loss(4), F.multiclass_exact_match(4)),
        "online": multiclass_metrics(4, mode="online"),
        "stream": multiclass_metrics(4, mode="stream"),
        "meter": MetricMeter(F.multiclass_f1_score(4)),
    }
    for container in built.values():
        for i in range(0, 60, 13):
            container.update(x[i : i + 13], y[i : i + 13])
    task.update({"a": (x, y), "b": {"input": x[:30], "target": y[:30]}})
    return {**built, "tasks": task}


@pytest.mark.parametrize("name", containers())
def test_saving_and_copying(name):
    container = containers()[name]
    fresh = copy.deepcopy(container)
    fresh.reset()
    state = saved(container.state_dict())
    fresh.load_state_dict(state)
    copies = [fresh, copy.deepcopy(container), pickle.loads(pickle.dumps(container))]
    x, y = data(20, seed=1)
    update = {"a": (x, y)} if name == "tasks" else None
    for read in ("value", "average"):
        for other in copies:
            assert str(getattr(other, read)()) == str(getattr(container, read)()), read
    assert str(fresh.count) == str(container.count)
    for c in (container, *copies):  # and they go on alike
        c.update(update) if update else c.update(x, y)
    for other in copies:
        assert str(other.average()) == str(container.average())
    container.reset()
    fresh.load_state_dict(state)
    assert str(fresh.count) != str(container.count)


@pytest.mark.parametrize("name", ["global", "counts", "online", "stream", "meter", "tasks"])
def test_merging(name):
    a, b = containers()[name], containers()[name]
    before = str(b.average())
    merged = a.merge(b)
    assert merged is a and str(b.average()) == before
    if name not in ("tasks", "meter", "stream"):
        assert a.count == 2 * b.count
    if name == "meter":
        assert a.avg == pytest.approx(b.avg)
    else:
        for (path, ours), (_, theirs) in zip(a.avg.leaves(), b.avg.leaves()):
            assert ours == pytest.approx(theirs, rel=1e-9), path  # twice the same data
    empty = containers()[name]
    empty.reset()
    value = containers()[name].value()
    assert str(empty.merge(containers()[name]).value()) == str(value)


def test_states_of_other_metrics_are_refused():
    state = GlobalMetrics(F.binary_accuracy()).state_dict()
    with pytest.raises(ValueError, match="metrics.acc.threshold.*0.5.*0.3"):
        GlobalMetrics(F.binary_accuracy(threshold=0.3)).load_state_dict(state)
    with pytest.raises(ValueError, match="class"):
        OnlineMetrics(F.binary_accuracy()).load_state_dict(state)
    with pytest.raises(ValueError, match="metrics.f1"):
        GlobalMetrics(F.binary_accuracy()).merge(GlobalMetrics(F.binary_accuracy(), F.binary_f1_score()))
    with pytest.raises(ValueError):
        GlobalMetrics(F.binary_accuracy()).load_state_dict({"version": 2})


def test_to_keeps_values():
    for name, container in containers().items():
        before = str(container.average())
        assert container.to("cpu") is container
        assert str(container.average()) == before, name


def test_names():
    metrics = GlobalMetrics([F.binary_accuracy()], (F.binary_recall(),), best=F.binary_f1_score())
    assert list(metrics) == ["acc", "recall", "best"] and len(metrics) == 3 and "best" in metrics
    assert metrics.higher_is_better == {"acc": True, "recall": True, "best": True}
    with pytest.raises(ValueError, match="two metrics.*'acc'"):
        GlobalMetrics(F.binary_accuracy(), F.binary_accuracy(threshold=0.3))
    with pytest.raises(ValueError, match="two metrics.*'acc'"):
        GlobalMetrics(F.binary_accuracy(), acc=F.binary_accuracy())
    with pytest.raises(ValueError, match="at least one"):
        GlobalMetrics()
    with pytest.raises(TypeError, match="MetricMeters"):
        GlobalMetrics(torchmetrics.MeanMetric())
    with pytest.raises(TypeError, match="callable"):
        GlobalMetrics("accuracy")


def test_two_tasks_in_one_container():
    metrics = GlobalMetrics(F.binary_accuracy(), F.mse())
    x, y = T([0.9, 0.2]), T([1.0, 0.0])
    metrics.update(x, y)
    assert metrics.avg.acc == 1.0 and metrics.avg.mse == pytest.approx(0.025)
    with pytest.raises(TypeError):  # regression needs floats: nothing is updated
        metrics.update(x, y.long())
    assert metrics.count == 2


def test_descriptor_reads_a_plain_state():
    state = MetricState(preds=T([[0.9, 0.1], [0.2, 0.8]]), targets=T([0, 0]))
    assert F.multiclass_accuracy(2, average="micro")(state) == 0.5
    assert F.multiclass_recall(2, average="micro")(MetricState(confmat=T([[1, 1], [0, 0]]))) == 0.5
    with pytest.raises(AttributeError, match="did not declare"):
        MetricState().moments  # noqa: B018


def test_own_descriptor_sees_probabilities():
    class Confidence(MetricFunc):
        def __init__(self):
            super().__init__(name="confidence", preds_targets=True, task="multiclass", num_classes=2)

        def __call__(self, state):
            return state.preds.amax(1).mean()

    for cls in (GlobalMetrics, StreamMetrics):
        metrics = cls(Confidence())
        metrics.update(T([[4.0, 0.0]]), T([0]))
        assert metrics.avg.confidence == pytest.approx(T([4.0]).sigmoid().item())


def test_bad_descriptors():
    for build in (
        lambda: F.multiclass_accuracy(4, average="mean"),
        lambda: F.multiclass_accuracy(0),
        lambda: F.multiclass_accuracy(4, k=5),
        lambda: F.multiclass_balanced_accuracy(4, k=2),
        lambda: F.multiclass_balanced_accuracy(4, average="micro"),
        lambda: F.binary_cohen_kappa(weights="cubic"),
        lambda: F.binary_calibration_error(norm="l3"),
        lambda: F.r2_score(multioutput="mean"),
        lambda: F.mcc(task="regression"),
        lambda: F.mcc(task="multiclass"),
        lambda: F.ndcg(0),
        lambda: MetricFunc(name="x", task="other"),
    ):
        with pytest.raises(ValueError):
            build()
    with pytest.raises(TypeError, match="threshold_"):
        F.binary_accuracy(threshold_=0.2)


@pytest.mark.parametrize("mode, cls", [("global", GlobalMetrics), ("online", OnlineMetrics), ("stream", StreamMetrics)])
def test_factories(mode, cls):
    for metrics in (binary_metrics(mode=mode), multiclass_metrics(3, mode=mode), multilabel_metrics(3, mode=mode)):
        assert type(metrics) is cls and list(metrics) == DEFAULT
    assert list(regression_metrics(mode=mode))[1] == ("mae" if mode == "online" else "spearman")
    replaced = multiclass_metrics(3, F.multiclass_recall(3), mode=mode, top=F.multiclass_top_k_accuracy(3, k=2))
    assert list(replaced) == ["recall", "top"]
    overridden = multiclass_metrics(3, mode=mode, acc=F.multiclass_accuracy(3, average="micro"))
    assert list(overridden) == DEFAULT


def test_factories_refuse():
    with pytest.raises(ValueError, match="mode"):
        binary_metrics(mode="batch")
    with pytest.raises(TypeError, match="keyword-only"):
        multiclass_metrics(3, "micro")
    with pytest.raises(TypeError, match="keyword-only"):
        regression_metrics(1, False)
    with pytest.raises(TypeError, match="num_classes"):
        multiclass_metrics(F.multiclass_accuracy(3))


def test_registry():
    assert type(METRICS.build("MultiClass", num_classes=10, mode="online")) is OnlineMetrics
    assert list(METRICS.build("multiclass", num_labels=3)) == DEFAULT
    assert list(METRICS.build("regression"))[0] == "pearson"
    assert list(METRICS.build("multilabel", num_labels=2)) == DEFAULT
    assert list(METRICS.build("binary", num_outputs=None)) == DEFAULT
    with pytest.raises(ValueError, match="multiclass"):
        METRICS.build("multiclas", num_classes=3)
    for kwargs in ({"num_classes": 0}, {"num_classes": 3, "num_labels": 4}, {}, {"num_classes": "3"}):
        with pytest.raises(ValueError):
            METRICS.build("multiclass", **kwargs)


def test_members_of_metric_meters():
    x, y = data()
    p = x.softmax(1)

    class Mine:
        def __init__(self):
            self.reset()

        def update(self, preds, targets):
            self.hits += int((preds.argmax(1) == targets).sum())
            self.total += len(targets)

        def compute(self):
            return self.hits / self.total

        def reset(self):
            self.hits = self.total = 0

    reference = torchmetrics.Accuracy(task="multiclass", num_classes=4, average="micro")
    meters = MetricMeters({"accuracy": reference, "my": Mine()}, F.multiclass_accuracy(4, average="micro"), Mine())
    assert list(meters) == ["accuracy", "my", "acc", "Mine"]
    for i in range(0, 60, 25):
        meters.update(p[i : i + 25], y[i : i + 25])
    exact = (p.argmax(1) == y).double().mean().item()
    last = (p[50:].argmax(1) == y[50:]).double().mean().item()
    assert meters.avg.dict() == pytest.approx(dict.fromkeys(meters, exact))
    assert meters.val.dict() == pytest.approx(dict.fromkeys(meters, last))
    assert meters.avg.dict() == pytest.approx(dict.fromkeys(meters, exact))  # reading val disturbs nothing
    again = MetricMeters(
        {"accuracy": reference.clone(), "my": Mine()}, F.multiclass_accuracy(4, average="micro"), Mine()
    )
    again.reset()
    again.load_state_dict(saved(meters.state_dict()))
    same(again.avg, meters.avg)
    same(again.val, meters.val)
    meters.reset()
    assert all(math.isnan(v) for v in meters.avg.values())
    with pytest.raises(TypeError, match="instance"):
        MetricMeters(torchmetrics.MeanMetric)


def test_stream_is_the_mean_of_batch_values():
    metrics = StreamMetrics(F.binary_f1_score(), F.binary_accuracy(), own=lambda p, t: p.mean())
    metrics.update(T([0.9, 0.1, 0.8]), T([1, 1, 0]))
    metrics.update(T([0.9]), T([1]))
    assert metrics.avg.round(4) == {"f1": 0.625, "acc": 0.5, "own": 0.675}
    assert metrics.count.acc == 4 and metrics.n.acc == 1
    metrics.update(T([0.9]), T([0]), n=4)
    assert metrics.avg.acc == 0.25


def test_members_may_be_updated_on_their_own():
    metrics = StreamMetrics(F.binary_accuracy())
    tasks = MultiTaskMetrics(a=metrics)
    metrics.update(T([0.9]), T([1]))
    assert metrics.avg.acc == tasks.avg.a.acc == 1.0
    metrics["acc"].update(T([0.9]), T([0]))
    assert metrics.avg.acc == tasks.avg.a.acc == 0.5
    tasks.a = binary_metrics(F.binary_accuracy())
    assert tasks.avg.dict() == {}


def test_undefined_batches_weigh_nothing():
    metrics = StreamMetrics(F.binary_auroc(), bad=lambda p, t: float("nan"))
    metrics.update(T([0.9, 0.1]), T([1, 1]))
    metrics.update(T([0.9, 0.1]), T([1, 0]))
    assert metrics.avg.auroc == 1.0 and math.isnan(metrics.avg.bad)


def test_multi_task():
    tasks = MultiTaskMetrics({"a": F.binary_accuracy()}, b=binary_metrics(F.binary_accuracy()), aggregate="micro")
    tasks.c = regression_metrics(1, F.mse())
    tasks["d"] = lambda p, t: 1.0
    tasks.update({"a": (T([0.9]), T([1])), "b": {"input": T([0.9, 0.9, 0.9]), "target": T([1, 0, 0])}})
    assert tasks.avg.dict() == {"a": {"acc": 1.0}, "b": {"acc": pytest.approx(1 / 3)}, "aggregate": {"acc": 0.5}}
    tasks.update(c=(T([1.0]), T([3.0])))
    assert tasks.avg.c.mse == 4.0 and tasks.avg.aggregate.mse == 4.0
    with pytest.raises(ValueError, match=r"unknown tasks \['x'\]"):
        tasks.update({"a": (T([0.1]), T([1])), "x": ()})
    assert tasks.a.count == 1
    with pytest.raises(TypeError, match="flat"):
        tasks["e"] = MultiTaskMetrics()
    with pytest.raises(TypeError, match="container"):
        tasks["e"] = 3
    tasks.reset()
    assert tasks.avg.dict() == {"aggregate": {}}


def test_multi_task_weights():
    a, b = F.binary_accuracy(), F.binary_accuracy()
    tasks = MultiTaskMetrics(a=a, b=b, aggregate="weighted", aggregate_weights={"a": 3, "b": 1})
    tasks.update({"a": (T([0.9]), T([1])), "b": (T([0.9]), T([0]))})
    assert tasks.avg.aggregate.acc == 0.75
    for weights in ({"a": -1}, {"x": 1}, {"a": 0, "b": 0}, {"a": math.inf}, {"acc": {"x": 1}}, None, {"acc": {"a": 0}}):
        with pytest.raises(ValueError):
            MultiTaskMetrics(a=a, b=b, aggregate="weighted", aggregate_weights=weights)
    with pytest.raises(ValueError, match="aggregate"):
        MultiTaskMetrics(a=a, aggregate="median")
    by_path = MultiTaskMetrics(a=a, b=b, aggregate="weighted", aggregate_weights={"acc": {"b": 1}})
    by_path.update({"a": (T([0.9]), T([1])), "b": (T([0.9]), T([0]))})
    assert by_path.avg.aggregate.acc == 0.0


def test_vectors_aggregate_where_shapes_agree():
    per_class = {"average": None, "name": "recall"}
    tasks = MultiTaskMetrics(
        a=F.multiclass_recall(2, **per_class),
        b=F.multiclass_recall(2, **per_class),
        c=F.multilabel_recall(2, **per_class),
        aggregate="macro",
    )
    tasks.update({"a": (T([0, 1]), T([0, 1])), "b": (T([0, 0]), T([0, 1]))})
    assert tasks.avg.aggregate.recall.tolist() == [1.0, 0.5]


def test_plots():
    x, y = data()
    before = set(sys.modules)
    for mode in ("global", "online"):
        metrics = multiclass_metrics(4, mode=mode)
        with pytest.raises(ValueError, match="no data"):
            metrics.plot()
        metrics.update(x, y)
        figure = metrics.plot(class_names=list("abcd"))
        assert [axis.get_title() for axis in figure.axes[:3]] == ["confusion matrix", "ROC", "precision-recall"]
        each = GlobalMetrics if mode == "global" else OnlineMetrics
        vectors = each(F.multiclass_auroc(4, average=None), F.multiclass_auprc(4, average=None))
        vectors.update(x, y)
        for kind, key in (("roc", "auroc"), ("pr", "auprc")):
            axis = metrics.plot(kind).axes[0]
            legend = [text.get_text() for text in axis.get_legend().get_texts()]
            expected = [f"{i}: {key.upper()} {v:.4f}" for i, v in enumerate(vectors.avg[key].tolist())]
            assert legend == expected
            # The drawn curve has the area that the legend states.
            areas = [torch.trapezoid(T(line.get_ydata()), T(line.get_xdata())).item() for line in axis.lines[:4]]
            assert areas == pytest.approx(vectors.avg[key].tolist(), abs=2e-3)
    matrix = metrics.plot("confusion_matrix", normalize="true").axes[0].images[0].get_array()
    assert torch.allclose(T(matrix.data).sum(1), torch.ones(4, dtype=torch.float64))
    many = GlobalMetrics(F.multiclass_auroc(12))
    many.update(torch.randn(200, 12), torch.arange(200) % 12)
    texts = [t.get_text() for t in many.plot("roc").axes[0].get_legend().get_texts()]
    assert texts == [f"macro: AUROC {many.avg.auroc:.4f}"]
    with pytest.raises(ValueError, match="kind"):
        metrics.plot("bars")
    with pytest.raises(ValueError, match="roc"):
        counts = GlobalMetrics(F.multiclass_accuracy(4))
        counts.update(x, y)
        counts.plot("roc")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_importing_is_lazy():
    script = (
        "import sys, danling.metrics as m; assert 'torch' not in sys.modules and 'chanfig' not in sys.modules; "
        "m.multiclass_metrics; assert 'torchmetrics' not in sys.modules and 'matplotlib' not in sys.modules; "
        "metrics = m.multiclass_metrics(3); import torch; metrics.update(torch.eye(3), torch.arange(3)); metrics.avg; "
        "assert 'torchmetrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names():
    assert len(F.__all__) == len(set(F.__all__)) == 78
    assert all(callable(getattr(F, name)) and getattr(F, name).__doc__ for name in F.__all__)


@pytest.mark.filterwarnings("ignore::danling.metrics.UndefinedMetricWarning")
@pytest.mark.parametrize(
    "make", [lambda: multiclass_metrics(3), lambda: OnlineMetrics(F.multiclass_accuracy(3)), lambda: binary_metrics()]
)
@pytest.mark.parametrize("seed", range(2))
def test_many_small_batches_that_are_alike(make, seed):
    """Batches like the last one take a shorter way; it must not show, whatever comes in between."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    quick, plain = make(), make()
    plain_store = plain._groups[0].store
    plain_store.remember = lambda *args: None
    width = quick._groups[0].store.spec.width or 1
    taken = 0
    for _ in range(400):
        rows = generator.choices([2, 3, 0], [20, 2, 1])[0]
        shape = (rows, width) if width > 1 else (rows,)
        scores = torch.rand(shape, dtype=generator.choices([torch.float32, torch.float64], [20, 1])[0])
        scores.requires_grad_(generator.random() < 0.5)
        targets = torch.randint(0, max(2, width), (rows,))
        mask = torch.rand(rows) < 0.5 if generator.random() < 0.03 else None
        taken += mask is None and quick._groups[0].store.like is not None
        for metrics in (quick, plain):
            metrics.update(scores, targets, mask=mask)
        with torch.no_grad():  # whoever gave them may use the memory again
            scores.fill_(-5.0)
            targets.fill_(99)
        what = generator.random()
        if what < 0.02:
            same(quick.value(), plain.value())
        elif what < 0.04:
            same(quick.average(), plain.average())
        elif what < 0.05:
            quick = copy.deepcopy(quick)
        elif what < 0.06:
            fresh = make()
            fresh.load_state_dict(quick.state_dict())
            quick = fresh
    assert taken > 200
    same(quick.average(), plain.average())
    assert torch.equal(quick.confmat, plain.confmat)
