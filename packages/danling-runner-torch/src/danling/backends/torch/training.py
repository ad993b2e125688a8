"""A step of training: forward, backward, update, and what is counted and reported along the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from danling.metrics import AverageMeters
from danling.runners.state import RunnerMode

from .feed import Feed
from .local import Buffers
from .plain import is_fused, is_plain, plain_updates
from .weights import samples_in

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's

_NO_CONTEXT = nullcontext()


class _Muted:
    """Stands in for metrics and meters while a batch is run that counts for nothing."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def reset(self) -> None:
        """Do nothing."""


MUTED = _Muted()


def split_batch(data: Any) -> tuple[Any, Any]:
    """Input and target of a batch: items `input`, `target` of a mapping, 0 and 1 of a sequence; anything else is input.

    >>> split_batch({"input": 1, "target": 2}), split_batch([3, 4]), split_batch(5)
    ((1, 2), (3, 4), (5, None))
    """
    if type(data) in (list, tuple) and len(data) > 1:
        return data[0], data[1]
    if isinstance(data, Mapping):
        if "input" not in data:
            raise ValueError(f"a batch that is a mapping needs the key 'input'; it has {sorted(map(str, data))}")
        return data["input"], data.get("target")
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("a batch that is a sequence needs an input at position 0; it is empty")
        return data[0], data[1] if len(data) > 1 else None
    return data, None


