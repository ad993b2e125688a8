"""Weighted running means: `AverageMeter` and the mapping `AverageMeters`."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import sync
from .readable import Readable
from .round_dict import RoundDict
from .sums import (
    as_weight,
    check_description,
    copied,
    float64_on,
    new_zeros,
    pack_meters,
    ratio,
    read_scalars,
    to_host,
    unpack_meters,
    whole,
)

_NAN = float("nan")


class AverageMeter(Readable):
    """The weighted running mean of scalars, or of tensors of one shape.

    Sums are float64 (float32 on devices without it). Numbers are added on the host; tensors on their device, without
    waiting for it, and are read when a value is read. Memory: two float64 per element.

    Args:
        device: where tensors are summed; the device of the first tensor if None.
        distributed: read all ranks together when a process group is initialised.
        group: the process group, the default group if None.

    Examples:
        >>> meter = AverageMeter()
        >>> meter.update(0.7)
        >>> meter.update(torch.tensor(0.9), n=3)
        >>> round(meter.val, 4), round(meter.avg, 4), meter.count
        (0.9, 0.85, 4)
        >>> f"{meter:.2f}"
        '0.90 (0.85)'
    """

    def __init__(self, *, device: Any = None, distributed: bool = True, group: Any = None) -> None:
        self._init_readable(device, distributed, group)
        self._clear()

    def _clear(self) -> None:
        self._shape: tuple[int, ...] | None = None
        self._sum: float = 0.0  # of numbers
        self._count: float = 0  # of weights given as numbers
        self._acc: Tensor | None = None  # sum of tensors, on their device
        self._weight: Tensor | None = None  # sum of weights given as tensors
        self._least: Tensor | None = None  # least weight given as a tensor
        self._integral = True
        self._last: Any = _NAN
        self._last_n: Any = 0

    # updating

    def update(self, value: Any, n: Any = 1) -> None:
        """Add a value.

        Args:
            value: a number, a NumPy scalar or a tensor. A tensor with one element is a scalar; larger ones are
                averaged element by element and must all have one shape.
            n: the weight, at least 0: an int, a float or a tensor with one element. With 0 the value is shown as
                `val` and counts for nothing, even if it is NaN.

        Raises:
            ValueError: the weight is negative, or the shape differs from that of earlier values.
            TypeError: the value is neither a number nor a tensor.
        """
        if type(value) is float and type(n) is int:
            if n > 0:
                if self._shape:
                    self._take_shape(())
                self._sum += value * n
                self._count += n
                self._last = value
                self._last_n = n
                self._version += 1
                return
        if isinstance(value, Tensor):
            if value.numel() == 1:
                self._add_tensor(value.detach() if value.dim() == 0 else value.detach().reshape(()), n)
            else:
                self._add_tensor(value.detach(), n)
            return
        if not isinstance(value, numbers.Number) or isinstance(value, complex):
            if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
                raise TypeError(f"value must be a number or a tensor, got {type(value).__name__}")
        if self._shape:
            self._take_shape(())
        value = float(value)
        if isinstance(n, Tensor):
            self._add_tensor(torch.full((), value, dtype=float64_on(n.device), device=n.device), n)
            return
        n = as_weight(n)
        if n:
            self._sum += value * n
            self._count += n
            self._integral = self._integral and isinstance(n, int)
        self._last, self._last_n = value, n
        self._shape = ()
        self._version += 1

    def _add_tensor(self, value: Tensor, n: Any) -> None:
        if not isinstance(n, Tensor):
            n = as_weight(n)
        if value.shape != self._shape:
            self._take_shape(tuple(value.shape))
        acc = self._acc
        if acc is None or acc.device != value.device:
            acc = self._accumulator(value)
        if value.device != acc.device:
            value = value.to(acc.device, non_blocking=True)
            self._last = value
        else:
            self._last = value.clone()
        if not value.dtype.is_floating_point:
            if value.dtype.is_complex:
                raise TypeError(f"value must be real, got {value.dtype}")
            value = value.to(acc.dtype)
        if isinstance(n, Tensor):
            self._add_weighted(acc, value, n)
        elif n:
            acc.add_(value, alpha=n)
            self._count += n
            if type(n) is not int:
                self._integral = False
        if not isinstance(n, Tensor):
            self._last_n = n
        self._version += 1

    def _add_weighted(self, acc: Tensor, value: Tensor, n: Tensor) -> None:
        """Add with a weight that lives on a device: one number, or one per element."""
        integral = not n.dtype.is_floating_point
        n = n.detach().to(acc.device, acc.dtype, copy=True, non_blocking=True)
        n = n.reshape(()) if n.numel() == 1 else n
        if self._weight is None or self._weight.dim() < n.dim():
            weight = new_zeros(tuple(n.shape), acc)
            self._weight = weight if self._weight is None else weight + self._weight
        if self._least is None:
            self._least = new_zeros((), acc)
        acc.add_(torch.where(n == 0, 0.0, value * n))
        self._weight.add_(n)
        self._least.copy_(torch.minimum(self._least, n.min()))
        self._integral = self._integral and integral
        self._last_n = n

    def _accumulator(self, value: Tensor) -> Tensor:
        """Return the tensor to add to, moving the present one where no device has to be waited for."""
        acc = self._acc
        device = self.device or value.device
        if acc is None:
            acc = self._acc = new_zeros(tuple(value.shape), torch.empty(0, device=device))
        elif acc.device.type == "cpu" and acc.device != device:
            acc = self._acc = new_zeros(tuple(acc.shape), torch.empty(0, device=device)).add_(acc.to(device))
            for name in ("_weight", "_least"):
                if (old := getattr(self, name)) is not None:
                    setattr(self, name, new_zeros(tuple(old.shape), acc).add_(old.to(device)))
        return acc

    def _take_shape(self, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            if shape and self._count:
                self._shape = ()
            else:
                self._shape = shape
        if self._shape != shape:
            raise ValueError(f"value has shape {shape}, but earlier values have shape {self._shape}")

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self._touch()

    # reading

    @property
    def sum(self) -> Any:
        """This rank's weighted sum: a float, or a float64 tensor."""
        total, _ = self._totals()
        return to_host(total)

    @property
    def count(self) -> Any:
        """This rank's weight so far: an int while every weight was integral."""
        self._check("average")
        _, count = self._totals()
        return whole(to_host(count), self._integral)

    @property
    def n(self) -> Any:
        """The weight of the last update."""
        n = to_host(self._last_n)
        return int(n) if isinstance(n, float) and self._integral and n.is_integer() else n

    def _totals(self) -> tuple[Any, Any]:
        """Return sum and weight, as numbers or as tensors that have not been waited for."""
        total: Any = self._sum if self._acc is None else self._acc + self._sum
        count: Any = self._count if self._weight is None else self._weight + self._count
        return total, count

    def _last_totals(self) -> tuple[Any, Any]:
        value, n = self._last, self._last_n
        if isinstance(value, Tensor):
            value = value.to(float64_on(value.device))
        if isinstance(n, Tensor):
            return torch.where(n == 0, 0.0, value * n), n
        return (value * n if n else value * 0 if isinstance(value, Tensor) else 0.0), n

    def _compute(self, kind: str) -> Any:
        self._check(kind)
        if kind == "value":
            last = self._last
            return to_host(last.to(float64_on(last.device)) if isinstance(last, Tensor) else last)
        total, count = self._totals() if kind == "local_average" else self._merged[kind]
        return ratio(total, count)

    # exchange

    def _describe(self) -> dict[str, Any]:
        return {"class": type(self).__name__}

    def _check(self, kind: str) -> None:
        if self._least is not None and float(self._least) < 0:
            raise ValueError(f"weights must be at least 0, got n={float(self._least):g}")

    def _pack(self, kind: str) -> sync.Payload:
        return sync.Payload(parts=pack_meters([self], kind, self._work_device()))

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        (self._merged[kind],) = unpack_meters(["meter"], parts)

    @property
    def _merged(self) -> dict[str, Any]:
        return self.__dict__.setdefault("_merged_state", {})

    def _work_device(self) -> torch.device:
        return torch.device("cpu") if self._acc is None else self._acc.device

    def sync(self) -> tuple[Any, Any]:
        """Exchange with all ranks and return the sum and the weight over all of them. Collective."""
        if self._is_distributed():
            self._exchange("average")
            if "average" in self._merged:
                total, count = self._merged["average"]
                return to_host(total), whole(to_host(count), self._integral)
        return self.sum, self.count

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as tensors and plain values; loads with `torch.load(weights_only=True)`."""
        names = ("_sum", "_count", "_acc", "_weight", "_least", "_integral", "_last", "_last_n")
        state = {name[1:]: copied(getattr(self, name)) for name in names}
        shape = None if self._shape is None else list(self._shape)
        return {"version": 1, "describe": self._describe(), **state, "shape": shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to another class or to a newer format.
        """
        check_description(state, self._describe())
        for name in ("sum", "count", "acc", "weight", "least", "integral", "last", "last_n"):
            value = copied(state[name])
            if isinstance(value, Tensor) and self.device is not None:
                value = value.to(self.device)
            setattr(self, f"_{name}", value)
        self._shape = None if state["shape"] is None else tuple(state["shape"])
        self._touch()

    def merge(self, other: AverageMeter) -> AverageMeter:
        """Add what another meter has seen; `other` and the last value here stay as they are. Returns self.

        Raises:
            ValueError: the other is of another class, or averages tensors of another shape.
        """
        check_description({"version": 1, "describe": other._describe()}, self._describe())
        fresh = self._acc is None and not self._count and self._last != self._last  # NaN: nothing to show yet
        if other._shape is not None or other._count:
            self._take_shape(other._shape or ())
            self._sum += other._sum
            self._count += other._count
            self._integral = self._integral and other._integral
            for name in ("_acc", "_weight"):
                theirs, mine = getattr(other, name), getattr(self, name)
                if theirs is not None:
                    device = theirs.device if mine is None else mine.device
                    setattr(self, name, theirs.clone() if mine is None else mine + theirs.to(device))
            if other._least is not None:
                least = other._least.clone()
                self._least = least if self._least is None else torch.minimum(self._least, least.to(self._least.device))
            if fresh:
                self._last, self._last_n = copied(other._last), copied(other._last_n)
        self._touch()
        return self

    def to(self, device: Any) -> AverageMeter:
        """Move sums to a device and sum there from now on. Returns self."""
        self.device = torch.device(device)
        for name in ("_acc", "_weight", "_least", "_last", "_last_n"):
            if isinstance(value := getattr(self, name), Tensor):
                setattr(self, name, value.to(self.device))
        return self


