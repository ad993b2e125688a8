"""Topology: degrees, coordinates and domains against torch's own device mesh order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.backends.parallel import AXES, DOMAINS, ParallelTopology
from danling.runners.errors import ConfigError


@given(degrees=st.lists(st.integers(1, 3), min_size=7, max_size=7), data=st.data())
def test_coordinates_are_row_major(degrees: list[int], data) -> None:
    world = math.prod(degrees)
    rank = data.draw(st.integers(0, world - 1))
    topology = ParallelTopology(dict(zip(AXES, degrees, strict=True)), world, rank)
    mesh = np.arange(world).reshape(degrees)
    place = tuple(topology.coordinates[axis] for axis in AXES)
    assert mesh[place] == rank
    assert topology.rank_of(topology.coordinates) == rank
    for name, axes in DOMAINS.items():
        index = tuple(slice(None) if axis in axes else topology.coordinates[axis] for axis in AXES)
        expected = sorted(mesh[index].reshape(-1).tolist())
        assert topology.domain(name) == expected
        assert topology.degree(name) == len(expected)
        assert expected[topology.index(name)] == rank


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensor": 3}, ("3", "4")),
        ({"tensor": 0}, ("tensor", "0")),
        ({"shard": -2}, ("shard", "-2")),
        ({"shard": -1, "tensor": -1}, ("shard", "tensor", "at most one")),
        ({"shard": -1, "tensor": 3}, ("3", "4", "divide")),
        ({"tensr": 2}, ("tensr", "tensor")),
    ],
)
def test_wrong_degrees_are_refused_with_the_numbers(degrees, words) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelTopology(degrees, world_size=4)
    for word in words:
        assert word in str(error.value)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 4"):
        ParallelTopology({"shard": 4}, world_size=4, rank=4)


def test_describe_names_only_what_is_used() -> None:
    assert ParallelTopology({}, 1).describe() == "one rank"
    assert ParallelTopology({"shard": 2, "tensor": 2}, 4).describe() == "shard=2 × tensor=2"