class Training(_Host):
    """The training half of `TorchRunner`."""

    _first_update: bool
    _log_mark: tuple[float, float] | None
    _buffers_in_step: Buffers | None = None  # where engines keep them the same on all ranks with every update
    meets_in_backward = False  # whether ranks wait for each other in every backward pass

    def open_pass(self, split: str) -> Feed:
        """A context that yields windows of a train split from its position on."""
        return Feed(self, split)

    def shortcut(self, data: Any) -> Callable[[float, Any], bool | None] | None:
        """What trains while nothing is special, in fewer calls; see `plain_updates`."""
        fits = is_plain(self) and (data.completes or not self.distributed)  # type: ignore[arg-type]
        return plain_updates(self, data) if fits else None  # type: ignore[arg-type]

    def bare_update(self) -> Callable[[], Any] | None:
        """The step of the optimizer, if nothing but the count of updates follows it in `optimizer_step`."""
        bare = (
            is_fused(self, "optimizer_step")
            and self.updater is not None
            and self.ft is None
            and self._ema_schedule is None
            and self._buffers_in_step is None
            and self.profiler is None
            and not self._first_update
            and not self.supervisor.manages_gc
        )
        return self.updater.step if bare else None

    def forward(self, model: Any, data: Any) -> Any:
        """Call a model on the input of a batch; a mapping is passed as keywords."""
        if type(data) is not Tensor and isinstance(data, Mapping):
            return model(**data)
        return model(data)

    def train_step(self, data: Any) -> tuple[Any, Any]:
        """Train on one micro-batch: device, forward, loss, metrics, backward, step.

        Args:
            data: a batch of the loader.

        Returns:
            The prediction, and the loss or None; a loss of None is not recorded.
        """
        source, target = split_batch(self.to_device(data))
        with self.train_context():
            prediction = self.forward(self.model, source)
            loss = self._loss(prediction, target)
        metrics = self.train_metrics
        if metrics is not None and target is not None:
            metrics.update(prediction, target)  # detaches what it keeps
        self.advance(loss)
        return prediction, loss

    def _loss(self, prediction: Any, target: Any) -> Any:
        if self.criterion is None:
            if target is None and isinstance(prediction, Tensor) and prediction.dim() == 0:
                return prediction  # the model returns its own loss
            raise ValueError(f"{type(self).__name__} has no criterion: assign `self.criterion`, or override train_step")
        return self.criterion(prediction, target)

    def train_context(self) -> AbstractContextManager:
        """Encloses forward and loss of a training step: precision, and no synchronisation inside a window."""
        if self._world[0] == 1 or self.window.is_last:  # type: ignore[index]
            return self.forward_context()
        stack = ExitStack()
        stack.enter_context(self.no_sync())
        stack.enter_context(self.forward_context())
        return stack

    def forward_context(self) -> AbstractContextManager:
        """Encloses forward and loss: precision."""
        return _NO_CONTEXT if self.precision.dtype is None else self.precision.autocast()

    def no_sync(self) -> AbstractContextManager:
        """A context in which gradients of replicas are not averaged."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else _NO_CONTEXT

    def loss_weight(self, batch: Any) -> Any:
        """The weight of a micro-batch, when overridden: the number of terms its loss averages over."""
        return samples_in(batch)

    def advance(self, loss: Any) -> None:
        """`backward(loss)`, then `step()`."""
        self.backward(loss)
        self.step()

    def backward(self, loss: Any) -> None:
        """Apply the window's factor and the loss scale, and backpropagate.

        Raises:
            ValueError: the loss is not a scalar.
            TypeError: it is not a tensor.
            RuntimeError: the window is complete already.
        """
        self.check_loss(loss)
        window = self.window
        if window.awaited is not None:
            window.settle()
        index = window.index
        try:
            weight, factors = window.weights[index], window.factors
        except IndexError:
            raise RuntimeError(
                "backward() after the last micro-batch of the window: train_step must call advance(loss), or "
                "backward(loss) and then step(), exactly once"
            ) from None
        if isinstance(weight, Tensor):  # on a device, which nobody waits for
            loss = torch.where(weight > 0, loss if factors is None else loss * factors[index], 0.0)
        elif window.is_filler if weight is None else weight == 0:
            self.backward_nothing(loss)
            return
        elif factors is not None:
            loss = loss * factors[index]
        self.backpropagate(loss)

    @staticmethod
    def check_loss(loss: Any) -> None:
        """Refuse what cannot be backpropagated: no tensor, or no scalar."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}; average it, with its loss_weight"
            )

    def backpropagate(self, loss: Tensor) -> None:
        """Backpropagate a loss that has its factor, scaled for fp16."""
        if self.grad_scaler is not None:
            loss = self.grad_scaler.scale(loss)
        loss.backward()

    def backward_nothing(self, loss: Tensor) -> None:
        """Backpropagate exact zeros, whatever the loss is, so that replicas that wait for gradients get them."""
        if not self.distributed or not self.window.is_last:
            return
        options = self.config.ddp
        if options.find_unused_parameters or options.static_graph:
            torch.nan_to_num(loss, 0.0, 0.0, 0.0).mul(0).backward()
            return
        zeros = [(p * torch.zeros_like(p)).sum() for p in self.model.parameters() if p.requires_grad]
        torch.stack([zero.float() for zero in zeros]).sum().backward()

    def step(self) -> None:
        """Count the micro-step; update at the end of the window.

        Raises:
            RuntimeError: outside training.
        """
        if self._mode is not RunnerMode.TRAIN:
            raise RuntimeError(f"step() belongs to training; the runner is in mode {self._mode}")
        window, state = self.window, self.state.train
        if window.awaited is not None:
            window.settle()
        state.micro_step += 1
        window.index += 1
        if window.index < len(window.batches):
            return
        if window.weighs and self.optimizer_step():
            window.applied = True
            state.skipped_in_a_row = 0
        else:
            if not window.weighs:
                self.zero_grad()
            state.skipped += 1
            state.skipped_in_a_row += 1
        if window.batches[0] is None:  # a step outside the loop: the next one is a window of its own
            window.open([None], [1])

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def optimizer_step(self) -> bool:
        """Update the weights and what follows every update; return whether it was applied.

        Order: buffers, optimizer step (unscale, check, clip, step, schedule, clear), EMA, `global_step`, profiler,
        time-outs of communication (after the first), garbage collection.
        """
        if self._buffers_in_step is not None:
            self._buffers_in_step.synchronise()
        if self.updater is None:
            raise RuntimeError(
                "there is no optimizer: set optim.type, assign self.optimizer, or override optimizer_step"
            )
        if self.ft is not None and not self.commits():
            return False
        stepped, self.grad_norm = self.updater.step()
        if not stepped:
            return False
        state = self.state.train
        step = state.global_step = state.global_step + 1
        if self._ema_schedule is not None:
            self._ema_schedule.after_update(self.unwrap(self.model), step)
        if self.profiler is not None:
            self.profiler.step()
        if self._first_update:
            self._first_update = False
            self.after_first_update()
        if self.supervisor.manages_gc:
            self.supervisor.collect(step)
        return True

    def after_first_update(self) -> None:
        """What is due once, when an update has been applied: from now on no collective waits for a slow start."""
        self.switch_timeouts()

    # Meters

    @property
    def meters(self) -> AverageMeters:
        """Averages of the mode in hand, `loss` among them; separate for training and for evaluation."""
        training = self._mode is RunnerMode.TRAIN
        return MUTED if training and self.window.is_filler else self._meters[training]  # type: ignore[return-value]

    def record_loss(self, loss: Any) -> None:
        """Add the loss of the micro-batch that was just run to the meters, with its weight."""
        window = self.window
        index = window.index - 1
        if index >= window.fillers:
            return
        weight = window.weights[index]
        if isinstance(loss, Tensor):
            loss = loss.item() if loss.is_cpu else loss.detach()
        if weight is None:  # losses are added: shown per sample
            weight = samples_in(window.batches[index])
            loss = loss / weight
        self._meters[True]["loss"].update(loss, weight)

    def read_training(self, split: str, *, reset: bool) -> dict[str, Any]:
        """Metrics of the training since the last reset, over all ranks."""
        self.share_buffers()
        meters = self._meters[True]
        values = plain_metrics(meters.average() if len(meters) else {})
        if self.train_metrics is not None:
            values |= plain_metrics(_average(self.train_metrics))
        if reset:
            meters.reset()
            if self.train_metrics is not None:
                self.train_metrics.reset()
            self._log_mark = None
        return values

    # Log points

    def start_clock(self) -> None:
        """Begin to measure speed from here."""
        self._clock = (
            time.perf_counter(),
            self.train_state.global_step,
            self.train_state.samples,
            self.train_state.tokens,
        )

    def log_training(self) -> None:
        """Report the values since the last log point: one reduction, one host read."""
        values = self.collect_log()
        if not math.isfinite(values.get("loss", 0.0)):
            self.logger.warning("the loss is %s at step %d", values["loss"], self.global_step)
        self.trackers.log(self.split, values, global_step=self.global_step, epoch=self.epoch)
        if self.is_main_process:
            phase = "train" if self.is_step_mode else f"epoch {self.epoch + 1}/{self.epochs} {self.split}"
            self.console.log(phase, self.global_step, self.steps, values)
        self.emit("log", metrics=values)

    def collect_log(self) -> dict[str, float]:
        """Loss since the last log point, learning rates, gradient norm, speed, memory, skips."""
        state = self.train_state
        meter = self._meters[True]["loss"]
        mark = self._log_mark or (0.0, 0)
        total, count = meter.sum, meter.count
        self._log_mark = total, count
        now = time.perf_counter()
        started, step, samples, tokens = self._clock
        elapsed = now - started
        updates = max(1, state.global_step - step)
        self._clock = (now, state.global_step, state.samples, state.tokens)
        sums, longest = self.reduce_log([total - mark[0], count - mark[1]], elapsed / updates)
        values: dict[str, float] = {}
        if sums[1]:
            values["loss"] = sums[0] / sums[1]
        if self.optimizer is not None:
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            if len(set(rates)) == 1:
                values["lr"] = rates[0]
            else:
                values |= {f"lr_{index}": rate for index, rate in enumerate(rates)}
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        values["seconds_per_update"] = longest
        if elapsed > 0:
            values["samples_per_second"] = (state.samples - samples) / elapsed
            if state.tokens > tokens:
                values["tokens_per_second"] = (state.tokens - tokens) / elapsed
        values |= self._performance(values)
        values |= memory_peaks(self.device)
        if state.skipped:
            values["skipped"] = state.skipped
        return values

    def _performance(self, values: Mapping[str, float]) -> dict[str, float]:
        options = self.config.performance
        flops = (options.model_flops_per_sample or 0.0) * values.get("samples_per_second", 0.0)
        flops += (options.model_flops_per_token or 0.0) * values.get("tokens_per_second", 0.0)
        if not flops:
            return {}
        found = {"tflops": flops / self.world_size / 1e12}
        if options.peak_flops:
            found["mfu"] = flops / self.world_size / options.peak_flops
        return found


def memory_peaks(device: torch.device) -> dict[str, float]:
    """Most memory in use so far, in GiB: allocated and reserved on a CUDA device, else resident memory of the process.

    >>> 0 < memory_peaks(torch.device("cpu"))["memory_gib"] < 1024
    True
    """
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def _average(metrics: Any) -> Any:
    return metrics.average() if hasattr(metrics, "average") else metrics.compute()


def plain_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested metrics as plain mappings of numbers and lists.

    >>> plain_metrics({"loss": torch.tensor(0.5), "f1": {"per_class": torch.tensor([0.0, 1.0])}})
    {'loss': 0.5, 'f1': {'per_class': [0.0, 1.0]}}
    """
    return {str(key): _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain_metrics(value)
    return value.tolist() if isinstance(value, Tensor) else value
