"""What a sharded checkpoint holds of a model that is spread over axes, and which layouts may go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from danling.backends.torch.averaging import ShardedEMA
from danling.backends.torch.export import cast_floating
from danling.backends.torch.local import live_state
from danling.backends.torch.payload import clean_name
from danling.runners.errors import CheckpointError, ResumeError

from .checks import is_split
from .plans.packing import PackedShard, packed_parameters, to_usual_order
from .sharding import sharded_modules
from .topology import AXES, DOMAINS

FIXED = ("tensor", "pipeline", "expert", "expert_tensor")  # a full resume needs the degrees of these

_Host: Any = object  # part of ParallelRunner: what is used here and not defined here is the runner's


class Checkpoints(_Host):
    """The part of `ParallelRunner` that saves and restores."""

    @property
    def uses_dcp(self) -> bool:
        """Always: the state is spread over ranks."""
        return True

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this rank saves what is not sharded of its stage."""
        return not self.topology.index("stage")

    def local_parts(self) -> list[Any]:
        """The modules of this rank, without wrappers, with parameters in their split form."""
        for module in sharded_modules(self.model_parts):
            module.reshard()
        return [self.unwrap(part) for part in self.model_parts]

    def model_tensors(self) -> dict[str, Any]:
        """The tensors of all parts on this rank, by their names in the whole model, live."""
        return self._placed(live_state(self.local_parts()))

    def ema_tensors(self) -> dict[str, Any] | None:
        """The tensors of the average on this rank."""
        return self._placed(self.ema.averages) if isinstance(self.ema, ShardedEMA) else super().ema_tensors()

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: self.split_state(name, value) for name, value in tensors.items()}

    @property
    def _packed(self) -> dict[str, tuple[int, int]]:
        found = [packed_parameters(self.unwrap(part)) for part in self.model_parts]
        return {clean_name(name): layout for packed in found for name, layout in packed.items()}

    def split_state(self, name: str, value: Tensor) -> Any:
        """A tensor with the shape of a parameter, as something that knows where its parts belong in the whole one."""
        layout = self._packed.get(name)
        return value if layout is None else PackedShard(value, *layout)  # type: ignore[arg-type]

    def tensor_place(self, value: Any) -> tuple[int, int]:
        """The number of this rank among those that hold the same part of a tensor, and how many these are."""
        place, count = 0, 1
        for axis in DOMAINS["stage"]:
            degree = self.topology.degrees[axis]
            if degree > 1 and not is_split(value, axis, self.parallel):
                place = place * degree + self.topology.coordinates[axis]
                count *= degree
        return place, count

    def names_elsewhere(self, names: Iterable[str]) -> set[str]:
        """Names that other stages of the pipeline have."""
        if self.topology.degrees["pipeline"] == 1:
            return set()
        return {name for share in self.gather_objects(list(names)) for name in share} - set(names)

    def export_state(self, dtype: str | None = None, ema: bool = True) -> dict[str, Any]:
        """Whole weights on the main process, those of the EMA when there is one, floating tensors cast.

        Every rank calls it; the others get nothing.
        """
        averaged = ema and isinstance(self.ema, ShardedEMA) and self._ema_ready
        tensors = self.ema.averages if averaged else live_state(self.local_parts())
        packed = self._packed
        whole: dict[str, Any] = {}
        for name, value in tensors.items():
            full = value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
            if self.speaks_for_stage:
                whole[name] = (to_usual_order(full, *packed[name]) if name in packed else full).cpu()
        if self.topology.degrees["pipeline"] > 1:
            shares: list[Any] | None = [None] * self.world_size if self.is_main_process else None
            dist.gather_object(whole, shares, group=self._control)
            whole = {name: value for share in shares or () for name, value in share.items()}
        return cast_floating(whole, dtype) if self.is_main_process else {}

    # Layouts

    def _meta(self, kind: str) -> dict[str, Any]:
        return {**super()._meta(kind), "axes": dict(self.topology.degrees)}

    def _check_resumable(self, payload: Mapping[str, Any]) -> None:
        super()._check_resumable(payload)
        manifest = payload.get("manifest")
        if manifest is None or manifest.get("stack") != self.stack:
            return
        saved = manifest.get("axes")
        where = payload.get("path", "the checkpoint")
        degrees = saved.values() if isinstance(saved, Mapping) else ()
        if not degrees or set(saved) != set(AXES) or not all(isinstance(d, int) and d > 0 for d in degrees):
            raise CheckpointError(f"{where} does not say over which axes it was saved: its topology is {saved!r}")
        if manifest.get("kind") == "seed":
            return
        now = self.topology.degrees
        different = [axis for axis in FIXED if saved[axis] != now[axis]]
        if different:
            raise ResumeError(
                f"{where} was saved with {_layout(saved)} and this run has {_layout(now)}: a full resume takes the same "
                f"degrees of {', '.join(different)}; its weights can be taken over with `pretrained`"
            )
        if dict(saved) != dict(now):
            self.logger.info("resharding from %s to %s", _layout(saved), _layout(now))


def _layout(degrees: Mapping[str, int]) -> str:
    return " × ".join(f"{axis}={degrees[axis]}" for axis in AXES if degrees[axis] > 1) or "one rank"
