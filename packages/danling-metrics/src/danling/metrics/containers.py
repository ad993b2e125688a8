"""`GlobalMetrics`: several metrics on one state, exact however the data was cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import NonFinitePredictionWarning, UndefinedMetricWarning
from .functional.descriptor import CallableMetric, MetricFunc, callable_name
from .inputs import Spec
from .readable import Readable
from .round_dict import RoundDict
from .state import BoundState, MetricState, Source
from .store import Store
from .sums import check_description, read_scalars
from .sync import Payload

NAN = float("nan")


class Group:
    """The metrics of a container that read the same kind of rows, and their state."""

    def __init__(self, spec: Spec, metrics: dict[str, MetricFunc], store: Store) -> None:
        self.spec = spec
        self.metrics = metrics
        self.store = store


class MetricContainer(Readable):
    """Base of `GlobalMetrics` and `OnlineMetrics`: named metrics, grouped by the kind of rows they read."""

    bins: int | None = None

    def __init__(
        self,
        metrics: tuple[Any, ...],
        named: Mapping[str, Any],
        *,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None,
        from_logits: bool | str,
        channel_dim: int | None,
        device: Any,
        distributed: bool,
        group: Any,
    ) -> None:
        self._init_readable(device, distributed, group)
        self.preprocess = plain_preprocess(preprocess)
        self.from_logits = check_from_logits(from_logits)
        self.channel_dim = channel_dim
        self._metrics = named_metrics(metrics, named)
        self._groups = [
            Group(spec, members, self._store(spec, members))
            for spec, members in group_metrics(self._metrics, channel_dim).items()
        ]
        self._sources: dict[str, tuple[int, list[Source]]] = {}

    def _store(self, spec: Spec, metrics: Mapping[str, MetricFunc]) -> Store:
        keep = self.bins is None and any(m.scores or m.preds_targets for m in metrics.values())
        pieces = [piece for m in metrics.values() for piece in m.pieces(self.bins)]
        options: dict[str, Any] = {"from_logits": self.from_logits, "bins": self.bins, "device": self.device}
        return Store(spec, pieces, keep=keep, **options)

    # mapping of descriptors

    def __getitem__(self, name: str) -> MetricFunc:
        return self._metrics[name]

    def __contains__(self, name: object) -> bool:
        return name in self._metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def keys(self):
        """Names of the metrics."""
        return self._metrics.keys()

    def values(self):
        """The descriptors."""
        return self._metrics.values()

    def items(self):
        """Names and descriptors."""
        return self._metrics.items()

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """Direction of improvement by name; None where a metric has none."""
        return {name: metric.higher_is_better for name, metric in self._metrics.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._metrics)})"

    # updating

    def update(self, input: Any, target: Any, *, mask: Any = None) -> None:
        """Add one batch. Values are not looked at before something is read, so nothing waits for the device.

        Args:
            input: scores or labels: a tensor, a NestedTensor, or a sequence of numbers or tensors.
            target: targets, likewise.
            mask: bool, True where data is, for dense inputs.

        Raises:
            ValueError: shapes, lengths, devices or mask do not fit together.
            TypeError: an input has the wrong type or dtype.
        """
        groups = self._groups
        if self.preprocess is not None:
            input, target = self.preprocess(input, target)
        elif mask is None and len(groups) == 1 and groups[0].store.repeat(input, target):
            self._version += 1
            return
        if len(groups) == 1:
            store = groups[0].store
            rows, samples = store.prepare(input, target, mask)
            store.add(rows, samples)
            store.remember(input, target, rows)
        else:
            prepared = [group.store.prepare(input, target, mask) for group in groups]
            for group, (rows, samples) in zip(groups, prepared, strict=True):
                group.store.add(rows, samples)
        self._version += 1

    def reset(self) -> None:
        """Forget all data; metrics and options stay."""
        for group in self._groups:
            group.store.clear()
        self._sources = {}
        self._touch()

    # reading

    @property
    def n(self) -> int:
        """Number of valid rows of the last update on this rank."""
        group = self._groups[0]
        return group.store.last_source().checks(group.store.views[0])[0]

    @property
    def count(self) -> int:
        """Number of valid rows so far on this rank."""
        group = self._groups[0]
        return group.store.counts()[group.store.views[0]][0]

    @property
    def sum(self) -> RoundDict:
        """This rank's averages times its number of rows, by name."""
        count = self.count
        return RoundDict({name: value * count for name, value in self.average(sync=False).items()})

    @property
    def confmat(self) -> Any:
        """This rank's confusion matrix of the first metric that reads one, None if there is none."""
        return self._state("local_average").confmat

    @property
    def preds(self) -> Any:
        """This rank's valid predictions where they are kept, else None."""
        return self._state("local_average").preds

    @property
    def targets(self) -> Any:
        """This rank's valid targets where they are kept, else None."""
        return self._state("local_average").targets

    def sync(self) -> MetricState:
        """Exchange state with all ranks and return that of all of them. Collective."""
        if not self._is_distributed():
            return self._state("local_average")
        self._exchange("average")
        return self._state("average")

    def plot(
        self,
        kind: str | None = None,
        *,
        class_names: Sequence[str] | None = None,
        normalize: str | None = None,
        ax: Any = None,
        sync: bool = True,
    ) -> Any:
        """Draw the confusion matrix, ROC or precision-recall curves.

        Args:
            kind: `"confusion_matrix"`, `"roc"` or `"pr"`; None draws all that the state allows, one panel each.
            class_names: names of the classes or labels.
            normalize: `"true"`, `"pred"` or `"all"` divides a confusion matrix by its rows, columns or total.
            ax: axes to draw on, one per panel; a new figure if None.
            sync: draw the data of all ranks, which makes the call collective.

        Returns:
            A `matplotlib.figure.Figure`. It is not registered with pyplot.

        Raises:
            ValueError: no data, or a kind that the state cannot give.
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_metrics

        return plot_metrics(self, kind, class_names, normalize, ax, sync)

    def _plot_states(self, sync: bool) -> dict[str, tuple[MetricFunc, Any]]:
        """Return the first metric and state for every kind of plot."""
        kind = "local_average"
        if sync and self._is_distributed():
            self._exchange("average")
            kind = "average"
        known: dict[str, tuple[MetricFunc, Any]] = {}
        for group, source in zip(self._groups, self._get_sources(kind), strict=True):
            source.validate(group.store.views)
            for metric in group.metrics.values():
                state = BoundState(source, metric)
                if metric.confmat and "confusion_matrix" not in known:
                    known["confusion_matrix"] = (metric, state.confmat)
                if metric.scores and "roc" not in known:
                    known["roc"] = known["pr"] = (metric, state.ranking)
        return known

    def _state(self, kind: str) -> MetricState:
        shown: dict[str, Any] = {"preds": None, "targets": None, "confmat": None}
        n = None
        for group, source in zip(self._groups, self._get_sources(kind), strict=True):
            source.validate(group.store.views)
            for metric in group.metrics.values():
                bound = BoundState(source, metric)
                n = bound.n if n is None else n
                if group.store.keep and shown["preds"] is None:
                    shown["preds"], shown["targets"] = bound.preds, bound.targets
                if metric.confmat and shown["confmat"] is None:
                    shown["confmat"] = bound.confmat.clone()
        return MetricState(**shown, n=n)

    def _get_sources(self, kind: str) -> list[Source]:
        cached = self._sources.get(kind)
        if kind in ("average", "batch"):
            if cached is None:
                raise RuntimeError("nothing was exchanged yet")
            return cached[1]
        if cached is None or cached[0] != self._version:
            read = Store.last_source if kind == "value" else Store.source
            cached = (self._version, [read(group.store) for group in self._groups])
            if kind != "value":  # a last batch is cheap to read again and would only hold memory
                self._sources[kind] = cached
        return cached[1]

    def _compute(self, kind: str) -> RoundDict:
        if kind in ("value", "local_average"):
            self._check(kind)
        sources = self._get_sources(kind)
        pairs = [(g.metrics, s, g.store.views) for g, s in zip(self._groups, sources, strict=True)]
        values = evaluate(pairs)
        return RoundDict({name: values[name] for name in self._metrics})

    # exchange

    def _describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "from_logits": self.from_logits,
            "bins": self.bins,
            "channel_dim": self.channel_dim,
            "preprocess": None if self.preprocess is None else callable_name(self.preprocess),
            "metrics": {name: metric.describe() for name, metric in self._metrics.items()},
        }

    def _check(self, kind: str) -> None:
        for group in self._groups:
            group.store.validate()

    def _pack(self, kind: str) -> Payload:
        payload = Payload()
        for group in self._groups:
            ints, parts, rows, kind_of_rows = group.store.pack(kind)
            payload.ints += ints
            payload.parts += parts
            payload.rows += rows
            payload.row_type = payload.row_type or kind_of_rows
        return payload

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        rank = torch.distributed.get_rank(self.group)
        sources = []
        for group in self._groups:
            counts = len(group.store._ordered(torch.int64))
            taken, source = group.store.unpack(kind, ints[:counts], parts, rank)
            ints, parts = ints[counts:], [p[taken:] for p in parts]
            sources.append(source)
        self._sources[kind] = (self._version, sources)

    def _int_count(self) -> int:
        """Number of count tensors in a payload."""
        return sum(len(group.store._ordered(torch.int64)) for group in self._groups)

    def _restart(self, generation: int) -> None:
        super()._restart(generation)
        for group in self._groups:
            group.store.restart()

    def _touch(self) -> None:
        super()._touch()
        self._sources = {}

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as tensors and plain values; loads with `torch.load(weights_only=True)`."""
        return {
            "version": 1,
            "describe": self._describe(),
            "stores": [group.store.state_dict() for group in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other metrics or options; the message lists the differences.
        """
        check_description(state, self._describe())
        for group, saved in zip(self._groups, state["stores"], strict=True):
            group.store.load_state_dict(saved)
        self._touch()

    def merge(self, other: MetricContainer) -> Any:
        """Add the data of another container with the same metrics and options; `other` stays as it is. Returns self.

        Raises:
            ValueError: the other container differs.
        """
        check_description({"version": 1, "describe": other._describe()}, self._describe())
        for mine, theirs in zip(self._groups, other._groups, strict=True):
            mine.store.merge(theirs.store)
        self._touch()
        return self

    def to(self, device: Any) -> Any:
        """Move the state to a device and keep it there from now on. Returns self."""
        self.device = torch.device(device)
        for group in self._groups:
            group.store.to(self.device)
        self._touch()
        return self

    def __getstate__(self) -> dict[str, Any]:
        for group in self._groups:
            group.store.buffer.settle()
        return {**super().__getstate__(), "_sources": {}}


class GlobalMetrics(MetricContainer):
    """Metrics over everything since `reset()`, exact however the data was cut into batches and ranks.

    Predictions are kept only if some metric needs them (AUROC, AUPRC, rank correlations, callables); otherwise counts
    and moments are. Kept rows are copied once, as given; filtering, softmax and validation happen when a value is read.

    Memory per rank: counts only, 8 C² bytes per state (multiclass) or 32 bytes per label, state and reading (binary,
    multilabel), and up to 4,096 waiting rows; with predictions, the bytes of all ranks' rows, at most twice that while
    the buffer grows (10⁷ rows of 10 float32 scores and an int64 target: 0.48 GB). AUROC adds one class at a time.

    Args:
        *metrics: descriptors, callables `(preds, targets)`, or iterables of these.
        preprocess: a callable `(input, target) -> (preds, targets)` that runs first.
        from_logits: whether scores are logits; `"auto"`: if and only if some valid score among all data of all ranks
            lies outside [0, 1], decided when a value is read. Logits that may all lie in [0, 1] need True.
        channel_dim: the dim of `input` that holds the classes, where shapes do not tell.
        device: where state is kept; `"cpu"` moves rows off the accelerator as they come.
        distributed: read all ranks together when a process group is initialised.
        group: the process group, the default group if None.
        **named: metrics with names of your choice.

    Raises:
        ValueError: no metric, or a name twice.
        TypeError: something is neither a descriptor nor a callable.

    Examples:
        >>> from danling.metrics.functional import multiclass_accuracy, multiclass_auroc
        >>> metrics = GlobalMetrics(multiclass_accuracy(3, average="micro"), auroc=multiclass_auroc(3))
        >>> scores = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.4, 0.3], [0.1, 0.6, 0.3]])
        >>> metrics.update(scores[:1], torch.tensor([0]))
        >>> metrics.update(scores[1:], torch.tensor([1, 2, 1]))
        >>> metrics.average().round(4)
        RoundDict({'acc': 0.75, 'auroc': 0.9444})
        >>> metrics.confmat.tolist()
        [[1, 0, 0], [0, 2, 0], [0, 1, 0]]
    """

    def __init__(
        self,
        *metrics: Any,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        from_logits: bool | str = "auto",
        channel_dim: int | None = None,
        device: Any = None,
        distributed: bool = True,
        group: Any = None,
        **named: Any,
    ) -> None:
        super().__init__(
            metrics,
            named,
            preprocess=preprocess,
            from_logits=from_logits,
            channel_dim=channel_dim,
            device=device,
            distributed=distributed,
            group=group,
        )


def evaluate(groups: Iterable[tuple[Mapping[str, MetricFunc], Source, Iterable[Any]]]) -> dict[str, Any]:
    """Return the value of every metric, floats copied to the host together; warn once about what is undefined."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    nans = 0
    for metrics, source, views in groups:
        source.prefetch(piece for m in metrics.values() for piece in m.pieces(source.bins))
        source.validate(views)
        for name, metric in metrics.items():
            values[name] = compute_metric(metric, source, notes)
            nans = max(nans, source.nan_count(metric.view))
    if nans:
        warnings.warn(
            f"{nans} valid predictions are NaN; metrics that read them are NaN", NonFinitePredictionWarning, 6
        )
    if notes:
        warnings.warn("; ".join(dict.fromkeys(notes)), UndefinedMetricWarning, 6)
    return dict(zip(values, read_scalars(list(values.values())), strict=True))


