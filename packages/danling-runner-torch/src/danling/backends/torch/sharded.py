"""Saving and restoring where each rank holds parts of the state: tensors by DCP, everything else in the usual files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .payload import OPTIMIZER, model_state, optimizer_state, rank_file
from .snapshot import HostBuffers, TorchSnapshot, write_file

_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's


class ShardedFiles:
    """This rank's files of a sharded checkpoint, captured; what writes them.

    Args:
        files: name → state, copied already.
        tensors: copied already.
        side: what the main process writes for all ranks; None on ranks that have nothing to add.
        is_main: whether this is the main process.
    """

    def __init__(self, files: TorchSnapshot, tensors: Any, side: dict[str, Any] | None, is_main: bool) -> None:
        self.files, self.tensors, self.side, self.is_main = files, tensors, side, is_main
        self.report: Any = None

    def __call__(self, directory: Path) -> list[str]:
        """Write this rank's files below a directory; return their names."""
        names, self.report = self.tensors.write(directory)
        if not self.is_main:
            self.report.more = self.side
        return [*self.files.write(directory), *names]

    def finish(self, directory: Path, reports: Sequence[Any]) -> None:
        """Write the index of the tensors, and what was gathered of the optimizers, on the main process."""
        from .dcp import write_index

        write_index(directory, reports)
        sides = [side for side in (self.side, *(report.more for report in reports)) if side is not None]
        merged = merge_sides(sides)
        if merged:
            write_file(directory / OPTIMIZER, merged)


MEMBERS = frozenset({"params", "param_names"})  # what a group of an optimizer lists by name


