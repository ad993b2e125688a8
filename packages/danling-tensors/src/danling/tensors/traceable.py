"""Members of NestedTensor that torch's own machinery reads: torch.compile, fake tensors, torch.func.

torch.compile takes a tensor subclass apart with `__tensor_flatten__` and compares sizes in C++, where a NestedTensor has those of
its packed values. Who asks for a size or a storage therefore matters in four places; they look at the caller.
"""

from __future__ import annotations

import sys
from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass as _PlainTensors

from danling.tensors.layout import Layout, is_traced

_Base: Any = torch._C.TensorBase


class Traceable:
    """What a tracer reads of a NestedTensor; see `danling.tensors.tracing` for what it does with it."""

    __slots__ = ()

    _values: Tensor
    _layout: Layout
    _refuse: Any

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        from danling.tensors.tracing import flatten

        return flatten(self)  # type: ignore[arg-type]

    @staticmethod
    def __tensor_unflatten__(inner: Any, constants: Any, outer_size: Any, outer_stride: Any) -> Any:
        from danling.tensors.tracing import unflatten

        return unflatten(inner, constants, outer_size, outer_stride)

    def _stable_hash_for_caching(self) -> str:
        from danling.tensors.tracing import stable_hash

        return stable_hash(self)  # type: ignore[arg-type]

    @property
    def _packed(self) -> Tensor:
        from danling.tensors.tracing import packed

        return packed(self)  # type: ignore[arg-type]

    @property
    def _row_offsets(self) -> Tensor:
        return self._layout.segments.on("offsets", self._values.device)

    @property
    def _row_sizes(self) -> Tensor:
        return self._layout.segments.on("sizes", self._values.device)

    @property
    def _dynamo_propagated_dynamic_indices(self) -> set[int]:
        layout = self._layout
        return {layout.batch_dim, *map(layout.shape_dim, layout.ragged_dims)}

    @_dynamo_propagated_dynamic_indices.setter
    def _dynamo_propagated_dynamic_indices(self, value: set[int]) -> None:
        """Always the batch and the ragged dims, whatever a compiled region found of its outputs."""

    def _is_view(self) -> bool:
        return False

    def untyped_storage(self) -> Any:
        """Refused."""
        if is_traced(self._values):
            with _PlainTensors():
                return _Base.untyped_storage(self)
        if asked_by_torch():
            return torch.UntypedStorage(1)  # of its own: the values are described apart
        return self._refuse()

    def storage_offset(self) -> int:
        """Refused."""
        return 0 if is_traced(self._values) or asked_by_torch() else self._refuse()


def asked_by_torch(depth: int = 2) -> bool:
    """Whether the caller of the caller is torch's own tracing machinery, which describes tensors by their storage."""
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("torch._")


_recent: deque[Tensor] | None = None
"""What properties gave lately, once torch.compile has read one of an input: its guards read the properties of inputs one
after another, and take two at the same address, that of one dropped before, for the same tensor."""


def reading(values: Tensor) -> Any:
    """The context in which a property makes its tensor: the fake mode of fake values, which torch.compile has off then."""
    return getattr(values, "fake_mode", None) or nullcontext()


def told(x: Traceable, out: Tensor) -> Tensor:
    """`out`, a property of `x`; where torch.compile makes it an input of a graph, with its sizes marked as dynamic."""
    global _recent
    if asked_by_torch(3):
        _recent = _recent if _recent is not None else deque(maxlen=8)
        out._dynamo_propagated_dynamic_indices = {d for d in x._dynamo_propagated_dynamic_indices if d < out.dim()}  # type: ignore[attr-defined]
    if _recent is not None:
        _recent.append(out)
    return out


def in_transform() -> bool:
    """Whether one of torch.func's transforms is running, which wrap the C++ half of their arguments."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in ("torch._functorch.eager_transforms", "torch._functorch.vmap"):
            return True
        frame = frame.f_back
    return False


def stripped(name: str) -> NotImplementedError:
    """The error for a transform that would lose the structure of a NestedTensor."""
    return NotImplementedError(
        f"{name} of a NestedTensor would see its packed values only; transform a function of dense tensors such as "
        ".concat, in which NestedTensors are used but neither given as arguments nor mapped over"
    )


def for_guard() -> bool:
    """Whether the caller of the caller records the sizes that guards compare with the C++ size, that of the values."""
    return sys._getframe(2).f_globals.get("__name__") == "torch._dynamo.variables.builder"
