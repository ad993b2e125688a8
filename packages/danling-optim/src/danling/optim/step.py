"""One update of the weights: unscale, scale, check, clip, step, schedule, clear, in one fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .gradients import Gradients, Reduce, largest_over_mesh, mesh_of, moved


class OptimizerStepResult(NamedTuple):
    """What one call of `OptimizerStep.step` did.

    Attributes:
        stepped: whether the optimizer moved; False if the update was skipped.
        grad_norm: norm of all gradients before they were scaled by it: float32, no dimensions, on the device of the
            gradients. `None` without `clip_norm`.
    """

    stepped: bool
    grad_norm: Tensor | None


_STEPPED = OptimizerStepResult(True, None)


class OptimizerStep:
    """The update of one optimizer together with its scheduler and gradient scaler.

    `step()` does, in this order:

    1. `scaler.unscale_`, if there is a scaler;
    2. multiply gradients by `grad_scale`, unless that is the number 1;
    3. with `skip_nonfinite` or a scaler, look for infinite and NaN gradients; if there are any, clear the gradients,
       update the scaler, count the skip and change nothing else;
    4. clip by value, then by norm;
    5. `optimizer.step()`, `scheduler.step()` if the scheduler follows steps, clear the gradients, `scaler.update()`.

    The host waits for the device only for the verdict of 3, once; without `skip_nonfinite` and scaler, never.
    Attributes that are not listed here are those of the optimizer (`param_groups`, `state`, `add_param_group`, ...).

    Args:
        optimizer: a `torch.optim.Optimizer`, or an object with `param_groups`, `step`, `zero_grad` and state dicts.
        scheduler: any scheduler of torch or of this package.
        interval: when the scheduler moves: `"step"`, after each update, or `"epoch"`, when `step_scheduler` is called.
            Default: `"epoch"` for `ReduceLROnPlateau`, else `"step"`.
        clip_value: largest magnitude of a gradient element.
        clip_norm: largest norm of all gradients together; `math.inf` measures without clipping.
        norm_type: order of that norm, positive or `math.inf`.
        skip_nonfinite: skip updates with infinite or NaN gradients. With norm clipping alone the verdict is that of the
            norm, which costs no pass of its own.
        scaler: a `torch.amp.GradScaler`. Give each optimizer a scaler of its own.
        reduce_norm: extends the sum of `norm_type`-th powers (the maximum for infinity) over ranks that hold further
            parameters, such as pipeline stages: `dist.all_reduce` for a sum. Shards of a `DTensor` are summed without.
        reduce_flag: makes the non-finite flag (float32, 0 or 1) common to all ranks, for example
            `lambda flag: dist.all_reduce(flag, op=dist.ReduceOp.MAX)`. Both may work in place or return the result.

    Attributes:
        skipped: how many updates were skipped.

    Raises:
        TypeError: the scaler is no `torch.amp.GradScaler`.
        ValueError: an unknown interval, a limit that is not positive, a norm type that is not positive.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> update = OptimizerStep(torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=1.0)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> result = update.step()
        >>> result.stepped, round(result.grad_norm.item(), 4)
        (True, 6.9282)
        >>> model.weight.grad is None
        True
    """

    def __init__(
        self,
        optimizer: Any,
        scheduler: Any = None,
        *,
        interval: str | None = None,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        scaler: Any = None,
        reduce_norm: Reduce | None = None,
        reduce_flag: Reduce | None = None,
    ) -> None:
        if interval not in (None, "step", "epoch"):
            raise ValueError(f"interval is {interval!r}, but a scheduler follows 'step' or 'epoch'")
        for name, value in (("clip_value", clip_value), ("clip_norm", clip_norm), ("norm_type", norm_type)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}, but must be positive")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler is a {type(scaler).__name__}, but must be a torch.amp.GradScaler")
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.interval = interval or ("epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step")
        self.clip_value = clip_value
        self.clip_norm = clip_norm
        self.norm_type = float(norm_type)
        self.skip_nonfinite = skip_nonfinite
        self.scaler = scaler
        self.reduce_norm = reduce_norm
        self.reduce_flag = reduce_flag
        self.skipped = 0
        self._ids: list[int] | None = None
        self._params: list[Tensor] = []
        self._meshes: list[Any] = []
        self._device = torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        # Called for what this class lacks. `__dict__` is empty while an object is being copied or unpickled.
        if "optimizer" in self.__dict__ and not name.startswith("__"):
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        scheduler = None if self.scheduler is None else type(self.scheduler).__name__
        return (
            f"{type(self).__name__}({type(self.optimizer).__name__}, scheduler={scheduler}, interval={self.interval})"
        )

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        metric: Any = None,
        zero_grad: bool = True,
    ) -> OptimizerStepResult:
        """Update the weights from the gradients that are there.

        Args:
            closure: evaluates the loss and its gradients again, for optimizers that want it (`LBFGS`). The gradients of
                every evaluation are scaled and clipped.
            grad_scale: number or tensor without dimensions; the exact mean over uneven micro-batches.
            metric: what a `ReduceLROnPlateau` scheduler with `interval="step"` looks at.
            zero_grad: whether to clear gradients after the update. A skipped update always clears them.

        Raises:
            ValueError: a plateau scheduler is due without a metric; or a closure together with a scaler or
                `skip_nonfinite`, whose verdict would come before the gradients.
        """
        scaled = isinstance(grad_scale, Tensor) or grad_scale != 1
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        schedule = self.scheduler is not None and self.interval == "step"
        if schedule:
            self._require_metric(metric)
        norm = None
        clips = self.clip_norm is not None or self.clip_value is not None
        if scaled or scaler is not None or self.skip_nonfinite or clips:
            if closure is None:
                norm, skip = self._prepare(grad_scale if scaled else None, scaler)
                if skip:
                    self.optimizer.zero_grad()
                    if scaler is not None:
                        scaler.update()
                    self.skipped += 1
                    return OptimizerStepResult(False, _as_float32(norm))
            else:
                return self._step_closure(closure, grad_scale if scaled else None, metric, zero_grad)
        if closure is None:
            self.optimizer.step()
        else:
            self.optimizer.step(closure)
        if schedule:
            self.step_scheduler(metric)
        if zero_grad:
            self.optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
        return _STEPPED if norm is None else OptimizerStepResult(True, _as_float32(norm))

    def clip_gradients(self) -> Tensor | None:
        """Clip gradients by value, then by norm, and return the norm before (`None` without `clip_norm`)."""
        with torch.no_grad():
            grads = self._gradients()
            if self.clip_value is not None:
                grads.clamp_(self.clip_value)
            if self.clip_norm is None:
                return None
            norm = grads.norm(self.norm_type, self.reduce_norm)
            self._scale_by(grads, norm)
            return _as_float32(norm)

    def has_nan_inf_grad(self) -> Tensor:
        """Return whether any gradient here holds an infinite or NaN element: a bool tensor, not read by the host."""
        with torch.no_grad():
            return self._gradients().nonfinite() > 0

    def step_scheduler(self, metric: Any = None) -> None:
        """Move the scheduler; `metric` goes to a `ReduceLROnPlateau`, which needs one.

        Raises:
            ValueError: the scheduler needs a metric and got none.
        """
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self._require_metric(metric)
            self.scheduler.step(metric)
        else:
            self.scheduler.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        if set_to_none:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimizer, scheduler and scaler (`None` for those that are absent) and `skipped`."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state has a part that this object lacks, or lacks one that it has; nothing is changed.
        """
        for name in ("optimizer", "scheduler", "scaler"):
            here, there = getattr(self, name) is not None, state_dict.get(name) is not None
            if here != there:
                raise ValueError(
                    f"the state has {'a' if there else 'no'} {name}, "
                    f"but this {type(self).__name__} has {'one' if here else 'none'}"
                )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
        self.skipped = int(state_dict.get("skipped", 0))

    def _require_metric(self, metric: Any) -> None:
        if metric is None and isinstance(self.scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau follows a metric: pass metric=... when it is due")

    def _gradients(self) -> Gradients:
        """Return the gradients of the unique parameters, which are listed again whenever a group holds other ones."""
        groups = self.optimizer.param_groups
        ids = [id(param) for group in groups for param in group["params"]]
        if ids != self._ids:
            unique = {id(param): param for param in chain.from_iterable(group["params"] for group in groups)}
            self._params = list(unique.values())
            meshes = (mesh_of(param) for param in self._params)
            self._meshes = list(dict.fromkeys(mesh for mesh in meshes if mesh is not None))
            self._device = self._params[0].device if self._params else torch.device("cpu")
            self._ids = ids
        return Gradients(self._params, self._device, self._meshes)

    def _scale_by(self, grads: Gradients, norm: Tensor) -> None:
        if self.clip_norm is not None and self.clip_norm != math.inf:
            grads.scale_((self.clip_norm / (norm + 1e-6)).clamp_(max=1.0))

    @torch.no_grad()
    def _prepare(self, grad_scale: float | Tensor | None, scaler: Any) -> tuple[Tensor | None, bool]:
        """Do everything that precedes the optimizer; return the norm and whether to skip."""
        found = None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
            found = scaler._found_inf_per_device(self.optimizer)
        grads = self._gradients()
        if grad_scale is not None:
            grads.scale_(grad_scale)
        norm = None
        if self.clip_norm is not None and self.clip_value is None:
            norm = grads.norm(self.norm_type, self.reduce_norm)
        if scaler is not None or self.skip_nonfinite:
            flag = self._flag(grads, norm, found)
            if bool(flag):
                # Collective if the gradients are distributed, and so is the verdict: all ranks come here or none.
                if self.clip_norm is not None and norm is None:
                    norm = grads.norm(self.norm_type, self.reduce_norm)
                return norm, True
        if self.clip_value is not None:
            grads.clamp_(self.clip_value)
            if self.clip_norm is not None:
                norm = grads.norm(self.norm_type, self.reduce_norm)
        if norm is not None:
            self._scale_by(grads, norm)
        return norm, False

    def _flag(self, grads: Gradients, norm: Tensor | None, found: dict[torch.device, Tensor] | None) -> Tensor:
        """Return the non-finite flag, common to all ranks."""
        if found is not None:
            flag = torch.zeros((), dtype=torch.float32, device=grads.device)
            for other in found.values():
                flag = torch.maximum(flag, moved(other, grads.device))
        elif norm is not None:
            flag = norm.isfinite().logical_not().float()
        else:
            flag = grads.nonfinite()
        for mesh in self._meshes:
            flag = largest_over_mesh(flag, mesh)
        if self.reduce_flag is not None:
            reduced = self.reduce_flag(flag)
            flag = flag if reduced is None else reduced
        if found is not None:
            # The scaler follows the common verdict, or the ranks would scale differently from here on.
            found.setdefault(grads.device, flag)
            for other in found.values():
                other.copy_(flag)
        return flag

    def _step_closure(
        self, closure: Callable[[], Any], grad_scale: float | Tensor | None, metric: Any, zero_grad: bool
    ) -> OptimizerStepResult:
        if self.skip_nonfinite or (self.scaler is not None and self.scaler.is_enabled()):
            raise ValueError(
                "a closure computes gradients inside the optimizer, too late for skip_nonfinite or a scaler to decide: "
                "call step() without closure, or build the OptimizerStep without these"
            )
        norm = self._prepare(grad_scale, None)[0]

        def evaluate() -> Any:
            nonlocal norm
            loss = closure()
            norm = self._prepare(grad_scale, None)[0]
            return loss

        self.optimizer.step(evaluate)
        if self.scheduler is not None and self.interval == "step":
            self.step_scheduler(metric)
        if zero_grad:
            self.optimizer.zero_grad()
        return _STEPPED if norm is None else OptimizerStepResult(True, _as_float32(norm))


def _as_float32(norm: Tensor | None) -> Tensor | None:
    return None if norm is None else norm.to(torch.float32)


OptimizerContainer = OptimizerStep