def compute_metric(metric: MetricFunc, source: Source, notes: list[str]) -> Any:
    """Return the value of one metric: NaN without valid rows, or with NaN scores."""
    rows, nans = source.checks(metric.view)[0], source.nan_count(metric.view)
    custom = metric.preds_targets and metric.task is None
    if rows == 0 and not metric.scores and (custom or type(metric).__module__.split(".")[0] != "danling"):
        return NAN
    state = BoundState(source, metric)
    if (rows == 0 or nans) and (metric.scores or metric.preds_targets):
        width = source.spec.width or 1
        vector = getattr(metric, "average", "macro") is None or (metric.num_outputs or 1) > 1
        return torch.full((width,), NAN, dtype=torch.float64) if vector and width > 1 else NAN
    value = metric(state)
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value) if not isinstance(value, (int, float)) else float(value)
    elif value.numel() == 1:
        value = value.reshape(())
    if rows == 0 or (nans and metric.task != "regression"):
        return torch.full_like(value, NAN, dtype=torch.float64) if isinstance(value, Tensor) else NAN
    notes += state.notes
    return value


def named_metrics(metrics: Iterable[Any], named: Mapping[str, Any]) -> dict[str, MetricFunc]:
    """Return descriptors by name from positional metrics (iterables flattened) and keywords.

    Raises:
        ValueError: no metric, or a name twice.
        TypeError: something is neither a descriptor nor a callable.
    """
    result: dict[str, MetricFunc] = {}
    for metric in flatten(metrics):
        if isinstance(metric, tuple):
            name, metric = metric
        else:
            metric = as_metric(metric)
            name = metric.name
        if name in result:
            raise ValueError(f"two metrics are called {name!r}; name one of them with a keyword")
        result[name] = as_metric(metric)
    for name, metric in named.items():
        if name in result:
            raise ValueError(f"two metrics are called {name!r}; name one of them with another keyword")
        result[name] = as_metric(metric, name)
    if not result:
        raise ValueError("at least one metric is required")
    return result


