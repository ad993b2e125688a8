"""Parallel layouts behind danling's runner: which rank stands where on which axis."""

from danling.backends.parallel.topology import AXES, DOMAINS, ParallelTopology

__all__ = ["AXES", "DOMAINS", "ParallelTopology"]
