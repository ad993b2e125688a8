"""A learning rate schedule in closed form: warm-up, a curve, cool-down."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .names import nearest, normalize

DEFAULT_RATIO = 1e-3
INTERPOLATIONS = ("percentile", "numerical")


class _Unset(str):
    """A default that can be told from the same string given by the caller."""


_COSINE = _Unset("cosine")


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Learning rates that rise during warm-up, follow a curve, and run down during cool-down.

    **With the default cool-down the last fifth of the schedule runs down to the floor.** To reach the final rate and
    stay there, pass `cooldown_steps=0`.

    For a parameter group with base rate `b`, final rate `f`, floor `m = min(min_lr, f)`, total steps
    `N`, warm-up `W`, cool-down `C`, and the number `s` of the optimizer step that uses the rate (1 after
    construction, one more after each `step()`):

    1. progress `p = min(s / N, 1)`, ratio `r = strategy(p)` from 0 to 1, and
       `y = b (f / b)^r` (`"percentile"`) or `y = f + (1 - r)(b - f)` (`"numerical"`);
    2. while `s < W`: `y ← m + (s / W)(y - m)`;
    3. once `s > N - C`: `y ← m + k (y - m)` with `k = max(0, (N - s) / C)`;
    4. the rate is `max(m, y)`.

    After step `N` the last value is held. Rates depend on `s` alone, so resuming is exact to the bit.

    Strategies, as the ratio `r` or in place of it:

    - `linear`: `p`; `cosine`: `(1 - cos π p) / 2`; `constant`: 0;
    - `polynomial`: `1 - (1 - p)^power`, with `power=2.0`; numerical by default;
    - `exponential`: `p`, percentile only;
    - `inverse_sqrt`: `y = max(f, b sqrt(T / max(s, T)))` in place of 1, with `timescale=T`, by default `W`, or
      `max(1, total_steps // 20)` without warm-up;
    - `wsd`: `b` until `s = N - C`, then down to `f` at `N`, in place of 3, with `decay="linear"`, `"cosine"` or
      `"sqrt"`; numerical by default.

    A subclass adds a strategy by defining a method of that name that maps progress to a ratio; its keyword-only
    parameters become options.

    Args:
        optimizer: the optimizer whose groups get the rates.
        total_steps: number of optimizer steps, `N`.
        final_lr_ratio: final rate as a fraction of each group's base rate. Default: 1e-3 without `final_lr`.
        final_lr: final rate of every group.
        min_lr: the floor of warm-up and cool-down, unless the final rate is lower.
        strategy: name of the curve.
        warmup_steps: `W`; default `total_steps // 20`. 0 switches warm-up off.
        cooldown_steps: `C`; default `total_steps // 5`. 0 switches cool-down off.
        last_epoch: steps already done, minus one; -1 starts from the beginning.
        method: `"percentile"` (geometric) or `"numerical"` (linear) interpolation; default percentile, or numerical if
            `final_lr` is given. The name of a curve is read as `strategy`.
        **options: options of the strategy; also `scaling`, another name for `method`.

    Raises:
        TypeError: an option that the strategy does not have; the accepted ones are listed.
        ValueError: values that contradict each other or lie outside their range.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = LRScheduler(
        ...     optimizer, 8, final_lr=0.2, min_lr=0, strategy="linear", warmup_steps=2, cooldown_steps=0
        ... )
        >>> [round(scheduler.lr_at(s)[0], 2) for s in range(1, 9)]
        [0.45, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]

        >>> class Stairs(LRScheduler):
        ...     def stairs(self, progress: float, *, n: int = 4) -> float:
        ...         return min(int(progress * n), n - 1) / (n - 1)
        >>> stairs = Stairs(
        ...     optimizer, 4, final_lr=0.25, strategy="stairs", method="numerical", warmup_steps=0, cooldown_steps=0
        ... )
        >>> [stairs.lr_at(s)[0] for s in range(1, 5)]
        [0.75, 0.5, 0.25, 0.25]
    """

    # torch's constructor is not called: it would wrap the optimizer's `step` to watch the order of calls.
    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        final_lr_ratio: float | None = None,
        final_lr: float | None = None,
        min_lr: float = 1e-9,
        strategy: str = _COSINE,
        warmup_steps: int | None = None,
        cooldown_steps: int | None = None,
        last_epoch: int = -1,
        method: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, but must be a torch.optim.Optimizer")
        strategy, method = self._read_names(strategy, method, options.pop("scaling", None))
        self.optimizer = optimizer
        self.final_lr_ratio = _number("final_lr_ratio", final_lr_ratio)
        self.final_lr = _number("final_lr", final_lr)
        if final_lr_ratio is not None and final_lr is not None:
            raise ValueError(f"final_lr_ratio={final_lr_ratio!r} and final_lr={final_lr!r} are both given: keep one")
        self.min_lr = _number("min_lr", min_lr)
        self.strategy = self._find_strategy(strategy)
        self.method = self._find_method(method)
        self.options = self._check_options(options)
        self._set_lengths(total_steps, warmup_steps, cooldown_steps)
        last_epoch = operator.index(last_epoch)
        if last_epoch < -1:
            raise ValueError(f"last_epoch={last_epoch} is smaller than -1, the value of a fresh schedule")
        self.base_lrs = []
        self._adopt_groups(resumed=last_epoch >= 0)
        self._check_percentile()
        self.last_epoch = last_epoch
        self._held = False
        self._initial_step()

    base_lrs: list[float]  # type: ignore[assignment]
    _last_lr: list[float]  # type: ignore[assignment]

    # Position

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step, or to `epoch`, counted from 0, and write the rates into the optimizer.

        Warns once when the schedule is over and its last value is used again.
        """
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        # The rate that is set after the last step is not used yet: only a further step uses the last value twice.
        if self.last_epoch > self.total_steps and not self._held:
            self._held = True
            warnings.warn(
                f"the schedule has {self.total_steps} steps and is over: the last learning rate is held. "
                "Pass a larger total_steps, or call set_total_steps",
                UserWarning,
                stacklevel=3,
            )
        self._write()

    def _initial_step(self) -> None:
        self._step_count = 0
        self.step()

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        if len(groups) > len(self.base_lrs):
            self._adopt_groups()
            self._check_percentile()
        rates = self._rates(self.last_epoch + 1)
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    def _adopt_groups(self, resumed: bool = False) -> None:
        """Record the base rates of groups that are new here."""
        for index, group in enumerate(self.optimizer.param_groups):
            if index < len(self.base_lrs):
                continue
            if resumed and "initial_lr" not in group:
                raise ValueError(
                    f"last_epoch is given, but group {index} of the optimizer has no 'initial_lr' to start from: "
                    "load the optimizer's state first, or leave last_epoch out and load the scheduler's state"
                )
            lr = group["lr"]
            initial = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs.append(float(initial))

    # Rates

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rates of the current step, one per group."""
        return self._rates(self.last_epoch + 1)

    def lr_at(self, step: int) -> list[float]:
        """Return the rates of a step, one per group, without touching the optimizer.

        Args:
            step: number of an optimizer step, from 1. Steps after the last have the rates of the last.

        Raises:
            ValueError: the step is smaller than 1.
        """
        if step < 1:
            raise ValueError(f"step={step!r}, but steps count from 1")
        return self._rates(step)

    def _rates(self, step: int) -> list[float]:
        step = min(step, self.total_steps)
        ratio = None if self.strategy == "inverse_sqrt" else self._ratio(step)
        return [self._rate(step, ratio, base) for base in self.base_lrs]

    def _rate(self, step: int, ratio: float | None, base: float) -> float:
        if base == 0:
            return 0.0
        final = self._final(base)
        floor = min(self.min_lr, final)
        total, warmup, cooldown = self.total_steps, self.warmup_steps, self.cooldown_steps
        if ratio is None:
            time = self._timescale()
            rate = max(final, base * math.sqrt(time / max(step, time)))
        else:
            rate = self._interpolate(ratio, base, final)
        if step < warmup:
            rate = floor + step / warmup * (rate - floor)
        if step > total - cooldown and self.strategy != "wsd":
            rate = floor + (total - step) / cooldown * (rate - floor)
        return max(floor, min(rate, max(base, final)))

    def _final(self, base: float) -> float:
        if self.final_lr is not None:
            return self.final_lr
        return base * (DEFAULT_RATIO if self.final_lr_ratio is None else self.final_lr_ratio)

    def _interpolate(self, ratio: float, base: float, final: float) -> float:
        # The ends are given exactly; rounding must not leave the interval between them.
        if ratio == 0:
            return base
        if ratio == 1:
            return final
        if self.interpolation == "percentile":
            rate = base * (final / base) ** ratio
        else:
            rate = final + (1 - ratio) * (base - final)
        low, high = (final, base) if final <= base else (base, final)
        return min(max(rate, low), high)

    def _ratio(self, step: int) -> float:
        if self.strategy == "wsd":
            start = self.total_steps - self.cooldown_steps
            progress = 0.0 if step <= start else (step - start) / self.cooldown_steps
        else:
            progress = step / self.total_steps
        ratio = getattr(self, self.strategy)(progress, **self.options)
        if 0 <= ratio <= 1:
            return ratio
        if -1e-12 < ratio < 1 + 1e-12:
            return min(max(ratio, 0.0), 1.0)
        raise ValueError(
            f"strategy {self.strategy!r} returned {ratio!r} at progress p={progress!r}, but a ratio lies in [0, 1]"
        )

    def _timescale(self) -> float:
        timescale = self.options.get("timescale")
        if timescale is not None:
            return timescale
        return self.warmup_steps or max(1, self.total_steps // 20)

    @property
    def interpolation(self) -> str:
        """The interpolation in force: `method`, or the default that follows from the other arguments."""
        if self.method is not None:
            return self.method
        if self.strategy in ("polynomial", "wsd"):
            return "numerical"
        return "percentile" if self.final_lr is None or self.strategy == "exponential" else "numerical"

    # Strategies

    def linear(self, progress: float) -> float:
        return progress

    def cosine(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2

    def constant(self, progress: float) -> float:
        return 0.0

    def polynomial(self, progress: float, *, power: float = 2.0) -> float:
        return 1 - (1 - progress) ** power

    def exponential(self, progress: float) -> float:
        return progress

    def inverse_sqrt(self, progress: float, *, timescale: float | None = None) -> float:
        raise NotImplementedError("inverse_sqrt has a curve of its own in place of a ratio")

    def wsd(self, progress: float, *, decay: str = "linear") -> float:
        return _DECAYS[decay](progress)

    @classmethod
    def strategies(cls) -> dict[str, tuple[str, ...]]:
        """Return the names of all strategies of this class, each with its options.

        Examples:
            >>> LRScheduler.strategies()["polynomial"]
            ('power',)
        """
        return {name: cls._options_of(name) for name in cls._strategy_names()}

    @classmethod
    def _strategy_names(cls) -> list[str]:
        kinds = [kind for kind in reversed(cls.__mro__) if issubclass(kind, LRScheduler)]
        return [
            name
            for name, function in {name: value for kind in kinds for name, value in vars(kind).items()}.items()
            if inspect.isfunction(function) and not name.startswith("_") and name not in _NO_STRATEGIES
        ]

    @classmethod
    def _options_of(cls, strategy: str) -> tuple[str, ...]:
        parameters = inspect.signature(getattr(cls, strategy)).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    @classmethod
    def _find_strategy(cls, name: Any) -> str:
        known = {normalize(strategy): strategy for strategy in cls._strategy_names()}
        found = known.get(normalize(name)) if isinstance(name, str) else None
        if found is None:
            offers = ", ".join(nearest(str(name), known.values())[:3])
            raise ValueError(f"strategy={name!r} is unknown; the nearest names are {offers}")
        return found

    def _find_method(self, name: Any) -> str | None:
        if name is None:
            return None
        if not isinstance(name, str) or normalize(name) not in INTERPOLATIONS:
            raise ValueError(
                f"method={name!r} is unknown; the interpolations are {nearest(str(name), INTERPOLATIONS)}, "
                f"the strategies nearest to it {nearest(str(name), self._strategy_names())[:3]}"
            )
        found = normalize(name)
        if self.strategy == "exponential" and found == "numerical":
            raise ValueError("strategy='exponential' is geometric: method='numerical' contradicts it, use 'linear'")
        if self.strategy == "inverse_sqrt":
            raise ValueError(f"strategy='inverse_sqrt' has a curve of its own: leave method={name!r} out")
        return found

    @classmethod
    def _read_names(cls, strategy: str, method: str | None, scaling: str | None) -> tuple[str, str | None]:
        """Sort the three names into strategy and method; `method` may name either."""
        given = None if isinstance(strategy, _Unset) else strategy
        if isinstance(method, str) and normalize(method) in map(normalize, cls._strategy_names()):
            if given is not None and normalize(given) != normalize(method):
                raise ValueError(f"strategy={given!r} and method={method!r} name two different curves: keep one")
            given, method = method, None
        if scaling is not None:
            if method is not None and normalize(str(method)) != normalize(str(scaling)):
                raise ValueError(f"method={method!r} and scaling={scaling!r} are two different values: keep one")
            method = scaling
        return str(_COSINE) if given is None else given, method

    def _check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        accepted = self._options_of(self.strategy)
        for name in options:
            if name not in accepted:
                offers = ", ".join(nearest(name, (*accepted, *_ARGUMENTS)))
                raise TypeError(f"strategy {self.strategy!r} has no option {name!r}; accepted are {offers}")
        if "decay" in options and self.strategy == "wsd" and options["decay"] not in _DECAYS:
            raise ValueError(
                f"decay={options['decay']!r} is unknown; it is one of {nearest(str(options['decay']), _DECAYS)}"
            )
        for name in ("power", "timescale"):
            _number(name, options.get(name))
        if options.get("timescale") == 0:
            raise ValueError("timescale=0, but must be positive")
        return dict(options)

    # Length

    def set_total_steps(self, total_steps: int) -> None:
        """Give the schedule another length from the current step on; the position stays.

        Warm-up and cool-down follow if they were not given. The rate of the current step is written at once.

        Raises:
            ValueError: `total_steps` is smaller than 1, or than the warm-up and cool-down that were given.
        """
        drives = self._drives()
        self._set_lengths(total_steps, self._given_warmup, self._given_cooldown)
        self._held = False
        if drives:
            self._write()

    def _set_lengths(self, total: Any, warmup: Any, cooldown: Any) -> None:
        total = _whole("total_steps", total)
        if total < 1:
            raise ValueError(f"total_steps={total}, but a schedule has at least 1 step")
        given = {
            "warmup_steps": None if warmup is None else _whole("warmup_steps", warmup),
            "cooldown_steps": None if cooldown is None else _whole("cooldown_steps", cooldown),
        }
        used = sum(value for value in given.values() if value is not None)
        if used > total:
            names = " + ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{names} is more than total_steps={total}")
        self.total_steps = total
        self._given_warmup, self._given_cooldown = given.values()
        warmup, cooldown = given.values()
        self.warmup_steps: int = min(total // 20, total - used) if warmup is None else warmup
        self.cooldown_steps: int = min(total // 5, total - used) if cooldown is None else cooldown

    def _check_percentile(self) -> None:
        if self.interpolation != "percentile" or self.strategy == "inverse_sqrt":
            return
        for index, base in enumerate(self.base_lrs):
            if base != 0 and self._final(base) == 0:
                raise ValueError(
                    f"the final rate of group {index} is 0, which geometric interpolation never reaches: "
                    'pass method="numerical" or a positive final rate'
                )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return position, base rates and curve as plain values."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "total_steps": self.total_steps,
            "final_lr_ratio": self.final_lr_ratio,
            "final_lr": self.final_lr,
            "min_lr": self.min_lr,
            "strategy": self.strategy,
            "method": self.method,
            "warmup_steps": self._given_warmup,
            "cooldown_steps": self._given_cooldown,
            "options": dict(self.options),
            "held": self._held,
            "drives": self._drives(),
        }

    def _drives(self) -> bool:
        """Return whether the optimizer has the rates written here, and not those of another part of a sequence."""
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=False):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                rate = torch.tensor(rate, dtype=lr.dtype).item()
            if float(lr) != rate:
                return False
        return True

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned and write the rates into the optimizer.

        The optimizer's own state may be loaded before or after. If the optimizer followed other rates when the state
        was taken, such as those of another part of a `SequentialLR`, they are left alone.

        Raises:
            ValueError: the state is of another kind of scheduler, of other parameter groups, or names a strategy that
                this class does not have.
        """
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ValueError(f"this is no state of a {type(self).__name__}: {sorted(missing)} missing")
        groups = self.optimizer.param_groups
        base_lrs = [float(base) for base in state_dict["base_lrs"]]
        if len(base_lrs) != len(groups):
            raise ValueError(f"the state has {len(base_lrs)} parameter groups, but the optimizer has {len(groups)}")
        before = dict(self.__dict__)
        try:
            self.strategy = self._find_strategy(state_dict["strategy"])
            self.options = self._check_options(state_dict["options"])
            self._set_lengths(state_dict["total_steps"], state_dict["warmup_steps"], state_dict["cooldown_steps"])
        except (TypeError, ValueError):
            self.__dict__.update(before)
            raise
        for name in ("final_lr_ratio", "final_lr", "min_lr", "method", "last_epoch"):
            setattr(self, name, state_dict[name])
        self._step_count, self._held = state_dict["step_count"], state_dict["held"]
        self.base_lrs = base_lrs
        for group, base in zip(groups, base_lrs, strict=True):
            if isinstance(group.get("initial_lr"), Tensor):
                group["initial_lr"].fill_(base)
            else:
                group["initial_lr"] = base
        if state_dict["drives"]:
            self._write()
        else:
            self._last_lr = self.get_lr()

    def plot(self, ax: Any = None) -> Any:
        """Draw the rates of all groups over steps 1 to `total_steps`.

        Args:
            ax: matplotlib axes to draw into; without it a new figure is made. `pyplot` is not used.

        Returns:
            The matplotlib `Figure`; `figure.savefig("lr.png")` writes it.

        Raises:
            ImportError: matplotlib is missing.
        """
        if ax is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError('plot needs matplotlib: pip install "danling-optim[plot]"') from error
            ax = Figure(layout="constrained").add_subplot()
        # No figure shows more points than this; the first and the last step are always among them.
        count = min(self.total_steps, 4096)
        steps = [1 + round(i * (self.total_steps - 1) / max(1, count - 1)) for i in range(count)]
        curves = zip(*(self.lr_at(step) for step in steps), strict=True)
        for group, curve in zip(self.optimizer.param_groups, curves, strict=True):
            ax.plot(steps, curve, label=group.get("name"))
        ax.set_xlabel("step")
        ax.set_ylabel("learning rate")
        ax.set_title(self.strategy)
        if any("name" in group for group in self.optimizer.param_groups):
            ax.legend()
        return ax.figure


_DECAYS = {
    "linear": lambda q: q,
    "cosine": lambda q: (1 - math.cos(math.pi * q)) / 2,
    "sqrt": math.sqrt,
}
_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(LRScheduler).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)
_BUILT_IN = ("linear", "cosine", "constant", "polynomial", "exponential", "inverse_sqrt", "wsd")
_NO_STRATEGIES = (set(dir(torch.optim.lr_scheduler.LRScheduler)) | set(dir(LRScheduler))) - set(_BUILT_IN)


def _number(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is no number") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r}, but must be finite and not negative")
    return number


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        if not isinstance(value, float) or not value.is_integer():
            raise ValueError(f"{name}={value!r}, but must be a whole number") from None
        number = int(value)
    if number < 0:
        raise ValueError(f"{name}={value!r}, but must not be negative")
    return number


def arguments_of(kind: type[LRScheduler], strategy: str) -> tuple[str, ...]:
    """Return the keywords of a scheduler whose strategy is settled."""
    return (
        *(name for name in _ARGUMENTS if name not in ("optimizer", "strategy")),
        "scaling",
        *kind.strategies()[strategy],
    )
