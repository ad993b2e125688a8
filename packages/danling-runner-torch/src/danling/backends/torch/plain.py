"""The commonest updates of training in one function: on the host, one pair of tensors each, every hook as it comes.

Between the operations of a small model each call of a method costs about a microsecond. The loop, `Training.train_step` and the
hooks below it stay the rule; this is the same sequence without the calls, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .feed import WORKER_LOST
from .weights import SEQUENCES, WeightRule

if TYPE_CHECKING:
    from .feed import Feed
    from .runner import TorchRunner

FUSED = (
    "train_step",
    "to_device",
    "train_context",
    "forward_context",
    "forward",
    "_loss",
    "train_metrics",
    "advance",
    "backward",
    "backpropagate",
    "step",
    "record_loss",
    "send_header",
    "receive_header",
)
_NUMBERS = (int, float)


def is_plain(runner: TorchRunner) -> bool:
    """Whether nothing between a batch and its update is special in this run."""
    return (
        runner.ft is None
        and runner.accum_steps == 1
        and runner.device.type == "cpu"
        and runner.precision.dtype is None
        and runner.grad_scaler is None
        and runner.criterion is not None
        and all(is_fused(runner, name) for name in FUSED)
    )


def is_fused(runner: TorchRunner, name: str) -> bool:
    """Whether a hook is torch's own, or one of an engine that says it may be passed over; see `TorchRunner.fused`."""
    from .runner import TorchRunner

    if name in runner.__dict__:
        return False
    definer = next(cls for cls in type(runner).__mro__ if name in vars(cls))
    return issubclass(TorchRunner, definer) or name in vars(definer).get("fused", ())


def plain_updates(runner: TorchRunner, feed: Feed) -> Callable[[float, Any], bool | None]:
    """Return what trains on the windows of a pass while they are plain.

    Ranks each decide for themselves, window by window: what they exchange is the same either way.

    Args:
        runner: of which `is_plain` holds.
        feed: the pass, after its first window; where ranks meet, one that completes its windows.
    """
    from .training import Training

    state, meter, weigh = runner.state.train, runner._meters[True]["loss"], runner.weigh
    of_target = weigh.of_target if type(weigh) is WeightRule and not weigh.given else None
    own: Any = type(runner)
    forward = None if own.forward is Training.forward else runner.forward
    backpropagate = None if own.backpropagate is Training.backpropagate else runner.backpropagate
    meets, degree = runner.distributed, runner.loss_degree
    # The last window of this rank may not be the last of all, or hold a sample that only keeps it in step.
    last = -1 if feed.length is None else feed.length - 1
    special = False  # batches are no pairs of tensors

    def train(until: float, bar: Any) -> bool | None:
        """Train up to an update, the end of the data, a request or a window that is skipped.

        Args:
            until: the update.
            bar: told of every update; or None.

        Returns:
            Whether the last window was applied; None when the next one is not plain, or there is none.
        """
        nonlocal special
        if special:
            return None
        model, criterion, metrics = runner.model, runner.criterion, runner._train_metrics
        supervisor, update = runner.supervisor, runner.bare_update()
        feed.window.index = 0  # of the window before, which stands for all of these: each is one micro-batch
        step = state.global_step
        applied = True
        batch: Any = feed.last_batch
        try:
            while True:
                if meets and feed.batches == last:
                    return None
                try:
                    batch = next(feed.iterator)
                except StopIteration:
                    feed.exhausted = True
                    return None
                except WORKER_LOST as error:
                    feed.lose(error)
                    return None
                if not _is_pair(batch):
                    special = True
                    feed.put_back(batch)
                    return None
                source, target = batch
                weight = weigh(batch) if of_target is None else of_target(target)
                if type(weight) not in _NUMBERS or not weight > 0:
                    feed.put_back(batch)
                    return None
                if meets:
                    runner.send_header(weight=weight, samples=len(source), present=True, left=True)
                prediction = model(source) if forward is None else forward(model, source)
                # The last loss lives until here: with it torch keeps the nodes that add gradients to parameters, instead of
                # making them anew in every forward.
                loss: Any = criterion(prediction, target)
                if metrics is not None:
                    metrics.update(prediction, target)
                del prediction
                if type(loss) is not Tensor or loss.dim():
                    runner.check_loss(loss)
                scaled = loss
                if meets:
                    header = runner.receive_header()
                    factor = weight * degree / header.weight
                    if factor != 1.0:
                        scaled = loss * factor
                if backpropagate is None:
                    scaled.backward()
                else:
                    backpropagate(scaled)
                state.micro_step += 1
                if update is None:
                    applied = runner.optimizer_step()
                else:
                    applied, norm = update()
                    if norm is not None:
                        runner.grad_norm = norm
                    if applied:
                        state.global_step += 1
                meter.update(loss.item(), weight)
                if meets:
                    state.samples += header.samples
                    state.tokens += header.tokens
                else:
                    state.samples += len(source)
                feed.batches += 1
                if bar is not None and monotonic() >= bar.due:
                    bar.advance(state.global_step, state.epoch)
                if feed.batches == feed.length:
                    feed.exhausted = True
                    break
                if not applied or state.global_step >= until or (runner.pending if meets else supervisor.pending):
                    break
        finally:
            if meets:
                feed.last_batch = batch
            feed.note_position()
            if state.global_step > step:
                state.skipped_in_a_row = 0
            if bar is not None:
                bar.advance(state.global_step, state.epoch)
        if not applied:
            state.skipped += 1
            state.skipped_in_a_row += 1
        return applied

    return train


def _is_pair(batch: Any) -> bool:
    return (
        type(batch) in SEQUENCES
        and len(batch) == 2
        and type(batch[0]) is Tensor
        and type(batch[1]) is Tensor
        and batch[0].dim() > 0
    )
