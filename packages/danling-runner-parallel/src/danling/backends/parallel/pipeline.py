"""A model cut into stages that act as one: a batch goes in at the first, its outputs and its loss come out at the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .microbatches import Plan, map_tensors, merge_outputs, plan_microbatches, signature, take_rows
from .schedule import BoundSchedule, Job, check_microbatch_count

SCHEDULES_KEPT = 8  # bound schedules; each holds the receive buffers of its shapes


class Pipeline:
    """The stages of this rank, and the schedules that drive them.

    A schedule is bound to the shapes of its microbatches. The rank of the first stage tells the others how it cuts each
    batch and which shapes it found, so batches of other lengths simply use another schedule.

    Args:
        name: of the schedule.
        parts: module by stage index, those of this rank.
        num_stages: in the whole pipeline.
        device: of the parts.
        group: ranks of the pipeline; the first one holds the first stage.
        count: microbatches per batch, or None.
        size: rows of a microbatch where `count` is None.
        context: encloses every forward, and the loss.

    Attributes:
        has_first: whether this rank holds the first stage, which takes the input.
        has_last: whether it holds the last one, which has the output.
        weighs: whether anything counts in the window that the last batch was part of.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[int, nn.Module],
        num_stages: int,
        *,
        device: torch.device,
        group: dist.ProcessGroup,
        count: int | None = None,
        size: int = 1,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.name, self.parts, self.num_stages = name, dict(parts), num_stages
        self.device, self.group = device, group
        self.count, self.size = count, size
        self.context = context
        self.has_first, self.has_last = 0 in self.parts, num_stages - 1 in self.parts
        self.weighs = True
        self._schedules: dict[tuple[bool, int, int], BoundSchedule] = {}
        self._source = dist.get_global_rank(group, 0)
        config = dist.get_backend_config(group) if hasattr(dist, "get_backend_config") else ""
        self._wire = torch.device("cpu") if "cpu:" in str(config) or dist.get_backend(group) == "gloo" else device

    def train(
        self,
        source: Any,
        full: int | None,
        rows: int | None,
        loss: Callable[[int, Any, Plan], tuple[Tensor, Any, Tensor | None]],
        *,
        synchronise: bool,
        weighs: bool = True,
    ) -> tuple[Any, list[Tensor | None], Plan]:
        """Run one batch forward and backward.

        Args:
            source: the input, on the rank of the first stage; None elsewhere.
            full: rows of a full batch of the split, None when unknown.
            rows: of the batch, on the rank of the first stage.
            loss: called on the rank of the last stage with a microbatch's number, its output and how the batch is cut;
                returns what is backpropagated, with its factor; the output without rows that only fill up, None when
                there are none; and the plain loss.
            synchronise: average gradients over replicas at the end.
            weighs: whether anything in the window counts, which the first stage tells the others.

        Returns:
            On the rank of the last stage the output of the whole batch and the losses of the microbatches, elsewhere
            None and nothing; and how the batch was cut.
        """
        plan, shapes = self._agree(source, full, rows, weighs)
        outputs: list[Any] = [None] * plan.count
        losses: list[Tensor | None] = [None] * plan.count

        def finish(index: int, output: Any) -> Tensor:
            scaled, kept, plain = loss(index, output, plan)
            outputs[index] = map_tensors(kept, Tensor.detach)
            losses[index] = plain
            return scaled

        schedule = self._schedule((True, plan.count, shapes))
        schedule.run(Job(plan.count, self._cut(source, plan), finish, synchronise, self.context))
        return (_merge(outputs, plan), losses, plan) if self.has_last else (None, [], plan)

    def forward(self, source: Any, full: int | None, rows: int | None) -> tuple[Any, Plan]:
        """Run one batch forward.

        Args:
            source: the input, on the rank of the first stage; None elsewhere.
            full: rows of a full batch of the split, None when unknown.
            rows: of the batch, on the rank of the first stage.

        Returns:
            On the rank of the last stage the output of the whole batch, elsewhere None; and how the batch was cut.
        """
        plan, shapes = self._agree(source, full, rows)
        outputs: list[Any] = [None] * plan.count

        def finish(index: int, output: Any) -> Tensor:
            outputs[index] = keep_rows(output, plan, index)
            return torch.zeros((), device=self.device)

        schedule = self._schedule((False, plan.count, shapes))
        schedule.run(Job(plan.count, self._cut(source, plan), finish, False, self.context))
        return (_merge(outputs, plan) if self.has_last else None), plan

    def _agree(self, source: Any, full: int | None, rows: int | None, weighs: bool = True) -> tuple[Plan, int]:
        """Learn from the first stage how the batch is cut and what shapes its microbatches have."""
        message = torch.zeros(5, dtype=torch.int64, device=self._wire)
        if self.has_first:
            assert rows is not None
            plan = plan_microbatches(rows, full, self.count, self.size)
            shapes = signature(take_rows(source, rows, 0, plan.size))
            message = torch.tensor([*plan, shapes, weighs], dtype=torch.int64, device=self._wire)
        dist.broadcast(message, src=self._source, group=self.group)
        count, size, rows, shapes, weighs = message.tolist()
        self.weighs = bool(weighs)
        return Plan(count, size, rows), shapes

    def _cut(self, source: Any, plan: Plan) -> Sequence[tuple[tuple[Any, ...], dict[str, Any]]] | None:
        if not self.has_first:
            return None
        pieces = [
            take_rows(source, plan.rows, index * plan.size, (index + 1) * plan.size) for index in range(plan.count)
        ]
        return [((), dict(piece)) if isinstance(piece, Mapping) else ((piece,), {}) for piece in pieces]

    def _schedule(self, key: tuple[bool, int, int]) -> BoundSchedule:
        schedule = self._schedules.pop(key, None)
        if schedule is None:
            backward, count, _ = key
            check_microbatch_count(self.name, count, self.num_stages, dist.get_world_size(self.group))
            while len(self._schedules) >= SCHEDULES_KEPT:  # the same ones on every rank, in the same order
                del self._schedules[next(iter(self._schedules))]
            schedule = BoundSchedule(
                self.name, self.parts, self.num_stages, count, self.device, self.group, backward=backward
            )
        self._schedules[key] = schedule
        return schedule


def keep_rows(output: Any, plan: Plan, index: int) -> Any:
    """The output of a microbatch without the rows that only fill it up; None when there are no others.

    >>> keep_rows(torch.arange(2), Plan(count=2, size=2, rows=3), 1), keep_rows(torch.arange(2), Plan(2, 2, 2), 1)
    (tensor([0]), None)
    """
    kept = plan.kept(index)
    if kept == plan.size:
        return output
    return take_rows(output, plan.size, 0, kept) if kept else None


def nothing(output: Any) -> Tensor:
    """A loss of exactly 0 whose gradients are exactly 0, whatever the output is.

    >>> x = torch.tensor([float("nan")], requires_grad=True)
    >>> nothing({"y": x * 2}).backward()
    >>> x.grad
    tensor([0.])
    """
    found: list[Tensor] = []
    map_tensors(output, lambda tensor: found.append(tensor) if tensor.requires_grad else None)
    sums = [tensor.reshape(-1)[:0].sum().float() for tensor in found]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def _merge(outputs: list[Any], plan: Plan) -> Any:
    kept = [(output, plan.kept(index)) for index, output in enumerate(outputs) if plan.kept(index)]
    return merge_outputs([output for output, _ in kept], [size for _, size in kept])