def merge_sides(sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put together what several stages know of their parts of the optimizer and of the model.

    Example:
        >>> first = {"scheduler": 1, "optimizer": {"param_groups": [{"lr": 1, "params": ["a"]}], "scalars": {"a": 5}}}
        >>> second = {"scheduler": 1, "optimizer": {"param_groups": [{"lr": 1, "params": ["b"]}], "scalars": {"b": 5}}}
        >>> merge_sides([first, second])["optimizer"]
        {'param_groups': [{'lr': 1, 'params': ['a', 'b']}], 'scalars': {'a': 5, 'b': 5}}
    """
    merged = dict(sides[0]) if sides else {}
    if "optimizer" in merged:
        states = [side["optimizer"] for side in sides]
        groups = [{**group, "params": list(group["params"])} for group in states[0]["param_groups"]]
        for state in states[1:]:
            free = list(groups)  # stages have the same groups in the same order, some without members
            for group in state["param_groups"]:
                same = next((known for known in free if _options(known) == _options(group)), None)
                if same is None:
                    groups.append(dict(group))
                else:
                    free = free[free.index(same) + 1 :]
                    for key in MEMBERS & same.keys():
                        same[key] = list(dict.fromkeys([*same[key], *group[key]]))
        scalars = {name: value for state in states for name, value in state["scalars"].items()}
        merged["optimizer"] = {"param_groups": groups, "scalars": scalars}
    extras = {name: value for side in sides for name, value in side.get("extra", {}).items()}
    return {**merged, "extra": extras} if extras else merged


def _options(group: Mapping[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in group.items() if key not in MEMBERS))


class Sharded(_Host):
    """The part of a runner that saves and restores sharded state."""

    _shards: HostBuffers | None = None

    @property
    def uses_dcp(self) -> bool:
        """Whether checkpoints are sharded."""
        return self.config.checkpoint.backend == "dcp"

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this rank saves what is not sharded of the part of the model it holds."""
        return self.is_main_process

    # What there is

    def local_parts(self) -> list[Any]:
        """The user's module, or the parts of it that this rank holds."""
        return [self.unwrap(self.model)]

    def model_tensors(self) -> dict[str, Any]:
        """The tensors of the model on this rank, by their names in the whole model, live."""
        return {name: value for name, value in self._local_state() if isinstance(value, Tensor)}

    def _local_state(self) -> Iterator[tuple[str, Any]]:
        for part in self.local_parts():
            yield from model_state(part).items()

    def ema_tensors(self) -> dict[str, Any] | None:
        """The tensors of the average on this rank; None where there is no average that has names."""
        weights = self._ema_weights()
        return None if weights is None else {k: value for k, value in weights.items() if isinstance(value, Tensor)}

    def split_state(self, name: str, value: Tensor) -> Any:
        """State of the optimizer for a parameter, as something that knows where its parts belong."""
        return value

    def tensor_place(self, value: Any) -> tuple[int, int]:
        """The number of this rank among those that hold the same part of a tensor, and how many these are."""
        from .dcp import own_place

        return own_place(value, self.rank, self.world_size)

    def names_elsewhere(self, names: Iterable[str]) -> set[str]:
        """Names of the whole model that other ranks have and this one does not."""
        return set()

    # Saving

    def capture_sharded(self) -> ShardedFiles:
        """Copy the state of this rank."""
        side, tensors = self._side()
        tensors |= {f"model.{name}": value for name, value in self.model_tensors().items()}
        averages = self.ema_tensors() if self.ema is not None else None
        tensors |= {f"ema.{name}": value for name, value in (averages or {}).items()}
        files: dict[str, Any] = {rank_file(self.rank): self.rank_state()}
        if self.ema is not None and averages is None and self.is_main_process:
            from .payload import EMA

            files[EMA] = self.ema.state_dict()
        return self._captured_sharded(files, tensors, side)

    def capture_sharded_model(self, dtype: torch.dtype | None) -> ShardedFiles:
        """Copy the weights, those of the EMA when there is one, cast to a dtype."""
        averages = self.ema_tensors() if self.ema is not None and self._ema_ready else None
        weights = self.model_tensors() if averages is None else averages
        return self._captured_sharded({}, {f"model.{name}": value for name, value in weights.items()}, {}, dtype)

    def _captured_sharded(
        self,
        files: dict[str, Any],
        tensors: dict[str, Any],
        side: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> ShardedFiles:
        from .dcp import ShardedTensors

        if self._shards is None:
            self._shards = HostBuffers(pinned=self.config.checkpoint.async_mode == "async_with_pinned_mem")
        snapshot = self._host_snapshot({**files, OPTIMIZER: side if self.speaks_for_stage else None})
        side = snapshot.files.pop(OPTIMIZER)
        parts = ShardedTensors(tensors, self._shards, rank=self.rank, place=self.tensor_place, dtype=dtype)
        return ShardedFiles(snapshot, parts, side, self.is_main_process)

    def _side(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is small and whole of the state, and the tensors of the optimizer."""
        side: dict[str, Any] = self.side_states()
        extra = {name: value for name, value in self._local_state() if not isinstance(value, Tensor)}
        if extra:
            side["extra"] = extra
        tensors: dict[str, Any] = {}
        if self.optimizer is not None:
            state = optimizer_state(self.optimizer, self.iter_optimizer_named_parameters())
            scalars: dict[str, Any] = {}
            for name, values in state["state"].items():
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.dim():
                        tensors[f"optimizer.state.{name}.{key}"] = self.split_state(name, value)
                    else:
                        scalars.setdefault(name, {})[key] = value
            side["optimizer"] = {"param_groups": state["param_groups"], "scalars": scalars}
        return side, tensors

    # Restoring

    def load_tensors(self, targets: Mapping[str, Any], state: Mapping[str, Any], **options: Any) -> None:
        """Load whole or stored tensors into those of this rank."""
        from .dcp import load_named

        load_named(targets, state, elsewhere=self.names_elsewhere(targets), **options)

    def gathered_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the optimizer of this rank, read from a sharded checkpoint: by name, in this rank's layout."""
        parameters = dict(self.iter_optimizer_named_parameters())
        stored = state["tensors"]
        targets: dict[str, Any] = {}
        values: dict[str, dict[str, Any]] = {}
        for entry in stored:
            name, key = entry.rsplit(".", 1)
            if name in parameters:
                value = _allocate(parameters[name], stored.entries[entry])
                values.setdefault(name, {})[key] = value
                whole = value.shape == parameters[name].shape
                targets[entry] = self.split_state(name, value) if whole else value
        if targets:
            stored.read_into(targets)
        for name, scalars in state["scalars"].items():
            if name in parameters:
                values.setdefault(name, {}).update(scalars)
        groups = [
            {**group, **{key: [name for name in group[key] if name in parameters] for key in MEMBERS & group.keys()}}
            for group in state["param_groups"]
        ]
        return {"state": values, "param_groups": groups}


def _allocate(parameter: Tensor, entry: Any) -> Tensor:
    """A tensor for state of a parameter, laid out as the parameter is where it has its shape."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return torch.zeros(entry.size, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import Replicate, zeros

    return zeros(entry.size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
