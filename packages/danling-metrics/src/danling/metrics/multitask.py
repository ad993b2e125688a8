"""`MultiTaskMetrics`: one container per task, read in one exchange."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sync
from .containers import MetricContainer
from .meters import AverageMeter, AverageMeters
from .readable import Readable
from .round_dict import RoundDict
from .stream import MetricMeter, StreamMetrics
from .sums import check_description

AGGREGATES = (None, "macro", "micro", "weighted")
_CONTAINERS = (MetricContainer, StreamMetrics, MetricMeter)


class MultiTaskMetrics(Readable):
    """Metrics of several tasks.

    Memory: that of its tasks.

    Args:
        mapping: containers by task.
        aggregate: how `result["aggregate"]` combines the tasks that have a metric and a defined value for it: None (no
            such key), `"macro"` (plain mean), `"micro"` (weighted by samples; a mean of task values, not the value on
            pooled data) or `"weighted"` (by `aggregate_weights`).
        aggregate_weights: `{task: weight}`, or `{metric path: {task: weight}}`.
        device, distributed, group: as for `AverageMeter`.
        **tasks: further tasks: a container, a `MetricMeter`, or a callable or descriptor (which becomes one).

    Raises:
        ValueError: unknown aggregate, or weights that do not fit the tasks.
        TypeError: a task is no container.

    Examples:
        >>> from danling.metrics import binary_metrics
        >>> from danling.metrics.functional import binary_accuracy
        >>> tasks = MultiTaskMetrics(a=binary_metrics(binary_accuracy()), b=binary_accuracy(), aggregate="macro")
        >>> tasks.update({"a": {"input": [0.9, 0.8], "target": [1, 0]}, "b": ([0.1], [0])})
        >>> tasks.avg
        RoundDict({'a': {'acc': 0.5}, 'b': {'acc': 1.0}, 'aggregate': {'acc': 0.75}})
    """

    def __init__(
        self,
        mapping: Mapping[str, Any] | None = None,
        *,
        aggregate: str | None = None,
        aggregate_weights: Mapping[str, Any] | None = None,
        device: Any = None,
        distributed: bool = True,
        group: Any = None,
        **tasks: Any,
    ) -> None:
        self.__dict__["_tasks"] = {}
        self._init_readable(device, distributed, group)
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of 'macro', 'micro', 'weighted' or None, got {aggregate!r}")
        self.aggregate = aggregate
        self._received: dict[str, dict[str, tuple[float, float]]] = {}
        for name, task in {**(mapping or {}), **tasks}.items():
            self[name] = task
        if aggregate == "weighted" and aggregate_weights is None:
            raise ValueError("aggregate='weighted' needs aggregate_weights")
        if aggregate != "weighted" and aggregate_weights is not None:
            raise ValueError(f"aggregate_weights are for aggregate='weighted', not {aggregate!r}")
        self.aggregate_weights = None if aggregate_weights is None else self._check_weights(aggregate_weights)

    def _check_weights(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        nested = any(isinstance(w, Mapping) for w in weights.values())
        for where, part in weights.items() if nested else [("aggregate_weights", weights)]:
            if not isinstance(part, Mapping):
                raise ValueError(f"aggregate_weights mixes tasks and metric paths: {dict(weights)}")
            if unknown := [task for task in part if task not in self._tasks]:
                raise ValueError(f"{where} names unknown tasks {unknown}; tasks: {list(self._tasks)}")
            for task, weight in part.items():
                number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
                if not number or not math.isfinite(weight) or weight < 0:
                    raise ValueError(f"weight of task {task!r} must be finite and at least 0, got {weight!r}")
            if not any(part.values()):
                raise ValueError(f"{where} must not all be 0")
        return {key: dict(w) if isinstance(w, Mapping) else w for key, w in weights.items()}

    # mapping of tasks

    def __setitem__(self, name: str, task: Any) -> None:
        if isinstance(task, MultiTaskMetrics):
            raise TypeError(f"task {name!r} is a MultiTaskMetrics; tasks are flat")
        if not isinstance(task, _CONTAINERS):
            if isinstance(task, (AverageMeter, AverageMeters)) or not callable(task):
                raise TypeError(
                    f"task {name!r} must be a metric container, a MetricMeter or a callable, got {type(task).__name__}"
                )
            task = MetricMeter(task, device=self.device)
        if name == "aggregate":
            raise ValueError("'aggregate' is the key of the combined values and cannot name a task")
        self._tasks[name] = task
        self._forget_reads()

    def __getitem__(self, name: str) -> Any:
        return self._tasks[name]

    def __delitem__(self, name: str) -> None:
        del self._tasks[name]
        self._touch()

    def __getattr__(self, name: str) -> Any:
        tasks = self.__dict__.get("_tasks", {})
        if name in tasks:
            return tasks[name]
        raise AttributeError(f"{type(self).__name__} has no task {name!r}; it has {list(tasks)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (*_CONTAINERS, MultiTaskMetrics)):
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def keys(self):
        """Names of the tasks."""
        return self._tasks.keys()

    def values(self):
        """The containers."""
        return self._tasks.values()

    def items(self):
        """Names and containers."""
        return self._tasks.items()

    @property
    def higher_is_better(self) -> dict[str, Any]:
        """Direction of improvement by task and metric."""
        return {name: task.higher_is_better for name, task in self._tasks.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._tasks)})"

    # updating

    def update(self, mapping: Mapping[str, Any] | None = None, **tasks: Any) -> None:
        """Update tasks.

        Args:
            mapping: arguments by task: a mapping of keywords, or a sequence of positionals. Tasks may be missing.
            **tasks: further tasks.

        Raises:
            ValueError: an unknown task; nothing is updated then.
        """
        updates = {**(mapping or {}), **tasks}
        if unknown := [name for name in updates if name not in self._tasks]:
            raise ValueError(f"unknown tasks {unknown}; tasks: {list(self._tasks)}")
        for name, arguments in updates.items():
            if not isinstance(arguments, (Mapping, Sequence)) or isinstance(arguments, (str, bytes)):
                kind = type(arguments).__name__
                raise TypeError(f"task {name!r} takes a mapping or a sequence of arguments, got {kind}")
        for name, arguments in updates.items():
            if isinstance(arguments, Mapping):
                self._tasks[name].update(**arguments)
            else:
                self._tasks[name].update(*arguments)
        self._version += 1

    def reset(self) -> None:
        """Forget all data; tasks stay."""
        for task in self._tasks.values():
            task.reset()
        self._touch()

    # reading

    @property
    def sum(self) -> RoundDict:
        """This rank's weighted sums by task."""
        return RoundDict({name: task.sum for name, task in self._tasks.items()})

    @property
    def count(self) -> RoundDict:
        """This rank's weights by task."""
        return RoundDict({name: task.count for name, task in self._tasks.items()})

    @property
    def n(self) -> RoundDict:
        """The weight of the last update by task."""
        return RoundDict({name: task.n for name, task in self._tasks.items()})

    def _current(self) -> int:
        return self._version + sum(task._current() for task in self._tasks.values())

    def _compute(self, kind: str) -> RoundDict:
        result = RoundDict()
        weights: dict[str, float] = {}
        for name, task in self._tasks.items():
            if kind in ("value", "local_average"):
                last, total = _samples(task.n), _samples(task.count)
                value = task._local(kind)
            else:
                last, total = self._received[kind][name]
                value = task._compute(kind)
            if not (last or total):
                continue
            weights[name] = total if kind in ("average", "local_average") else last
            if not isinstance(value, RoundDict):
                value = RoundDict({task.metric.name: value})
            result[name] = value
        if self.aggregate is not None:
            result["aggregate"] = self._combine(result, weights)
        return result

    def _combine(self, result: RoundDict, counts: Mapping[str, float]) -> RoundDict:
        values: dict[str, dict[str, Any]] = {}
        for task, part in result.items():
            for path, value in part.leaves():
                values.setdefault(path, {})[task] = value
        combined = RoundDict()
        for path, by_task in values.items():
            weights = self._weights(path, by_task, counts)
            value = _weighted_mean(by_task, weights)
            if value is not None:
                combined[path] = value
        return combined

    def _weights(self, path: str, tasks: Mapping[str, Any], counts: Mapping[str, float]) -> dict[str, float]:
        if self.aggregate == "macro":
            return dict.fromkeys(tasks, 1.0)
        if self.aggregate == "micro":
            return {task: counts[task] for task in tasks}
        given = self.aggregate_weights or {}
        if any(isinstance(w, Mapping) for w in given.values()):
            given = given.get(path, {})
        return {task: float(given.get(task, 0.0)) for task in tasks}

    # exchange

    @property
    def _generation(self) -> int:  # type: ignore[override]
        return self.__dict__.get("_own_generation", 0) + sum(t._generation for t in self._tasks.values())

    @_generation.setter
    def _generation(self, value: int) -> None:
        self.__dict__["_own_generation"] = value - sum(t._generation for t in self._tasks.values())

    def _describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "aggregate": self.aggregate,
            "aggregate_weights": self.aggregate_weights,
            "tasks": {name: task._describe() for name, task in self._tasks.items()},
        }

    def _check(self, kind: str) -> None:
        for task in self._tasks.values():
            task._check(kind)

    def _pack(self, kind: str) -> sync.Payload:
        names = sorted(self._tasks)
        payloads = [self._tasks[name]._pack(kind) for name in names]
        counts = [(_samples(self._tasks[name].n), _samples(self._tasks[name].count)) for name in names]
        parts = [torch.tensor([len(p.parts) for p in payloads]), torch.tensor(counts, dtype=torch.float64)]
        return sync.Payload(
            ints=[t for p in payloads for t in p.ints],
            parts=parts + [t for p in payloads for t in p.parts],
            rows=sum(p.rows for p in payloads),
        )

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        names = sorted(self._tasks)
        sizes = [p[0].tolist() for p in parts]
        totals = torch.stack([p[1].cpu() for p in parts]).sum(0).tolist()
        self._received[kind] = {name: (pair[0], pair[1]) for name, pair in zip(names, totals, strict=True)}
        rest = [p[2:] for p in parts]
        for index, name in enumerate(names):
            task = self._tasks[name]
            used = task._int_count() if hasattr(task, "_int_count") else 0
            own = [p[: s[index]] for p, s in zip(rest, sizes, strict=True)]
            task._unpack(kind, ints[:used], own)
            ints = ints[used:]
            rest = [p[s[index] :] for p, s in zip(rest, sizes, strict=True)]

    def _restart(self, generation: int) -> None:
        for task in self._tasks.values():
            task._restart(task._generation)
        self._generation = generation

    def sync(self) -> RoundDict:
        """Exchange with all ranks and return the samples of the last update and so far, by task. Collective."""
        if self._is_distributed():
            self._exchange("average")
            received = self._received["average"]
        else:
            received = {name: (_samples(t.n), _samples(t.count)) for name, t in self._tasks.items()}
        return RoundDict({name: {"n": pair[0], "count": pair[1]} for name, pair in received.items()})

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as tensors and plain values."""
        tasks = {name: task.state_dict() for name, task in self._tasks.items()}
        return {"version": 1, "describe": self._describe(), "tasks": tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other tasks, metrics or options; the message lists the differences.
        """
        check_description(state, self._describe())
        for name, task in self._tasks.items():
            task.load_state_dict(state["tasks"][name])
        self._touch()

    def merge(self, other: MultiTaskMetrics) -> MultiTaskMetrics:
        """Add the data of another one with the same tasks; `other` stays as it is. Returns self."""
        check_description({"version": 1, "describe": other._describe()}, self._describe())
        for name, task in self._tasks.items():
            task.merge(other._tasks[name])
        self._touch()
        return self

    def to(self, device: Any) -> MultiTaskMetrics:
        """Move every task to a device. Returns self."""
        self.device = torch.device(device)
        for task in self._tasks.values():
            task.to(device)
        return self


def _samples(count: Any) -> float:
    """Return one number of samples for a task."""
    if isinstance(count, Mapping):
        return max((_samples(value) for value in count.values()), default=0.0)
    return float(count.max()) if isinstance(count, Tensor) else float(count)


def _weighted_mean(values: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """Return the weighted mean of numbers or same-shape tensors over defined values; None where shapes differ."""
    tensors = [torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values.values()]
    if len({t.shape for t in tensors}) > 1:
        return None
    stacked = torch.stack(tensors)
    share = torch.tensor([weights[task] for task in values], dtype=torch.float64)
    share = share.view(-1, *[1] * (stacked.dim() - 1)).expand(stacked.shape)
    share = torch.where(torch.isnan(stacked), 0, share)
    mean = (torch.where(torch.isnan(stacked), 0, stacked) * share).sum(0) / share.sum(0)
    return mean.item() if mean.dim() == 0 else mean
