"""Steps of a runner whose model is cut into pipeline stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from danling.backends.torch.activation import class_names, matching_modules
from danling.backends.torch.data import build_dataloader, is_map_style
from danling.backends.torch.infer import count_samples, split_output
from danling.backends.torch.sharded import MEMBERS
from danling.backends.torch.training import split_batch
from danling.backends.torch.weights import WeightRule
from danling.runners.errors import ConfigError

from .microbatches import Plan, plan_microbatches, take_rows
from .pipeline import Pipeline, keep_rows, nothing
from .schedule import SPLIT_BACKWARD, check_microbatch_count, count_stages, schedule_name, stage_indices
from .stages import WAYS, check_stages, cut_by_names, declared_tied, sequential_names, shared_names, state_names
from .tied import TiedParameters

_Host: Any = object  # part of ParallelRunner: what is used here and not defined here is the runner's


class Layout(NamedTuple):
    """Which rank of a pipeline holds which stages.

    Attributes:
        name: of the schedule.
        count: of all stages.
        stages: of this rank.
        owners: global rank by stage.
    """

    name: str
    count: int  # type: ignore[assignment]
    stages: list[int]
    owners: dict[int, int]


class Positions(Dataset):
    """Stands in for a data set where samples are only counted: its items are their indices.

    >>> Positions([5, 6, 7])[1], len(Positions([5, 6, 7]))
    (1, 3)
    """

    def __init__(self, dataset: Any) -> None:
        self._length = len(dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return int(index)


class Pipelining(_Host):
    """The part of `ParallelRunner` that runs pipelines; without a pipeline axis it changes nothing.

    Attributes:
        pipeline: the stages of this rank, None without a pipeline.
    """

    fused: ClassVar[frozenset[str]] = frozenset({"train_step", "backward", "optimizer_step"})  # without a pipeline

    model: Any
    weigh: Any
    weigh_evaluation: Any
    pipeline: Pipeline | None = None
    tied: TiedParameters | None = None
    _log_mark: tuple[float, float] | None

    # Stages

    @property
    def is_pipelined(self) -> bool:
        """Whether the model is cut into stages."""
        return self.topology.degrees["pipeline"] > 1

    @property
    def pipeline_schedule(self) -> Any:
        """The pipeline that a schedule drives, None without one."""
        return self.pipeline

    @property
    def pipeline_has_first_stage(self) -> bool:
        """Whether this rank holds the stage that takes the input."""
        return not self.is_pipelined or 0 in self._layout.stages

    @property
    def pipeline_has_last_stage(self) -> bool:
        """Whether this rank holds the stage that has the output."""
        return not self.is_pipelined or self._layout.count - 1 in self._layout.stages

    def pipeline_stage_indices(self) -> list[int]:
        """Numbers of the stages on this rank, in order.

        Override it for more stages per rank than the schedule takes by itself: `r, r + P, ...` for rank `r` of `P`.
        """
        name, degree = self._schedule_name, self.topology.degrees["pipeline"]
        names = self.config.parallel.module_fqns_per_model_part
        given = None if names is None else len(names)
        if self.model is None and self.model_parts:
            given = len(self.model_parts) * degree
        return stage_indices(name, self.topology.coordinates["pipeline"], degree, count_stages(name, degree, given))

    @cached_property
    def _schedule_name(self) -> str:
        return schedule_name(self.config.parallel.pipeline_schedule)

    @cached_property
    def _layout(self) -> Layout:
        """Where the stages are; all ranks ask for the first time together."""
        name, degree = self._schedule_name, self.topology.degrees["pipeline"]
        ranks = self.topology.domain("pipeline")
        shares = self.gather_objects(sorted(self.pipeline_stage_indices()))
        stages = [shares[rank] for rank in ranks]
        count = count_stages(name, degree, sum(map(len, stages)))
        for place, share in enumerate(stages):
            wanted = sorted(stage_indices(name, place, degree, count))
            if share != wanted:
                raise ConfigError(
                    f"rank {ranks[place]} of the pipeline has the stages {share}; under the schedule {name}, with "
                    f"{count} stages over {degree} ranks, it holds {wanted}"
                )
        owners = {stage: rank for rank, share in zip(ranks, stages, strict=True) for stage in share}
        return Layout(name, count, shares[self.rank], owners)

    def build_pipeline_model_parts(self) -> list[nn.Module]:
        """The stages on this rank, in order; the whole model without a pipeline.

        Raises:
            ValueError: neither a model nor parts were assigned.
            ConfigError: the model cannot be cut, or the parts do not hold it once.
        """
        if not self.is_pipelined:
            self.check_model()
            return [self.model]
        layout = self._layout
        if self.model is None:
            if not self.model_parts:
                self.check_model()
            parts, whole, shared, tied = dict(zip(layout.stages, self.model_parts, strict=True)), None, [], set()
            for part in parts.values():
                tied |= declared_tied(part)
        else:
            self.check_model()
            self._check_classes()
            self._share_whole_model()
            whole, shared, tied = state_names(self.model), shared_names(self.model), declared_tied(self.model)
            parts = {}
            for stage in layout.stages:
                part = parts[stage] = self.build_pipeline_model_part(stage, layout.count)
                if not isinstance(part, nn.Module):
                    raise TypeError(f"pipeline stage {stage} must be a torch.nn.Module, got {type(part).__name__}")
        names = {
            stage: state_names(part) if any(True for _ in part.parameters()) else [] for stage, part in parts.items()
        }
        everywhere = self.gather_objects(names)
        stages = {
            stage: found for rank in self.topology.domain("pipeline") for stage, found in everywhere[rank].items()
        }
        self._tied_names = check_stages(stages, whole=whole, shared=shared, tied=tied)
        return [parts[stage] for stage in layout.stages]

    @torch.no_grad()
    def _share_whole_model(self) -> None:
        """Give the whole model, while every rank has it, the weights of the first rank of the pipeline.

        Stages then start as one process would, although ranks draw different numbers. A model on the meta device has no
        weights yet.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            return
        group, first = self.parallel.group("pipeline"), self.topology.domain("pipeline")[0]
        for tensor in tensors:
            whole = tensor.detach().to(self.device).contiguous()
            dist.broadcast(whole, src=first, group=group)
            if self.rank != first:
                tensor.copy_(whole)

    def classes_here(self, part: nn.Module, names: Sequence[str] | None) -> Sequence[str] | None:
        """Those of the named classes that occur in a stage; which of them occur at all is checked on the whole model."""
        if not self.is_pipelined:
            return names
        if names is None:
            try:
                matching_modules(part, None)
            except ConfigError:
                return []
            return None
        found = {name for module in part.modules() for cls in type(module).__mro__ for name in class_names(cls)}
        return [name for name in names if name in found]

    def _check_classes(self) -> None:
        """Refuse classes of modules that occur in no stage.

        Raises:
            ConfigError: naming the key.
        """
        config = self.config
        wanted = {"fsdp": self.uses_fsdp, "activation_checkpoint": config.activation_checkpoint.enabled}
        for section, used in wanted.items():
            if used and (section != "fsdp" or config.fsdp.module_classes is not None):
                try:
                    matching_modules(self.model, config[section].module_classes)
                except ConfigError as error:
                    raise ConfigError(f"{section}.module_classes: {error}") from error

    def build_pipeline_model_part(self, stage: int, num_stages: int) -> nn.Module:
        """The module of one stage, with parameters under the names of the whole model.

        Named by `parallel.module_fqns_per_model_part`, else built by the model's own
        `build_pipeline_model_part(stage_index, num_stages)`, else cut from an `nn.Sequential` evenly by parameters.

        Raises:
            ConfigError: none of these applies.
        """
        names = self.config.parallel.module_fqns_per_model_part
        if names is None:
            if callable(getattr(self.model, "build_pipeline_model_part", None)):
                return self.model.build_pipeline_model_part(stage, num_stages)
            if not isinstance(self.model, nn.Sequential):
                raise ConfigError(f"{type(self.model).__name__} cannot be cut into pipeline stages by itself: {WAYS}")
            names = sequential_names(self.model, num_stages)
        return cut_by_names(self.model, names, [stage])[stage]

    def build_pipeline_schedule(self) -> Pipeline | None:
        """Bind the stages, in their final form, to the schedule; None without a pipeline."""
        if not self.is_pipelined:
            return None
        layout, options, group = self._layout, self.config.parallel, self.parallel.group("pipeline")
        parts = dict(zip(layout.stages, self.model_parts, strict=True))
        tied = TiedParameters(self._tied_names, parts, layout.owners, group)
        if tied:
            tied.copy_first()
            self.tied = tied
        self._check_schedule()
        return Pipeline(
            layout.name,
            parts,
            layout.count,
            device=self.device,
            group=group,
            count=options.pipeline_n_microbatches,
            size=options.pipeline_microbatch_size,
            context=self.forward_context,
        )

    def _check_schedule(self) -> None:
        """Refuse what the schedule cannot run, before anything runs; say where ranks will mostly wait.

        Raises:
            ConfigError: a batch size that cannot be cut, or compiled stages under a schedule that cuts their backward.
        """
        options, layout, degree = self.config.parallel, self._layout, self.topology.degrees["pipeline"]
        if self.config.compile.enable and layout.name in SPLIT_BACKWARD:
            raise ConfigError(
                f"compile.enable: the schedule {layout.name} runs the backward pass of a stage in two parts, which "
                "compiled modules do not allow; use another schedule"
            )
        for split in self._split_names:
            full = self._full_rows(split)
            if full is None:
                continue
            try:
                plan = plan_microbatches(full, full, options.pipeline_n_microbatches, options.pipeline_microbatch_size)
                warning = check_microbatch_count(layout.name, plan.count, layout.count, degree)
            except ConfigError as error:
                raise ConfigError(f"split {split!r}: {error}") from error
            if warning and split in self.train_splits and self.is_main_process:
                self.logger.warning("split %r: %s", split, warning)

    # Data

    def build_dataloaders(self) -> None:
        """Build the loaders; stages that take neither input nor target only count positions of what is sampled here."""
        if self.is_pipelined and not (self.pipeline_has_first_stage or self.pipeline_has_last_stage):
            train = self.train_splits
            for split, dataset in self.datasets.items():
                if split in self.dataloaders or dataset is None or not is_map_style(dataset):
                    continue
                options = self.loader_options(split)
                shuffle = options.get("shuffle")
                shuffle = split in train if shuffle is None else shuffle
                sampler = self.datasamplers.setdefault(split, self.build_datasampler(dataset, split, shuffle))
                self.dataloaders[split] = build_dataloader(
                    Positions(dataset),
                    split,
                    {"batch_size": options.get("batch_size")},
                    sampler,
                    torch.utils.data.default_collate,
                    seed=self.rng_state.seed,
                    rank=self.data_rank,
                    device=torch.device("cpu"),
                    ranks=self.data_degree,
                    train=split in train,
                )
        super().build_dataloaders()

    def bind_criterion(self) -> None:
        """Bind criterion, weights and metrics; stages that see no batch weigh nothing."""
        super().bind_criterion()
        if self.is_pipelined and not (self.pipeline_has_first_stage or self.pipeline_has_last_stage):
            added = getattr(self.criterion, "reduction", None) == "sum" and self._overridden_weight() is None
            self.weigh = self.weigh_evaluation = lambda batch: None if added else 0

    def _full_rows(self, split: str | None) -> int | None:
        """Rows of a full batch of a split, None when the data set makes its own batches."""
        if split in self.datasets and self.datasets[split] is not None:
            return self.loader_options(split).get("batch_size")
        return getattr(self.dataloaders.get(split), "batch_size", None)

    def _read(self, data: Any) -> tuple[Any, Any, int | None]:
        """Input, target and rows of a batch; nothing on stages that take neither."""
        if not (self.pipeline_has_first_stage or self.pipeline_has_last_stage):
            return None, None, None
        source, target = split_batch(self.to_device(data))
        rows = count_samples(source)
        if rows is None:
            raise ValueError(
                f"a batch is cut into microbatches by rows, but its input ({type(source).__name__}) has none"
            )
        return source, target, rows

    # Optimizer

    def applicable_rules(self, rules: Sequence[Any]) -> Sequence[Any]:
        """The rules of `optim.param_groups`, without those that choose parameters of other stages only."""
        if not self.is_pipelined or not rules:
            return rules
        own = [name for name, _ in self.iter_optimizer_named_parameters()]
        shares = self.gather_objects(own)
        everywhere = [name for rank in self.topology.domain("pipeline") for name in shares[rank]]
        try:
            chosen, chosen_here = (
                {
                    next((index for index, rule in enumerate(rules) if re.search(rule["pattern"], name)), None)
                    for name in names
                }
                for names in (everywhere, own)
            )
        except (re.error, KeyError, TypeError):
            return rules  # building the optimizer says what is wrong with them
        return [rule for index, rule in enumerate(rules) if index in chosen_here or index not in chosen]

    def build_optimizer(self) -> None:
        """Build the optimizer unless one is bound; all stages have the same groups, some of them without members."""
        super().build_optimizer()
        if not self.is_pipelined or self.optimizer is None:
            return
        own = {group.get("name", index): group for index, group in enumerate(self.optimizer.param_groups)}
        shares = self.gather_objects(
            {key: {k: v for k, v in group.items() if k not in MEMBERS} for key, group in own.items()}
        )
        groups: dict[Any, dict[str, Any]] = {}
        for rank in self.topology.domain("pipeline"):
            for key, options in shares[rank].items():
                names: dict[str, list[str]] = (
                    {"param_names": []} if "param_names" in self.optimizer.param_groups[0] else {}
                )
                groups.setdefault(key, own.get(key) or {**options, "params": [], **names})
        self.optimizer.param_groups[:] = groups.values()

    # Training

    def backward(self, loss: Any) -> None:
        """Backpropagate a loss; under a pipeline the schedule does that, microbatch by microbatch.

        Raises:
            RuntimeError: under a pipeline.
        """
        if self.pipeline is not None:
            raise RuntimeError(
                "under a pipeline axis no rank has the whole model, and the schedule runs forward and backward: let "
                "train_step call super().train_step(data), without backward or advance of its own"
            )
        super().backward(loss)

    def train_step(self, data: Any) -> tuple[Any, Any]:
        """Train on one micro-batch; under a pipeline, prediction and loss are those of the last stage, None elsewhere."""
        if self.pipeline is None:
            return super().train_step(data)
        window = self.window
        source, target, rows = self._read(data)
        counts = not window.is_filler and window.weight != 0
        shares: list[float] = []

        def loss(index: int, output: Any, plan: Plan) -> tuple[Tensor, Any, Tensor | None]:
            if not shares:
                shares.extend(self._shares(data, target, plan) if counts else [0.0] * plan.count)
            kept = keep_rows(output, plan, index)
            share = shares[index]
            if not share:
                return self._scaled(nothing(output)), kept, None
            if self.criterion is None and kept is not output:
                raise ValueError(
                    "a model that returns its own loss cannot leave out the rows that fill up a short batch: set "
                    "dataloader.drop_last, or assign a criterion"
                )
            plain = self._loss(kept, _rows_of(target, plan, index))
            factor = 1 if window.factor is None else window.factor
            return self._scaled(plain * (share * factor)), kept, plain.detach() * share

        prediction, losses, plan = self.pipeline.train(
            source if self.pipeline_has_first_stage else None,
            self._full_rows(self.split),
            rows,
            loss,
            synchronise=window.is_last,
            weighs=bool(window.weighs),
        )
        window.weighs = self.pipeline.weighs
        found = [loss for loss in losses if loss is not None]
        total = torch.stack(found).sum() if found else None
        metrics = self.train_metrics
        if self.pipeline_has_last_stage and metrics is not None and target is not None:
            metrics.update(prediction, target)
        self.step()
        return prediction, total

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def _shares(self, data: Any, target: Any, plan: Plan) -> list[float]:
        """What each microbatch contributes to the loss of the batch: its part of the weight, 1 where losses are added."""
        weights = [self._weight_of(_rows_of(data, plan, index), plan) for index in range(plan.count)]
        if weights[0] is None:
            return [float(plan.kept(index) > 0) for index in range(plan.count)]
        numbers = [
            float(weight) if plan.kept(index) else 0.0 for index, weight in enumerate(weights) if weight is not None
        ]
        total = sum(numbers)
        return [number / total if total else 0.0 for number in numbers]

    def _weight_of(self, piece: Any, plan: Plan) -> Any:
        """The weight of a microbatch; a batch's own number for all its rows says nothing about parts of it."""
        own = piece.get("loss_weight") if isinstance(piece, Mapping) else None
        if isinstance(own, Tensor) and own.dim():
            return own.sum()
        if own is not None:
            piece = {key: value for key, value in piece.items() if key != "loss_weight"}
        return self._microbatch_rule(piece)

    @cached_property
    def _microbatch_rule(self) -> Any:
        rule = WeightRule(self.criterion, self._overridden_weight())
        if self.topology.degrees["context"] > 1:  # of this rank's part of the sequences, as the weight of the batch
            return lambda piece: rule(self.shard_context(piece))
        return rule

    def optimizer_step(self) -> bool:
        """Update the weights; parameters on several stages get the sum of their gradients first."""
        if self.tied is not None:
            self.tied.sum_gradients()
        return super().optimizer_step()

    def reduce_norm_over_stages(self, total: Tensor) -> Tensor:
        """Extend the sum of squares of gradients over all stages, parameters on several of them once."""
        if self.tied is not None:
            total = total - self.tied.repeated()
        return self.parallel.all_reduce(total, "pipeline")

    # What the last stage knows

    def from_last_stage(self, value: Any) -> Any:
        """What the rank of this pipeline's last stage has, on every rank; all ranks call it together."""
        if not self.is_pipelined:
            return value
        found = self.gather_objects(value if self.pipeline_has_last_stage else None)
        return found[self._layout.owners[self._layout.count - 1]]

    def read_training(self, split: str, *, reset: bool) -> dict[str, Any]:
        """Metrics of the training since the last reset, over all data; the same on every stage."""
        values: dict[str, Any] = {}
        if self.pipeline_has_last_stage:
            values = super().read_training(split, reset=reset)
        elif reset:
            self._meters[True].reset()
            self._log_mark = None
        return self.from_last_stage(values)

    def read_evaluation(self, split: str, batches: int) -> dict[str, Any]:
        """Metrics of an evaluation over all data; the same on every stage."""
        values = super().read_evaluation(split, batches) if self.pipeline_has_last_stage else {}
        return self.from_last_stage(values)

    # Evaluation and inference

    def evaluate_step(self, data: Any) -> tuple[Any, Any]:
        """Evaluate one batch; under a pipeline, prediction and loss are those of the last stage, None elsewhere."""
        if self.pipeline is None:
            return super().evaluate_step(data)
        source, target, rows = self._read(data)
        prediction, _ = self._forward(source, rows)
        loss = None
        if self.pipeline_has_last_stage and target is not None:
            with self.forward_context():
                loss = None if self.criterion is None else self.criterion(prediction, target)
            if self.evaluate_metrics is not None:
                self.evaluate_metrics.update(prediction, target)
        return prediction, loss

    def infer_step(self, data: Any) -> list[Any]:
        """Run the model on one batch, None on stages without input; one entry per sample where the last stage is."""
        if self.pipeline is None:
            return super().infer_step(data)
        source, _, rows = self._read(data) if self.pipeline_has_first_stage else (None, None, None)
        output, plan = self._forward(source, rows)
        return split_output(self.whole_output(output), plan.rows) if self.pipeline_has_last_stage else []

    def _forward(self, source: Any, rows: int | None) -> tuple[Any, Plan]:
        assert self.pipeline is not None
        first = self.pipeline_has_first_stage
        return self.pipeline.forward(source if first else None, self._full_rows(self.split), rows)

    def _infer_batches(self, split: str, steps: int | None) -> Iterator[list[Any]]:
        if self.pipeline is not None and steps is None and self.pass_length(split) is None:
            raise ValueError(
                f"the loader of {split!r} has no length, and stages without input cannot see its end: give `steps`"
            )
        return super()._infer_batches(split, steps)

    def input_to_infer(self, data: Any) -> Any:
        """What `infer_step` gets: the batch where the first stage is, None elsewhere."""
        return data if self.pipeline_has_first_stage else None


def _rows_of(value: Any, plan: Plan, index: int) -> Any:
    """The rows of a microbatch that count, of a target or a batch."""
    start = min(index * plan.size, plan.rows)
    return take_rows(value, plan.rows, start, start + plan.kept(index))
