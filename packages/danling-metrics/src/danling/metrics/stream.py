"""Means of per-batch values: `MetricMeter` and `StreamMetrics` (also called `MetricMeters`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import sync
from .containers import (
    as_metric,
    check_from_logits,
    compute_metric,
    flatten,
    group_metrics,
    plain_preprocess,
)
from .errors import NonFinitePredictionWarning
from .functional.descriptor import CallableMetric, MetricFunc, callable_name
from .inputs import Rows, Spec, to_rows
from .members import ObjectMember, load_object_state, object_state
from .meters import AverageMeter
from .pieces import NAN, OUTSIDE, ROWS
from .readable import Readable
from .round_dict import RoundDict
from .state import Source
from .sums import check_description, pack_meters, read_scalars, unpack_meters

_NAN = float("nan")


class MetricMeter(AverageMeter):
    """One metric, evaluated once per batch; `avg` is the sample-weighted mean of per-batch values.

    For AUROC, AUPRC, F1, MCC, correlation, R², RMSE and macro averages this mean is an approximation of the value over
    all data, which `GlobalMetrics` and `OnlineMetrics` give. Memory: as two `AverageMeter`s, and one batch value.

    With `from_logits="auto"` a metric that depends on whether scores are logits keeps an average for each reading;
    which one holds is decided when it is read, by all data of all ranks.

    Args:
        metric: a descriptor or a callable `(preds, targets)`.
        preprocess: a callable `(input, target) -> (preds, targets)` that runs first.
        from_logits: True, False or `"auto"`.
        channel_dim: the dim of `input` that holds the classes, where shapes do not tell.
        device, distributed, group: as for `AverageMeter`.

    Examples:
        >>> from danling.metrics.functional import binary_accuracy
        >>> meter = MetricMeter(binary_accuracy())
        >>> meter.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
        >>> meter.update(torch.tensor([0.9, 0.2, 0.1, 0.6]), torch.tensor([1, 0, 0, 1]))
        >>> meter.val, round(meter.avg, 4), meter.count
        (1.0, 0.8333, 6)
    """

    def __init__(
        self,
        metric: Any,
        *,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        from_logits: bool | str = "auto",
        channel_dim: int | None = None,
        device: Any = None,
        distributed: bool = True,
        group: Any = None,
    ) -> None:
        self.metric = as_metric(metric)
        self.preprocess = plain_preprocess(preprocess)
        self.from_logits = check_from_logits(from_logits)
        self.channel_dim = channel_dim
        super().__init__(device=device, distributed=distributed, group=group)

    def _clear(self) -> None:
        super()._clear()
        self._logits = AverageMeter()  # the average if scores are logits; this meter itself is the other reading
        self._outside = 0  # scores outside [0, 1]
        self._nans = 0
        self._invalid: str | None = None

    @property
    def higher_is_better(self) -> bool | None:
        """Direction of improvement of the metric."""
        return self.metric.higher_is_better

    def update(self, input: Any, target: Any, *, mask: Any = None, n: Any = None) -> None:  # type: ignore[override]
        """Evaluate the metric on a batch and add its value.

        Args:
            input: scores, labels or values.
            target: targets.
            mask: bool, True where data is, for dense inputs.
            n: the weight; the number of valid rows if None.
        """
        if self.preprocess is not None:
            input, target = self.preprocess(input, target)
        (spec,) = group_metrics({"metric": self.metric}, self.channel_dim)
        self._evaluate(BatchSources(spec, input, target, mask), n)

    def _evaluate(self, batch: BatchSources, n: Any) -> None:
        metric = self.metric
        checks = batch.source(False).checks(metric.view)
        weight = checks[ROWS] if n is None else n
        self._nans += checks[NAN]
        self._outside += checks[OUTSIDE]
        if self._invalid is None:
            try:
                batch.source(self.from_logits is True).validate([metric.view])
                if self.from_logits is False:
                    batch.strict().validate([metric.view])
            except ValueError as e:
                self._invalid = str(e)
        readings = [self.from_logits] if self.from_logits != "auto" else [False, True]
        if not self._depends_on_reading():
            readings = readings[:1]
        for logits in readings:
            meter = self._logits if logits and len(readings) > 1 else self
            if not logits and len(readings) > 1 and self._outside:
                value: Any = _NAN  # the other reading holds from now on
                share: Any = 0
            else:
                value = compute_metric(metric, batch.source(bool(logits)), [])
                share = self._share(value, weight, checks)
            AverageMeter.update(meter, value, share)
            meter._last_n = weight

    def _share(self, value: Any, weight: Any, checks: list[int]) -> Any:
        """Return the weight of a batch value: 0 where a built-in metric is undefined."""
        if checks[ROWS] == 0:
            return 0
        if isinstance(self.metric, CallableMetric) or checks[NAN]:
            return weight
        if isinstance(value, Tensor) and value.numel() > 1:
            undefined = torch.isnan(value)
            return torch.where(undefined, 0, torch.as_tensor(weight)) if bool(undefined.any()) else weight
        return 0 if float(value) != float(value) else weight

    def _depends_on_reading(self) -> bool:
        metric = self.metric
        if isinstance(metric, CallableMetric) or metric.task not in ("binary", "multiclass", "multilabel"):
            return False
        return (
            metric.preds_targets
            or (metric.scores and metric.task == "multiclass")
            or any(p.by_reading(metric.spec) for p in metric.pieces())
        )

    # what is read: three meters, of which the third says which of the first two holds

    def _parts(self) -> list[AverageMeter]:
        flag = AverageMeter()
        flag._sum, flag._count = float(self._outside), 1
        flag._last, flag._last_n = float(self._outside), 1
        return [self, self._logits, flag]

    def _chosen(self) -> AverageMeter:
        both = self.from_logits == "auto" and self._depends_on_reading()
        return self._logits if both and self._outside else self

    def choose(self, merged: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return sum and weight of the reading that holds, from those of the three meters."""
        both = self.from_logits == "auto" and self._depends_on_reading()
        return merged[1] if both and float(merged[2][0]) > 0 else merged[0]

    @property
    def sum(self) -> Any:
        """This rank's weighted sum."""
        chosen = self._chosen()
        return AverageMeter.sum.fget(chosen)  # type: ignore[attr-defined]

    @property
    def count(self) -> Any:
        """This rank's weight so far."""
        return AverageMeter.count.fget(self._chosen())  # type: ignore[attr-defined]

    def _compute(self, kind: str) -> Any:
        self._check(kind)
        if kind in ("value", "local_average"):
            chosen = self._chosen()
            if self._nans and kind == "local_average":
                self._warn()
            return AverageMeter._compute(self, kind) if chosen is self else chosen._compute(kind)
        if self._nans:
            self._warn()
        return super()._compute(kind)

    def _warn(self) -> None:
        message = f"{self._nans} valid predictions are NaN; metrics that read them are NaN"
        warnings.warn(message, NonFinitePredictionWarning, stacklevel=5)

    def _check(self, kind: str) -> None:
        super()._check(kind)
        if self._invalid is not None:
            raise ValueError(self._invalid)

    def _describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "metric": self.metric.describe(),
            "from_logits": self.from_logits,
            "channel_dim": self.channel_dim,
            "preprocess": None if self.preprocess is None else callable_name(self.preprocess),
        }

    def _pack(self, kind: str) -> sync.Payload:
        return sync.Payload(parts=pack_meters(self._parts(), kind, self._work_device()))

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        self._merged[kind] = self.choose(unpack_meters(["probabilities", "logits", "flag"], parts))

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as tensors and plain values."""
        extra = {"logits": self._logits.state_dict(), "outside": self._outside, "nans": self._nans}
        return {**super().state_dict(), **extra, "invalid": self._invalid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._logits.load_state_dict(state["logits"])
        self._outside, self._nans, self._invalid = state["outside"], state["nans"], state["invalid"]

    def merge(self, other: AverageMeter) -> MetricMeter:
        """Add what another meter of the same metric has seen; `other` stays as it is. Returns self."""
        super().merge(other)
        assert isinstance(other, MetricMeter)
        self._logits.merge(other._logits)
        self._outside += other._outside
        self._nans += other._nans
        self._invalid = self._invalid or other._invalid
        return self

    def to(self, device: Any) -> MetricMeter:
        """Move sums to a device. Returns self."""
        super().to(device)
        self._logits.to(device)
        return self


class BatchSources:
    """One batch, aligned once, under either reading."""

    def __init__(self, spec: Spec, input: Any, target: Any, mask: Any) -> None:
        self.spec = spec
        self.rows = to_rows(spec, input, target, mask)
        samples = to_rows(spec, input, target, mask, per_sample=True)
        # Per-sample metrics need all rows of a sample together; for dense inputs that is what `rows` holds anyway.
        self.samples = samples if samples.scores.shape != self.rows.scores.shape else self.rows
        self._sources: dict[Any, Source] = {}

    def source(self, logits: bool) -> Source:
        """Return the batch with scores read as logits or as probabilities."""
        if logits not in self._sources:
            self._sources[logits] = _BatchSource(self.spec, logits, self.rows, self.samples)
        return self._sources[logits]

    def strict(self) -> Source:
        """Return the batch for checking that scores are probabilities."""
        return Source(self.spec, False, self.rows)

    def valid_rows(self, view: Any) -> tuple[Tensor, Tensor]:
        """Return the rows that count, as given."""
        return self.source(False).valid_rows(view, probabilities=False)


class _BatchSource(Source):
    """A source whose reading is tried, not stated: scores out of range are no error."""

    def __init__(self, spec: Spec, logits: bool, rows: Rows, samples: Rows) -> None:
        super().__init__(spec, logits, rows)
        self.samples = samples

    def validate(self, views: Any) -> None:
        stated, self.from_logits = self.from_logits, True
        try:
            super().validate(views)
        finally:
            self.from_logits = stated

    def _fold(self, piece: Any, logits: bool) -> Tensor:
        if piece.direct:
            return Source(self.spec, logits, self.samples)._fold(piece, logits)
        return super()._fold(piece, logits)


class StreamMetrics(Readable):
    """Several metrics, each evaluated once per batch; inputs are prepared once for all of them.

    `avg` is the sample-weighted mean of per-batch values. For AUROC, AUPRC, F1, MCC, correlation, R², RMSE and macro
    averages this is an approximation of the value over all data, which `GlobalMetrics` and `OnlineMetrics` give.

    Members may also be `MetricMeter`s, `torchmetrics.Metric` objects, and any object with `update`, `compute` and
    `reset`. Such objects get the valid rows as given; their `compute()` is `avg`, and they synchronise themselves.
    Memory: as the meters; for such objects also the last batch.

    Args:
        *metrics: members, or iterables or mappings of them.
        preprocess: a callable `(input, target) -> (preds, targets)` that runs first.
        from_logits: True, False or `"auto"` (decided when read, by all data of all ranks).
        channel_dim: the dim of `input` that holds the classes, where shapes do not tell.
        device, distributed, group: as for `AverageMeter`.
        **named: further members.

    Examples:
        >>> from danling.metrics.functional import binary_accuracy, binary_auroc
        >>> metrics = StreamMetrics(binary_accuracy(), binary_auroc(), mae=lambda p, t: (p - t).abs().mean())
        >>> metrics.update(torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 0, 0]))
        >>> metrics.update(torch.tensor([0.9]), torch.tensor([1]))
        >>> metrics.avg.round(4)
        RoundDict({'acc': 0.75, 'auroc': 1.0, 'mae': 0.25})
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
        self._init_readable(device, distributed, group)
        self.preprocess = plain_preprocess(preprocess)
        self.from_logits = check_from_logits(from_logits)
        self.channel_dim = channel_dim
        self._meters: dict[str, MetricMeter] = {}
        self._objects: dict[str, ObjectMember] = {}
        self._order: list[str] = []
        self._merged: dict[str, dict[str, Any]] = {}
        for metric in flatten(metrics):
            name, metric = metric if isinstance(metric, tuple) else (None, metric)
            self._add(name, metric)
        for name, metric in named.items():
            self._add(name, metric)
        if not self._order:
            raise ValueError("at least one metric is required")
        own = {name: m.metric for name, m in self._meters.items() if m.preprocess is None}
        self._groups = group_metrics(own, channel_dim)
        plain = [spec for spec in self._groups if spec.task is not None]
        self._object_spec = plain[0] if len(plain) == 1 else Spec(None, None, channel_dim)

    def _add(self, name: str | None, metric: Any) -> None:
        if isinstance(metric, type):
            raise TypeError(f"{metric.__name__} is a class; give an instance of it")
        if isinstance(metric, MetricMeter):
            member: Any = metric
            name = name or metric.metric.name
        elif not isinstance(metric, MetricFunc) and all(hasattr(metric, a) for a in ("update", "compute", "reset")):
            member = ObjectMember(metric)
            name = name or type(metric).__name__
        else:
            function = as_metric(metric, name)
            name = name or function.name
            member = MetricMeter(
                function, from_logits=self.from_logits, channel_dim=self.channel_dim, device=self.device
            )
        if name in self._order:
            raise ValueError(f"two metrics are called {name!r}; name one of them with a keyword")
        (self._objects if isinstance(member, ObjectMember) else self._meters)[name] = member
        self._order.append(name)

    # mapping of members

    def __getitem__(self, name: str) -> Any:
        return self._meters[name] if name in self._meters else self._objects[name].metric

    def __contains__(self, name: object) -> bool:
        return name in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def keys(self):
        """Names of the members."""
        return dict.fromkeys(self._order).keys()

    def values(self):
        """The meters and objects."""
        return [self[name] for name in self._order]

    def items(self):
        """Names and members."""
        return [(name, self[name]) for name in self._order]

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """Direction of improvement by name."""
        return {name: getattr(self[name], "higher_is_better", None) for name in self._order}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._order)})"

    # updating

    def update(self, input: Any, target: Any, *, mask: Any = None, n: Any = None) -> None:
        """Evaluate every member on a batch.

        Args:
            input: scores, labels or values.
            target: targets.
            mask: bool, True where data is, for dense inputs.
            n: the weight; the number of valid rows if None.

        Raises:
            ValueError: shapes, lengths, devices or mask do not fit together; nothing is updated then.
            TypeError: an input has the wrong type or dtype.
        """
        given = input, target
        if self.preprocess is not None:
            input, target = self.preprocess(input, target)
        batches = {spec: BatchSources(spec, input, target, mask) for spec in self._groups}
        rest = BatchSources(self._object_spec, input, target, mask) if self._objects else None
        for spec, members in self._groups.items():
            for name in members:
                self._meters[name]._evaluate(batches[spec], n)
        for meter in self._meters.values():
            if meter.preprocess is not None:
                meter.update(*given, mask=mask, n=n)
        if rest is not None:
            view = next(iter(self._meters.values())).metric.view if self._meters else MetricFunc(name="").view
            rows = rest.valid_rows(view)
            for member in self._objects.values():
                member.update(*rows)
        self._version += 1

    def reset(self) -> None:
        """Forget all data; members stay."""
        for meter in self._meters.values():
            meter.reset()
        for member in self._objects.values():
            member.reset()
        self._touch()

    # reading

    def _current(self) -> int:
        return self._version + sum(meter._version for meter in self._meters.values())

    @property
    def sum(self) -> RoundDict:
        """This rank's weighted sums by name."""
        return RoundDict({name: meter.sum for name, meter in self._meters.items()})

    @property
    def count(self) -> RoundDict:
        """This rank's weights by name."""
        return RoundDict({name: (self._meters.get(name) or self._objects[name]).count for name in self._order})

    @property
    def n(self) -> RoundDict:
        """The weight of the last update by name."""
        return RoundDict({name: (self._meters.get(name) or self._objects[name]).n for name in self._order})

    def _compute(self, kind: str) -> RoundDict:
        values: dict[str, Any] = {}
        nans = max((m._nans for m in self._meters.values()), default=0)
        if nans and kind != "value":
            message = f"{nans} valid predictions are NaN; metrics that read them are NaN"
            warnings.warn(message, NonFinitePredictionWarning, stacklevel=5)
        for name in self._order:
            if name in self._objects:
                member = self._objects[name]
                values[name] = member.value() if kind in ("value", "batch") else member.average()
                continue
            meter = self._meters[name]
            meter._check(kind)
            if kind in ("value", "local_average"):
                values[name] = AverageMeter._compute(meter._chosen(), kind)
            else:
                total, count = self._merged[kind][name]
                values[name] = torch.where(count == 0, _NAN, total / count)
        return RoundDict(zip(values, read_scalars(list(values.values())), strict=True))

    # exchange

    def _describe(self) -> dict[str, Any]:
        members: dict[str, Any] = {name: meter._describe() for name, meter in self._meters.items()}
        members |= {name: {"class": type(m.metric).__name__} for name, m in self._objects.items()}
        preprocess = None if self.preprocess is None else callable_name(self.preprocess)
        return {"class": "StreamMetrics", "preprocess": preprocess, "metrics": members}

    def _check(self, kind: str) -> None:
        for meter in self._meters.values():
            meter._check(kind)

    def _pack(self, kind: str) -> sync.Payload:
        parts = [part for name in sorted(self._meters) for part in self._meters[name]._parts()]
        device = next((p._acc.device for p in parts if p._acc is not None), torch.device("cpu"))
        return sync.Payload(parts=pack_meters(parts, kind, device))

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        names = sorted(self._meters)
        merged = unpack_meters([name for name in names for _ in range(3)], parts)
        self._merged[kind] = {
            name: self._meters[name].choose(merged[3 * i : 3 * i + 3]) for i, name in enumerate(names)
        }

    def sync(self) -> RoundDict:
        """Exchange with all ranks and return `{name: {"sum": ..., "count": ...}}` over all of them. Collective."""
        if self._is_distributed():
            self._exchange("average")
            totals = self._merged["average"]
        else:
            totals = {name: meter._chosen()._totals() for name, meter in self._meters.items()}
        flat = read_scalars([x for pair in totals.values() for x in pair])
        return RoundDict({n: {"sum": flat[2 * i], "count": flat[2 * i + 1]} for i, n in enumerate(totals)})

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state; objects store theirs by their own `state_dict`."""
        objects = {}
        for name, member in self._objects.items():
            last = None if member.last is None else [t.clone() for t in member.last]
            objects[name] = {
                "state": object_state(member.metric),
                "last": last,
                "count": member.count,
                "n": member.n,
            }
        return {
            "version": 1,
            "describe": self._describe(),
            "meters": {name: meter.state_dict() for name, meter in self._meters.items()},
            "objects": objects,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other members or options; the message lists the differences.
        """
        check_description(state, self._describe())
        for name, meter in self._meters.items():
            meter.load_state_dict(state["meters"][name])
        for name, member in self._objects.items():
            saved = state["objects"][name]
            load_object_state(member.metric, saved["state"])
            member.last = None if saved["last"] is None else tuple(t.clone() for t in saved["last"])  # type: ignore[assignment]
            member.count, member.n = saved["count"], saved["n"]
        self._touch()

    def merge(self, other: StreamMetrics) -> StreamMetrics:
        """Add what another container of the same members has seen; `other` stays as it is. Returns self.

        Raises:
            ValueError: the members differ.
            TypeError: an object cannot merge states.
        """
        check_description({"version": 1, "describe": other._describe()}, self._describe())
        for name, member in self._objects.items():
            if other._objects[name].count and not hasattr(member.metric, "merge_state"):
                raise TypeError(f"{name!r} ({type(member.metric).__name__}) offers no merge_state")
        for name, meter in self._meters.items():
            meter.merge(other._meters[name])
        for name, member in self._objects.items():
            theirs = other._objects[name]
            if theirs.count:
                member.metric.merge_state(copy.deepcopy(theirs.metric))
                member.count += theirs.count
        self._touch()
        return self

    def to(self, device: Any) -> StreamMetrics:
        """Move the state to a device. Returns self."""
        self.device = torch.device(device)
        for meter in self._meters.values():
            meter.to(device)
        for member in self._objects.values():
            if hasattr(member.metric, "to"):
                member.metric.to(device)
        return self


MetricMeters = StreamMetrics