def flatten(metrics: Iterable[Any]) -> Iterator[Any]:
    """Yield metrics one by one, and `(name, metric)` for those in mappings."""
    for metric in metrics:
        if isinstance(metric, Mapping):
            yield from metric.items()
        elif isinstance(metric, Iterable) and not callable(metric) and not isinstance(metric, (str, bytes, Readable)):
            yield from flatten(metric)
        else:
            yield metric


def as_metric(metric: Any, name: str | None = None) -> MetricFunc:
    """Return a descriptor, or a callable as one."""
    if isinstance(metric, MetricFunc):
        return metric
    if hasattr(metric, "update") and hasattr(metric, "compute"):
        raise TypeError(
            f"{type(metric).__name__} has a state of its own; put it into MetricMeters, which updates such objects"
        )
    if not callable(metric):
        raise TypeError(f"a metric must be a descriptor or a callable (preds, targets), got {type(metric).__name__}")
    return CallableMetric(metric, name)


def group_metrics(metrics: Mapping[str, MetricFunc], channel_dim: int | None) -> dict[Spec, dict[str, MetricFunc]]:
    """Group metrics by the kind of rows they read.

    A metric without a task, or without a width, joins the only group that it fits.
    """
    specs = list(dict.fromkeys(m.spec for m in metrics.values()))

    def home(spec: Spec) -> Spec:
        if spec.width is None:
            fits = [s for s in specs if s.width is not None and spec.task in (None, s.task)]
            if len(fits) == 1:
                return fits[0]
            same = [s for s in specs if s != spec and spec.task is None]
            if len(same) == 1 and not fits:
                return same[0]
        return spec

    groups: dict[Spec, dict[str, MetricFunc]] = {}
    for name, metric in metrics.items():
        groups.setdefault(replace(home(metric.spec), channel_dim=channel_dim), {})[name] = metric
    return groups


def check_from_logits(from_logits: bool | str) -> bool | str:
    """Return `from_logits`, or raise `ValueError` if it is not known."""
    if from_logits != "auto" and not isinstance(from_logits, bool):
        raise ValueError(f"from_logits must be True, False or 'auto', got {from_logits!r}")
    return from_logits


def plain_preprocess(preprocess: Any) -> Any:
    """Return None for `base_preprocess`, which does what containers do anyway."""
    if preprocess is not None and not callable(preprocess):
        raise TypeError(f"preprocess must be a callable (input, target) -> (preds, targets), got {preprocess!r}")
    return None if getattr(preprocess, "_is_base", False) else preprocess
