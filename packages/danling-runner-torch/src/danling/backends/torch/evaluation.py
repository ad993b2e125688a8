"""Evaluation and inference: nothing here moves the state of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from danling.runners.crash import crash_point
from danling.runners.loop import EvaluationInterrupted
from danling.runners.state import RunnerMode

from .ema import ema_module
from .infer import count_samples, merge_in_order, split_output
from .rng import capture_rng, restore_rng
from .training import MUTED, _average, plain_metrics, split_batch
from .weights import samples_in

_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's

_END = object()
LOOK_EVERY = 8  # batches between two looks for a request to stop


class Evaluation(_Host):
    """The evaluating half of `TorchRunner`."""

    evaluate_metrics: Any
    split: Any
    mode: Any
    _clock: Any
    meets_in_forward = False  # whether ranks wait for each other in every forward pass

    @property
    def evaluation_model(self) -> Any:
        """What evaluation and inference run: the EMA weights when there are any, else the model without wrappers."""
        return self.unwrap(self.model) if self.ema is None or not self._ema_ready else ema_module(self.ema)

    @property
    def _ema_ready(self) -> bool:
        """Whether the average has taken in any weights yet."""
        averaged = getattr(self.ema, "n_averaged", None)
        return averaged is None or int(averaged) > 0

    def without_gradients(self) -> AbstractContextManager:
        """Encloses evaluation and inference."""
        return torch.inference_mode()

    @contextmanager
    def _aside(self, mode: RunnerMode, split: str) -> Iterator[None]:
        """Inference mode, eval mode, and every random state put back at the end."""
        before = self._mode, self.split
        rng = capture_rng(self.device)
        self.split, self.mode = split, mode
        try:
            with self.without_gradients():
                yield
        finally:
            restore_rng(rng, self.device)
            self.split = before[1]
            if self._mode is not before[0]:
                self.mode = before[0]

    def evaluate_epoch(self, split: str) -> dict[str, Any]:
        """Evaluate one split to its end; return its metrics over all ranks."""
        return self._evaluate(split, None)

    def evaluate_steps(self, split: str, steps: int) -> dict[str, Any]:
        """Evaluate at most `steps` batches of a split; return its metrics over all ranks."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return self._evaluate(split, steps)

    def _evaluate(self, split: str, steps: int | None) -> dict[str, Any]:
        meters, metrics = self._meters[False], self.evaluate_metrics
        meters.reset()
        if metrics is not None:
            metrics.reset()
        length = self.pass_length(split)
        total = length if steps is None or length is None else min(steps, length)
        bar = self.console.bar
        bar.start_evaluation(split, total)
        begun = time.perf_counter()
        self.share_buffers()
        try:
            with self._aside(RunnerMode.EVALUATE, split):
                done = 0
                batches = iter(islice(self._fresh_loader(split), steps))
                for data in self._watched(batches):
                    self._evaluate_batch(data)
                    done += 1
                    bar.advance_evaluation(done)
                    crash_point("evaluate.batch")
        finally:
            bar.end_evaluation()
            started, *counts = self._clock
            self._clock = (started + time.perf_counter() - begun, *counts)  # no part of the time per update
        return self.read_evaluation(split, done)

    def read_evaluation(self, split: str, batches: int) -> dict[str, Any]:
        """Metrics of the evaluation that has just run over some batches, over all ranks."""
        meters, metrics = self._meters[False], self.evaluate_metrics
        values = plain_metrics(meters.average() if self._agree_on_names(meters) else {})
        if batches == 0 and not self.distributed:
            self.logger.warning("the evaluation of %r saw no batch", split)
        elif not values and metrics is None:
            self.logger.warning("the evaluation of %r measured nothing: there is neither a loss nor a metric", split)
        if metrics is not None:
            values |= plain_metrics(_average(metrics))
        return values

    def _agree_on_names(self, meters: Any) -> bool:
        """Give every rank a loss meter if any has one, so that all take part in the exchange."""
        return bool(len(meters)) or self.distributed

    def _evaluate_batch(self, data: Any) -> None:
        _, loss = self.evaluate_step(data)
        if loss is None:
            return
        weight = self.weigh_evaluation(data)
        value = loss.detach() if isinstance(loss, Tensor) else loss
        if weight is None:
            weight = samples_in(data)
            value = value / weight
        self._meters[False]["loss"].update(value, weight)

    def evaluate_step(self, data: Any) -> tuple[Any, Any]:
        """Evaluate one batch: prediction, loss (of the criterion and a target, or the model's own), metrics.

        Returns:
            The prediction, and the loss or None.
        """
        source, target = split_batch(self.to_device(data))
        with self.forward_context():
            prediction = self.forward(self.evaluation_model, source)
            loss = None
            if self.criterion is not None:
                loss = None if target is None else self.criterion(prediction, target)
            elif target is None and isinstance(prediction, Tensor) and prediction.dim() == 0:
                loss = prediction  # the model returns its own loss
        if self.evaluate_metrics is not None and target is not None:
            self.evaluate_metrics.update(prediction, target)
        return prediction, loss

    def _fresh_loader(self, split: str) -> Any:
        sampler = self.datasamplers.get(split)
        if sampler is not None:
            sampler.set_epoch(0)
        return self.dataloaders[split]

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches; every few of them look, with all ranks, for a request to stop.

        Raises:
            EvaluationInterrupted: on every rank, during training.
        """
        if self.meets_in_forward:
            yield from self._together(batches, self._evaluate_unseen)
            return
        while True:
            count = 0
            for data in islice(batches, LOOK_EVERY):
                count += 1
                yield data
                if not self.distributed and self._training and self.supervisor.stop:
                    raise EvaluationInterrupted
            more = count == LOOK_EVERY
            if self.distributed:
                header = self.exchange_header(left=more)
                if self._training and header.stop:
                    raise EvaluationInterrupted
                more = header.left
            if not more:
                return

    def _together(self, batches: Iterator[Any], repeat: Callable[[Any], Any]) -> Iterator[Any]:
        """Yield batches; while other ranks have more of them than this one, repeat the last for their sake.

        Args:
            batches: of this rank.
            repeat: runs the model on a batch that counts for nothing.

        Raises:
            EvaluationInterrupted: on every rank, during training.
            RuntimeError: on every rank, when one has no batch at all and others have.
        """
        last: Any = _END
        while True:
            data = next(batches, _END)
            header = self.exchange_header(left=data is not _END, never=data is last is _END)
            if self._training and header.stop:
                raise EvaluationInterrupted
            if not header.left:
                return
            if header.never:
                raise RuntimeError(
                    f"{header.never} of {self.world_size} ranks have no batch at all in split {self.split!r}, and stack "
                    f"{self.stack!r} runs the model on all ranks at once; use fewer ranks or smaller batches"
                )
            if data is _END:
                repeat(last)
            else:
                last = data
                yield data

    def _evaluate_unseen(self, data: Any) -> None:
        metrics, self.evaluate_metrics = self.evaluate_metrics, MUTED if self.evaluate_metrics is not None else None
        try:
            self.evaluate_step(data)
        finally:
            self.evaluate_metrics = metrics

    # Inference

    def infer(
        self, split: str = "infer", *, steps: int | None = None, stream: bool | None = None, gather: bool = False
    ) -> Any:
        """Run the model over a split.

        Args:
            split: its name.
            steps: at most that many batches.
            stream: True yields a list per batch; None does so for loaders without a length.
            gather: give every rank the entries of all samples in the order of the data set, each once.

        Returns:
            A list with one entry per sample, or an iterator over lists.

        Raises:
            ValueError: contradicting arguments, or a loader without a length, without `steps` and `stream`.
        """
        if split not in self.dataloaders:
            raise ValueError(f"there is no split {split!r}; there are: {', '.join(self.dataloaders) or 'none'}")
        if steps is not None and steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        if stream and gather:
            raise ValueError("stream and gather exclude each other: entries in order need the whole split")
        sized = self.pass_length(split) is not None
        if stream is None:
            stream = not sized and steps is None and not gather
        elif not stream and not sized and steps is None:
            raise ValueError(f"the loader of {split!r} has no length: give `steps`, or stream=True")
        if gather and not sized and steps is None:
            raise ValueError(f"the loader of {split!r} has no length: give `steps` to gather its entries")
        entries = self._infer_batches(split, steps)
        if stream:
            return entries
        own = [entry for batch in entries for entry in batch]
        return self._gather_entries(split, own) if gather else own

    def _infer_batches(self, split: str, steps: int | None) -> Iterator[list[Any]]:
        iterator: Iterator[Any] = iter(islice(self._fresh_loader(split), steps))
        if self.meets_in_forward:
            iterator = self._together(iterator, lambda data: self.infer_step(self.input_to_infer(data)))
        while True:
            with self._aside(RunnerMode.INFER, split):
                try:
                    data = next(iterator)
                except StopIteration:
                    return
                entries = self.infer_step(self.input_to_infer(data))
            yield entries

    def input_to_infer(self, data: Any) -> Any:
        """What `infer_step` gets for a batch: the batch, where this rank takes the input."""
        return data

    def infer_step(self, data: Any) -> list[Any]:
        """Run the model on one batch; return one entry per sample, on the host."""
        source, _ = split_batch(self.to_device(data))
        with self.forward_context():
            output = self.forward(self.evaluation_model, source)
        return split_output(self.whole_output(output), count_samples(source))

    def whole_output(self, output: Any) -> Any:
        """The output for all of a batch, where ranks compute parts of it; here it is that already."""
        return output

    def _gather_entries(self, split: str, own: list[Any]) -> list[Any]:
        sampler = self.datasamplers.get(split)
        if not self.distributed:
            return own
        if sampler is None:
            return [entry for share in self.gather_objects(own) for entry in share]
        indices = [index for batch in sampler for index in batch]
        return merge_in_order(self.gather_objects(list(zip(indices, own, strict=False))))
