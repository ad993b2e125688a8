"""Windows of one pass over a train split, from the position a run has reached to the end of the data.

A whole window is taken from the loader, trained, and only then counted as consumed. Nothing looks ahead: what a loader or its
workers have prepared beyond that is fetched again after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import IterableDataset

from danling.runners.crash import crash_point

from .data import SplitLoader
from .rng import capture_rng, restore_rng
from .weights import measure
from .window import Window
from .workers import stop_workers

if TYPE_CHECKING:
    from .runner import TorchRunner

_END = object()
WORKER_LOST = (RuntimeError, ConnectionError)  # what a batch on its way from a worker that has died turns into


class Feed:
    """The data of one pass.

    Args:
        runner: whose loader, sampler and window are used.
        split: a train split.

    Attributes:
        exhausted: no window follows the one in hand.
        iterator: over the loader.
        batches: micro-batches this rank has taken in this pass.
        length: how many there are, if the loader knows.
        interrupted: a stop was asked for before the first window.
        completes: whether a window that other ranks have begun can be completed here, whatever happens to workers.
        last_batch: the one trained on last, for windows that only keep this rank in step with others.
    """

    def __init__(self, runner: TorchRunner, split: str) -> None:
        self.runner, self.split = runner, split
        self.loader = runner.dataloaders[split]
        self.sampler = runner.datasamplers.get(split)
        self.accum_steps = runner.accum_steps
        self.window = runner.window
        self.exhausted = self.interrupted = False
        self._meets = runner.distributed or runner.ft is not None  # whether others train on the same window
        self.completes = self._meets and runner.ft is None and _is_in_reach(self.loader)
        self._weigh = runner.weigh
        self._state = runner.train_state
        self._position = self._state.positions.setdefault(split, {"samples": 0})
        self.batches = 0  # micro-batches this rank has taken in this pass
        self._held: Any = _END  # a batch that was taken and given back
        self._first = True
        self._sums = False  # whether losses are added instead of averaged
        self.last_batch: Any = _END

    def __enter__(self) -> Feed:
        runner, position = self.runner, self._position
        runner.start_clock()
        self._rng: Any = capture_rng(runner.device)
        try:
            if self.sampler is not None:
                if position["samples"]:
                    self.sampler.load_state_dict({"epoch": self._state.epoch, "consumed": position["samples"]})
                else:
                    self.sampler.set_epoch(self._state.epoch)
            else:
                runner.seek_loader(self.split, self._state.epoch, position["samples"])
            self.length = exact_length(self.loader)
            if self.length is not None and self.sampler is None:
                self.length -= position["samples"]
            self._start = position["samples"]
            self.iterator = iter(self.loader)
        except WORKER_LOST as error:
            self.excuse(error)
            self.iterator = iter(())
        crash_point("loader.start")
        return self

    def __exit__(self, *exception: Any) -> None:
        self.iterator = iter(())
        self.last_batch = self._held = _END
        self.window.open([None], [1])

    def next_window(self) -> Window | None:
        """Take the micro-batches of the next update; None at the end of the data of all ranks, or when interrupted."""
        if self.interrupted:
            return None
        try:
            batches = self._take()
        except WORKER_LOST as error:
            batches = self._retake(error)
        if self._first or self.interrupted:
            self._first = False
            if not self._meets and (self.interrupted or self.runner.supervisor.stop):
                self._interrupt()
                return None
        if self._meets:
            return self._agree(batches)
        self._rng = None
        if not batches:
            self.exhausted = True
            return None
        window = self.window
        window.open(batches, [self._weigh(batch) for batch in batches])
        window.samples, window.tokens = self._count(batches)
        if self.accum_steps == 1:
            self.next_window = self._next_plain  # type: ignore[method-assign]
        return window

    def _next_plain(self) -> Window | None:
        """The same for one process and windows of one micro-batch, with nothing that these do not need."""
        if self.exhausted or self.interrupted:
            return None
        if self._held is not _END:
            batch, self._held = self._held, _END
        else:
            try:
                batch = next(self.iterator)
            except StopIteration:
                self.exhausted = True
                return None
            except WORKER_LOST as error:
                self.excuse(error)
                return None
        self.batches += 1
        if self.batches == self.length:
            self.exhausted = True
        window = self.window
        window.open_one(batch, self._weigh(batch))
        window.samples, window.tokens = measure(batch)
        return window

    def _take(self) -> list[Any]:
        if self.accum_steps == 1:
            batch = next(self.iterator, _END) if self._held is _END else self._held
            self._held = _END
            batches = [] if batch is _END else [batch]
        else:
            batches = list(islice(self.iterator, self.accum_steps))
        self.batches += len(batches)
        if len(batches) < self.accum_steps or self.batches == self.length:
            self.exhausted = True
        return batches

    def put_back(self, batch: Any) -> None:
        """Give a batch back: the next window begins with it."""
        self._held = batch

    def _count(self, batches: list[Any]) -> tuple[int, Any]:
        samples, tokens = 0, 0
        for batch in batches:
            count, more = measure(batch)
            samples += count
            tokens = tokens + more
        return samples, tokens

    def lose(self, error: Exception) -> None:
        """Let whoever takes the next batch deal with the loss of a worker."""
        self.iterator = _failing(error)

    def excuse(self, error: Exception) -> None:
        """A worker that dies while a stop is pending counts as the stop; anything else is an error."""
        if not self.runner.supervisor.stop:
            raise error
        stop_workers(self.loader)  # or torch would raise again, at any line, whenever a child of this process ends
        self.interrupted = True

    def _interrupt(self) -> None:
        """Give up what was fetched, as if it had not been."""
        self.interrupted = True
        if self._rng is not None:
            restore_rng(self._rng, self.runner.device)

    def _agree(self, batches: list[Any]) -> Window | None:
        """Exchange the header of the window: weights, counts, who has data left, and requests."""
        runner, window = self.runner, self.window
        real = len(batches)
        if self.sampler is not None and real and self.exhausted:
            real -= self._left_empty(batches)
        weights = [self._weigh(batch) for batch in batches[:real]]
        samples, tokens = self._count(batches[:real])
        if weights:
            self._sums = weights[0] is None
        weight = 0.0 if self._sums else float(sum(map(_number, weights)))
        tokens, first = int(_number(tokens)), self._rng is not None
        if self.completes and not first and real == self.accum_steps:
            runner.send_header(weight=weight, samples=samples, tokens=tokens, present=True, left=not self.exhausted)
            self.last_batch = batches[-1]
            return window.open(batches, weights, awaited=self._receive)  # the header travels during the forward pass
        header = runner.window_header(
            weight=weight,
            samples=samples,
            tokens=tokens,
            present=bool(batches),
            left=not self.exhausted,
            never=not batches and self.last_batch is _END and self._start == 0 and self.batches == 0,
            abort=self.interrupted,
        )
        if header.abort or (first and header.stop):
            self._interrupt()
            return None
        self._rng = None
        if not header.present:
            self.exhausted = True
            return None
        if header.never:
            raise RuntimeError(
                f"rank {header.never_rank} has no batch at all in split {self.split!r} while others have; "
                "give every rank some data, or use fewer ranks"
            )
        self.exhausted = not header.left
        if not batches:  # keep in step with the ranks that have data left
            batches, weights, real = [self.last_batch], [0], 0
        else:
            weights += [0] * (len(batches) - real)
            self.last_batch = batches[-1]
        if self.sampler is None and (runner.meets_in_backward or runner.meets_in_forward):
            short = self.accum_steps - len(batches)  # loaders may end at different micro-batches
            batches, weights = batches + batches[-1:] * short, weights + [0] * short
        sums = self._sums
        window.open(
            batches,
            [None if sums else weight for weight in weights],
            total=None if sums else header.weight,
            degree=runner.loss_degree if runner.ft is None else runner.loss_degree * runner.ft.participants,
            fillers=real,
        )
        window.samples, window.tokens = header.samples, header.tokens
        return window

    def _receive(self) -> None:
        """Take in the header of the window in hand."""
        runner, window = self.runner, self.window
        header = runner.receive_header()
        self.exhausted = not header.left
        window.weigh(None if self._sums else header.weight, runner.loss_degree)
        window.samples, window.tokens = header.samples, header.tokens

    def _retake(self, error: Exception) -> list[Any]:
        """What to train on after workers were lost: nothing before the first window, else what they would have brought."""
        if not self.completes or self._first or self._rng is not None:
            self.excuse(error)
            return []
        if not self.loader.num_workers:
            raise error
        self.excuse(error)
        self.interrupted = False
        left = self.accum_steps if self.length is None else min(self.accum_steps, self.length - self.batches)
        batches = [self.loader.load(self.batches + index) for index in range(left)]
        self.batches += left
        self.exhausted = self.batches == self.length
        return batches

    def _left_empty(self, batches: list[Any]) -> int:
        """Micro-batches at the end that the sampler made up because there was no sample left for this rank."""
        assert self.sampler is not None
        return 1 if self.sampler.is_filler(self.batches) else 0

    def advance(self) -> None:
        """Count the window in hand as consumed."""
        state, window = self._state, self.window
        window.settle()
        state.samples += window.samples
        state.tokens += window.tokens
        self.note_position()

    def note_position(self) -> None:
        """Enter what has been consumed of the split into the state of the run."""
        if self.sampler is not None:
            self._position["samples"] = self.sampler.consumed_after(self._start, self.batches)
        else:
            self._position["samples"] = self._start + self.batches


def _is_in_reach(loader: Any) -> bool:
    """Whether this process itself can load the next batch of a loader."""
    if isinstance(loader, SplitLoader) and loader.stateful_sampler is not None:
        return True
    return getattr(loader, "num_workers", None) == 0


def exact_length(loader: Any) -> int | None:
    """Batches of a loader that knows; the length of an iterable data set is only its word.

    >>> exact_length([1, 2]), exact_length(iter([1]))
    (2, None)
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except TypeError:
        return None


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _failing(error: Exception) -> Iterator[Any]:
    raise error
    yield
