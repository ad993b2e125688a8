"""Import every rule file, which enters its rules in the table."""

from danling.tensors.ops import pointwise, reductions

__all__ = ["pointwise", "reductions"]
