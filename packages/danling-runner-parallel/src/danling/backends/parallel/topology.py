"""Where a rank stands: degrees, coordinates and the domains that collectives run over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from danling.runners.errors import ConfigError

AXES = ("replicate", "shard", "context", "pipeline", "tensor", "expert", "expert_tensor")
"""Mesh order, outermost first; ranks map to coordinates row-major."""

DOMAINS: dict[str, tuple[str, ...]] = {
    "data": ("replicate", "shard"),
    "loss": ("replicate", "shard", "context"),
    "model": ("pipeline", "tensor", "expert", "expert_tensor"),
    "stage": tuple(axis for axis in AXES if axis != "pipeline"),
    "all": AXES,
    **{axis: (axis,) for axis in AXES},
}
"""The axes each domain spans.

`data` deals samples, `loss` averages losses and gradients, `model` is one replica, `stage` holds the same part of the model.
"""


@dataclass(frozen=True)
class ParallelTopology:
    """The layout of a world of ranks over the parallel axes, and one rank's place in it.

    Args:
        degrees: axis to degree; absent axes have degree 1, one degree may be -1 and takes what is left.
        world_size: number of ranks; the product of the degrees.
        rank: the rank whose place this is.

    Raises:
        ConfigError: an unknown axis, a degree of 0 or below -1, two degrees of -1, a -1 that does not divide, a product
            that is not the world size, or a rank outside the world.

    Example:
        >>> topology = ParallelTopology({"replicate": 2, "tensor": -1}, world_size=4, rank=3)
        >>> topology.degrees["tensor"], topology.coordinates["replicate"], topology.coordinates["tensor"]
        (2, 1, 1)
        >>> topology.domain("data")
        [1, 3]
        >>> topology.rank_of({"replicate": 1})
        2
    """

    degrees: Mapping[str, int]
    world_size: int
    rank: int = 0
    coordinates: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "degrees", resolve_degrees(self.degrees, self.world_size))
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is outside a world of {self.world_size} ranks")
        object.__setattr__(self, "coordinates", self.coordinates_of(self.rank))

    def coordinates_of(self, rank: int) -> dict[str, int]:
        """Return the coordinate of `rank` on every axis."""
        coordinates = {}
        for axis in reversed(AXES):
            rank, coordinates[axis] = divmod(rank, self.degrees[axis])
        return {axis: coordinates[axis] for axis in AXES}

    def rank_of(self, coordinates: Mapping[str, int]) -> int:
        """Return the rank at `coordinates`; axes left out count as 0.

        Raises:
            ValueError: an unknown axis, or a coordinate outside its degree.
        """
        unknown = set(coordinates) - set(AXES)
        if unknown:
            raise ValueError(f"unknown axes {sorted(unknown)}; the axes are {', '.join(AXES)}")
        rank = 0
        for axis in AXES:
            coordinate = coordinates.get(axis, 0)
            if not 0 <= coordinate < self.degrees[axis]:
                raise ValueError(f"coordinate {coordinate} is outside axis {axis} of degree {self.degrees[axis]}")
            rank = rank * self.degrees[axis] + coordinate
        return rank

    def degree(self, domain: str) -> int:
        """Return how many ranks `domain` (an axis or one of `DOMAINS`) spans."""
        return math.prod(self.degrees[axis] for axis in self._axes(domain))

    def index(self, domain: str) -> int:
        """Return this rank's row-major position inside its `domain`."""
        position = 0
        for axis in self._axes(domain):
            position = position * self.degrees[axis] + self.coordinates[axis]
        return position

    def domain(self, name: str) -> list[int]:
        """Return the ranks that share this rank's `name` domain, in ascending order, this rank included."""
        axes = self._axes(name)
        fixed = [axis for axis in AXES if axis not in axes]
        return [
            rank
            for rank in range(self.world_size)
            if all(self.coordinates_of(rank)[axis] == self.coordinates[axis] for axis in fixed)
        ]

    def describe(self) -> str:
        """Return the layout in one line, naming only the axes in use."""
        used = [f"{axis}={self.degrees[axis]}" for axis in AXES if self.degrees[axis] > 1]
        return " × ".join(used) or "one rank"

    def _axes(self, domain: str) -> tuple[str, ...]:
        try:
            return DOMAINS[domain]
        except KeyError:
            raise ValueError(f"unknown domain {domain!r}; the domains are {', '.join(DOMAINS)}") from None


def resolve_degrees(degrees: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Fill in absent axes and one -1, and check the product against the world size.

    Example:
        >>> resolve_degrees({"shard": -1, "tensor": 2}, 8)["shard"]
        4
    """
    unknown = set(degrees) - set(AXES)
    if unknown:
        raise ConfigError(f"unknown parallel axes {sorted(unknown)}; the axes are {', '.join(AXES)}")
    full = {axis: degrees.get(axis, 1) for axis in AXES}
    for axis, degree in full.items():
        if degree == 0 or degree < -1:
            raise ConfigError(f"parallel.axes.{axis} is {degree}; a degree is at least 1, or -1 to be filled in")
    open_axes = [axis for axis, degree in full.items() if degree == -1]
    if len(open_axes) > 1:
        raise ConfigError(f"parallel.axes.{' and '.join(open_axes)} are both -1; at most one degree can be filled in")
    product = math.prod(degree for degree in full.values() if degree != -1)
    if open_axes:
        if world_size % product:
            raise ConfigError(
                f"parallel.axes.{open_axes[0]} is -1, but the other degrees multiply to {product}, "
                f"which does not divide the world size {world_size}"
            )
        full[open_axes[0]] = world_size // product
    elif product != world_size:
        raise ConfigError(f"the degrees of parallel.axes multiply to {product}, but the world size is {world_size}")
    return full
