"""The meshes and groups behind a topology, as plans and models see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danling.runners.errors import ConfigError

from .topology import AXES, DOMAINS, ParallelTopology


class ParallelContext:
    """One device mesh over every axis, the process groups of its domains, and who keeps which axis in step.

    A parameter that a plan splits over an axis is a `DTensor` on a submesh of `mesh`: gradient norm, checks and
    checkpoints read from it what each rank holds. A plain tensor is taken to be the same on all ranks of a stage.

    Args:
        topology: degrees and coordinates of this rank.
        device_type: `cpu`, `cuda`, ...

    Attributes:
        topology: see `ParallelTopology`.
        mesh: all seven axes, in the order of `AXES`; those that are not in use have size 1.
        context_offset: position in the whole sequence at which the part of this rank begins, in the batch at hand.
        context_length: positions in this rank's part of the sequence, in the batch at hand.
        sequence_dim: the dimension of input and target along which sequences are cut; None until a plan says so.

    Note:
        Every rank constructs it, and asks for a group for the first time, together with all others.
    """

    def __init__(self, topology: ParallelTopology, device_type: str) -> None:
        self.topology = topology
        self.device_type = device_type
        shape = tuple(topology.degrees[axis] for axis in AXES)
        self.mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        self.context_offset = self.context_length = 0
        self.sequence_dim: int | None = None
        self._taken: set[str] = set()
        self._flat: dict[str, DeviceMesh] = {}
        for name in ("data", "loss", "model", "stage"):
            self.flat_mesh(name)

    # Places

    def degree(self, domain: str) -> int:
        """Ranks in a domain: an axis, or `data`, `loss`, `model`, `all`."""
        return self.topology.degree(domain)

    def rank(self, domain: str) -> int:
        """Position of this rank in its domain."""
        return self.topology.index(domain)

    def submesh(self, *axes: str) -> DeviceMesh:
        """The mesh of some axes, outermost first."""
        return self.mesh[axes[0] if len(axes) == 1 else axes]

    def flat_mesh(self, domain: str) -> DeviceMesh:
        """A domain as one dimension; `stage` is every axis but pipeline."""
        if domain in AXES:
            return self.mesh[domain]
        if domain not in self._flat:
            self._flat[domain] = self.mesh[DOMAINS[domain]]._flatten(f"danling_{domain}")
        return self._flat[domain]

    def group(self, domain: str) -> Any:
        """The process group of a domain: an axis, `data`, `loss`, `model`, `stage` or `all`."""
        if domain == "all":
            return dist.group.WORLD
        return self.flat_mesh(domain).get_group()

    @property
    def groups(self) -> list[Any]:
        """Every process group of the meshes, each once."""
        found = [self.group(name) for name in (*AXES, *self._flat)]
        return list({id(group): group for group in found}.values())

    def all_reduce(self, tensor: Tensor, domain: str = "all", op: Any = None) -> Tensor:
        """Reduce a tensor over a domain, in place; the sum unless `op` says otherwise."""
        if self.degree(domain) > 1:
            dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM, group=self.group(domain))
        return tensor

    def set_timeout(self, timeout: timedelta) -> None:
        """Let collectives of all groups wait no longer than this.

        Raises:
            RuntimeError: a backend has no way to change it.
        """
        from torch.distributed.distributed_c10d import _set_pg_timeout

        for group in self.groups:
            _set_pg_timeout(timeout, group)

    # Axes

    def took(self, *axes: str) -> None:
        """Report that somebody keeps the ranks of these axes in step.

        Raises:
            ValueError: an unknown axis.
        """
        if unknown := set(axes) - set(AXES):
            raise ValueError(f"unknown axes {sorted(unknown)}; the axes are {', '.join(AXES)}")
        self._taken.update(axes)

    @property
    def taken(self) -> frozenset[str]:
        """Axes that were reported."""
        return frozenset(self._taken)

    @contextmanager
    def part(self) -> Iterator[None]:
        """A context in which `taken` tells what was reported for one part of the model; afterwards, for all so far."""
        earlier, self._taken = self._taken, set()
        try:
            yield
        finally:
            self._taken |= earlier

    def require(self, axes: Iterable[str] = AXES) -> None:
        """Refuse to go on while an axis in use has nothing that keeps it in step.

        Raises:
            ConfigError: naming each axis and what is missing.
        """
        lines = [
            f"parallel.axes.{axis}: {self.degree(axis)}, but nothing keeps its ranks in step: {MISSING[axis]}"
            for axis in axes
            if self.degree(axis) > 1 and axis not in self._taken
        ]
        if lines:
            raise ConfigError("\n  ".join(lines))


_NO_MATCH = (
    "no built-in plan matches a module of the model (they cover nn.TransformerEncoderLayer, nn.TransformerDecoderLayer "
    "and nn.MultiheadAttention), and it has no parallelize(ctx) that took the axis with ctx.took"
)
MISSING = {
    "replicate": "the model has no parameters to train",
    "shard": "the model has no parameters to train",
    "context": _NO_MATCH,
    "pipeline": "no schedule over stages of the model was bound",
    "tensor": _NO_MATCH,
    "expert": "the model needs a parallelize(ctx) that splits its experts and calls ctx.took('expert')",
    "expert_tensor": "the model needs a parallelize(ctx) that splits its experts and calls ctx.took('expert_tensor')",
}
