"""Pipeline schedules by name, which stages a rank holds under them, and the stage that they drive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from danling.backends.torch.local import local_tensor
from danling.runners.errors import ConfigError

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Names of torch's schedules; the first two run one stage per rank, the others several."""

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules whose second stage on a rank mirrors the first: the last stage is on the first rank."""


SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)
"""Schedules that run the backward pass for inputs and for weights apart."""


def schedule_name(name: str) -> str:
    """Return the name of a schedule as torch spells it.

    Raises:
        ConfigError: there is no such schedule; the message lists those that are.

    Example:
        >>> schedule_name("gpipe")
        'GPipe'
    """
    for known in SCHEDULES:
        if known.lower() == name.lower():
            return known
    raise ConfigError(f"parallel.pipeline_schedule is {name!r}; the schedules are {', '.join(SCHEDULES)}")


def runs_one_stage(name: str) -> bool:
    """Whether a schedule runs one stage per rank.

    >>> runs_one_stage("1F1B"), runs_one_stage("LoopedBFS")
    (True, False)
    """
    return issubclass(get_schedule_class(name), PipelineScheduleSingle)


def count_stages(name: str, degree: int, given: int | None = None) -> int:
    """Return the number of stages: what the configuration lists, else one per rank, two with schedules of several.

    Args:
        name: of the schedule.
        degree: ranks of the pipeline.
        given: stages that the configuration lists.

    Raises:
        ConfigError: the schedule cannot run that many.

    Example:
        >>> count_stages("1F1B", 4), count_stages("Interleaved1F1B", 4), count_stages("LoopedBFS", 2, 6)
        (4, 8, 6)
    """
    if given is None:
        return degree if runs_one_stage(name) else 2 * degree
    listed = f"parallel.module_fqns_per_model_part lists {given} stages"
    if given % degree:
        raise ConfigError(f"{listed}, no multiple of the {degree} ranks of the pipeline")
    each = given // degree
    if runs_one_stage(name) and each != 1:
        raise ConfigError(f"{listed} for {degree} ranks, but the schedule {name} runs one stage per rank")
    if name in V_SHAPED and each != 2:
        raise ConfigError(f"{listed} for {degree} ranks, but the schedule {name} runs two stages per rank")
    return given


def stage_indices(name: str, rank: int, degree: int, num_stages: int) -> list[int]:
    """Return the stages of a rank: every `degree`-th one, or a stage and its mirror under a schedule shaped like a V.

    Example:
        >>> stage_indices("Interleaved1F1B", rank=1, degree=2, num_stages=4), stage_indices("DualPipeV", 1, 2, 4)
        ([1, 3], [1, 2])
    """
    if name in V_SHAPED:
        return [rank, num_stages - 1 - rank]
    return list(range(rank, num_stages, degree))


def check_microbatch_count(name: str, count: int, num_stages: int, degree: int) -> str | None:
    """Check that a schedule can run so many microbatches; return a warning when ranks will mostly wait.

    Raises:
        ConfigError: the schedule cannot.

    Example:
        >>> check_microbatch_count("1F1B", 8, num_stages=4, degree=4)
        >>> check_microbatch_count("1F1B", 2, num_stages=4, degree=4)[:32]
        '2 microbatches for 4 pipeline st'
    """
    if name == "DualPipeV" and count < num_stages:
        raise ConfigError(
            f"the schedule DualPipeV needs at least as many microbatches as stages: {count} microbatches, "
            f"{num_stages} stages"
        )
    rounds = max(1, count // degree)
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        raise ConfigError(
            f"the schedule {name} runs microbatches in {rounds} rounds, but {count} microbatches cannot be cut into "
            f"{rounds} equal rounds; a multiple of the {degree} ranks of the pipeline always can"
        )
    if count < num_stages:
        return (
            f"{count} microbatches for {num_stages} pipeline stages leave ranks idle (bubbles) for most of a step; "
            "raise parallel.pipeline_n_microbatches or the batch size"
        )
    return None


class Job:
    """One batch on its way through the stages of this rank.

    Args:
        count: microbatches.
        inputs: positional and keyword arguments of every microbatch, on the rank of the first stage.
        finish: called on the rank of the last stage with a microbatch's index and output; returns the loss to
            backpropagate, with its factor.
        synchronise: average the gradients over replicas at the end.
        context: encloses every forward.
    """

    def __init__(
        self,
        count: int,
        inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        finish: Callable[[int, Any], Tensor] | None = None,
        synchronise: bool = True,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.count = count
        self.inputs = inputs
        self.finish = finish
        self.synchronise = synchronise
        self.context = context


class Stage(PipelineStage):
    """A stage that takes input and loss from the job in hand, so that batches of any structure fit torch's schedules.

    torch's schedules cut tensors; here they only cut a range of numbers, one per microbatch. The first stage looks its
    input up by that number, the last one turns its output into the loss (or, without backward, hands it over) at once.

    Args:
        part: the module, already sharded.
        index: of the stage.
        count: of stages.
        device: of the part.
        group: ranks of the pipeline.
    """

    def __init__(self, part: nn.Module, index: int, count: int, device: torch.device, group: Any) -> None:
        super().__init__(part, index, count, device, group=group)
        self.job = Job(0)
        self._chunk = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def _run(self, *args: Any) -> Any:
        job = self.job
        keywords: dict[str, Any] = {}
        if self.is_first:
            assert job.inputs is not None
            args, keywords = job.inputs[self._chunk]
        with job.context():
            output = self.submod(*args, **keywords)
            if self.is_last:
                assert job.finish is not None
                return job.finish(self._chunk, output)
        parts = output if isinstance(output, tuple | list) else (output,)
        if not all(isinstance(part, Tensor) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"pipeline stage {self.stage_index} returns {kinds}; all stages but the last return a tensor or a tuple "
                "of tensors, which is what the next stage takes"
            )
        return output

    # What torch calls

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run one microbatch."""
        self._chunk = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on what the stage before sent, or on the input of the job."""
        return self._run(*args)

    def _compute_outputs(self, *args: Any, module: Any, **kwargs: Any) -> Any:
        """Find shapes by running a microbatch; what it does to buffers is undone afterwards."""
        self._chunk = 0
        self._buffers = [(buffer, buffer.clone()) for buffer in self.submod.buffers()]
        return self._run(*args)

    def _to_tensor(self, arg: Any) -> Tensor:
        tensor = super()._to_tensor(arg)
        if not isinstance(arg, Tensor):  # memory as it was found could be anything: a model or criterion may refuse it
            with torch.no_grad():
                local_tensor(tensor).zero_()
        return tensor

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._buffers = []

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Average gradients over replicas, at the end of a window only."""
        if self.has_backward and self.job.synchronise:
            super().perform_reduce_grad(grad_scale_factor)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Gradients for a stage before this one on the same rank; none in a pass without backward."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take gradients from a stage after this one on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class BoundSchedule:
    """A schedule over the stages of this rank, for batches of one shape.

    Args:
        name: of the schedule.
        parts: module by stage index, those of this rank.
        num_stages: in the whole pipeline.
        count: microbatches per batch.
        device: of the parts.
        group: ranks of the pipeline.
        backward: whether it trains.
    """

    def __init__(
        self,
        name: str,
        parts: dict[int, nn.Module],
        num_stages: int,
        count: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        backward: bool,
    ) -> None:
        degree = dist.get_world_size(group)
        self.count = count
        self.stages = [Stage(parts[index], index, num_stages, device, group) for index in sorted(parts)]
        if runs_one_stage(name) and (not backward or count < degree):
            name = "GPipe"  # the same as 1F1B when there is nothing to alternate with
        one = runs_one_stage(name)
        make: Any = get_schedule_class(name)
        loss = (lambda loss, index: loss) if backward else None
        stages = self.stages[0] if one else self.stages
        self._schedule = make(stages, count, loss_fn=loss, scale_grads=False)
        self._numbers = torch.arange(count)

    def run(self, job: Job) -> None:
        """Run a batch through the stages: forward, and backward where the schedule trains."""
        for stage in self.stages:
            stage.job = job
        first = any(stage.is_first for stage in self.stages)
        last = any(stage.is_last for stage in self.stages)
        try:
            self._schedule.step(
                *((self._numbers,) if first else ()),
                target=self._numbers if last else None,
                return_outputs=False,
            )
        finally:
            for stage in self.stages:
                stage.job = Job(0)