class AverageMeters(Readable):
    """A mapping of `AverageMeter`s that are created on first use.

    All meters are read in one exchange. `n` is the weight of an update and never a meter; a meter of that name can be
    given through a mapping.

    Args:
        mapping: meters by name.
        default_factory: creates the meter of an unknown name; `AverageMeter` with this mapping's options if None.
        device, distributed, group: as for `AverageMeter`.
        **meters: further meters.

    Examples:
        >>> meters = AverageMeters()
        >>> meters.update(loss=0.7, acc=0.5, n=2)
        >>> meters.update({"loss": 0.4, "acc": 0.8}, n=1)
        >>> meters.avg.round(2)
        RoundDict({'loss': 0.6, 'acc': 0.6})
        >>> meters.loss.count
        3
        >>> f"{meters:.2f}"
        'loss: 0.40 (0.60)  acc: 0.80 (0.60)'
    """

    def __init__(
        self,
        mapping: Mapping[str, AverageMeter] | None = None,
        *,
        default_factory: Callable[[], AverageMeter] | None = None,
        device: Any = None,
        distributed: bool = True,
        group: Any = None,
        **meters: AverageMeter,
    ) -> None:
        self._meters: dict[str, AverageMeter] = {}
        self._init_readable(device, distributed, group)
        self.default_factory = default_factory
        self._merged: dict[str, dict[str, Any]] = {}
        for name, meter in {**(mapping or {}), **meters}.items():
            self[name] = meter

    # mapping

    def __getitem__(self, name: str) -> AverageMeter:
        meter = self._meters.get(name)
        if meter is None:
            if not isinstance(name, str):
                raise TypeError(f"names of meters are strings, got {type(name).__name__}")
            meter = self._meters[name] = self._new_meter()
            self._version += 1
        return meter

    def _new_meter(self) -> AverageMeter:
        if self.default_factory is not None:
            return self.default_factory()
        return AverageMeter(device=self.device, distributed=self.distributed, group=self.group)

    def __setitem__(self, name: str, meter: AverageMeter) -> None:
        if not isinstance(meter, AverageMeter):
            raise TypeError(f"meter {name!r} must be an AverageMeter, got {type(meter).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"names of meters are strings, got {type(name).__name__}")
        self._meters[name] = meter
        self._forget_reads()

    def __delitem__(self, name: str) -> None:
        del self._meters[name]
        self._touch()

    def __getattr__(self, name: str) -> AverageMeter:
        meters = self.__dict__.get("_meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no meter {name!r}; it has {list(meters)}")

    def __contains__(self, name: object) -> bool:
        return name in self._meters

    def __iter__(self) -> Iterator[str]:
        return iter(self._meters)

    def __len__(self) -> int:
        return len(self._meters)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._meters)})"

    def keys(self):
        """Names of the meters."""
        return self._meters.keys()

    def values(self):
        """The meters."""
        return self._meters.values()

    def items(self):
        """Names and meters."""
        return self._meters.items()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a meter, or `default` if there is none of that name."""
        return self._meters.get(name, default)

    # updating

    def update(self, mapping: Mapping[str, Any] | None = None, *, n: Any = 1, **values: Any) -> None:
        """Add one value to each named meter.

        Args:
            mapping: values by name.
            n: the weight of all of them, or a mapping of weights by name.
            **values: further values.

        Raises:
            ValueError: a weight for a name that gets no value, or as for `AverageMeter.update`.
        """
        if mapping is None:
            mapping = values
        elif values:
            mapping = {**mapping, **values}
        if isinstance(n, Mapping):
            if extra := [name for name in n if name not in mapping]:
                raise ValueError(f"weights for {extra}, which get no value in this update; values: {list(mapping)}")
            for name, value in mapping.items():
                self[name].update(value, n.get(name, 1))
        else:
            for name, value in mapping.items():
                meter = self._meters.get(name)
                (self[name] if meter is None else meter).update(value, n)
        self._version += 1

    def reset(self) -> None:
        """Forget every value; the meters stay."""
        for meter in self._meters.values():
            meter.reset()
        self._touch()

    # reading

    def _current(self) -> int:
        return self._version + sum(m._version for m in self._meters.values())

    @property
    def sum(self) -> RoundDict:
        """This rank's weighted sums by name."""
        return RoundDict({name: meter.sum for name, meter in self._meters.items()})

    @property
    def count(self) -> RoundDict:
        """This rank's weights so far by name."""
        return RoundDict({name: meter.count for name, meter in self._meters.items()})

    @property
    def n(self) -> RoundDict:
        """The weight of the last update by name."""
        return RoundDict({name: meter.n for name, meter in self._meters.items()})

    def _compute(self, kind: str) -> RoundDict:
        meters = self._meters
        if kind == "value":
            scalars = read_scalars([m._last for m in meters.values()])
            return RoundDict(zip(meters, scalars, strict=True))
        if kind == "local_average":
            for meter in meters.values():
                meter._check(kind)
            totals = {name: m._totals() for name, m in meters.items()}
        else:
            totals = self._merged[kind]
        flat = read_scalars([x for pair in totals.values() for x in pair])
        return RoundDict({name: ratio(flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(totals)})

    # exchange

    def _describe(self) -> dict[str, Any] | None:
        if not self._meters:
            return None
        return {"class": type(self).__name__, "meters": {name: type(m).__name__ for name, m in self._meters.items()}}

    def _adopt(self, description: Mapping[str, Any]) -> None:
        for name in description["meters"]:
            self[name]

    def _check(self, kind: str) -> None:
        for meter in self._meters.values():
            meter._check(kind)

    def _pack(self, kind: str) -> sync.Payload:
        meters = [self._meters[name] for name in sorted(self._meters)]
        device = next((m._acc.device for m in meters if m._acc is not None), torch.device("cpu"))
        return sync.Payload(parts=pack_meters(meters, kind, device))

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        names = sorted(self._meters)
        merged = dict(zip(names, unpack_meters(names, parts), strict=True)) if names else {}
        self._merged[kind] = {name: merged[name] for name in self._meters}

    def sync(self) -> RoundDict:
        """Exchange with all ranks and return `{name: {"sum": ..., "count": ...}}` over all of them. Collective."""
        if self._is_distributed():
            self._exchange("average")
            totals = self._merged["average"]
        else:
            totals = {name: m._totals() for name, m in self._meters.items()}
        return RoundDict({name: {"sum": to_host(s), "count": to_host(c)} for name, (s, c) in totals.items()})

    # saving, merging, moving

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as tensors and plain values."""
        return {"version": 1, "meters": {name: m.state_dict() for name, m in self._meters.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Meters that the state does not hold are forgotten.

        Raises:
            ValueError: a meter of the state is of another class than the one here.
        """
        if state.get("version") != 1 or "meters" not in state:
            raise ValueError("this is not the state of AverageMeters, or it was written by a newer version")
        meters = {}
        for name, value in state["meters"].items():
            meters[name] = self._meters.get(name) or self._new_meter()
            meters[name].load_state_dict(value)
        self._meters = meters
        self._touch()

    def merge(self, other: AverageMeters) -> AverageMeters:
        """Add what another mapping has seen, by name; `other` stays as it is. Returns self."""
        for name, meter in other._meters.items():
            self[name].merge(meter)
        self._touch()
        return self

    def to(self, device: Any) -> AverageMeters:
        """Move every meter to a device. Returns self."""
        self.device = torch.device(device)
        for meter in self._meters.values():
            meter.to(device)
        return self
