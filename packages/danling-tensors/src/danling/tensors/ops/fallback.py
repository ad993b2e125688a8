"""What serves a torch function that has no rule: the class's own member, or one call per element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, from_elements
from danling.tensors.ops.base import at_element
from danling.tensors.ops.signatures import names_of_places
from danling.tensors.ops.table import fallback

_DIM_NAMES = {"dimension", "start_dim", "end_dim"} | {
    name + end for name in ("dim", "axis") for end in ("", "s", "0", "1", "2")
}
_DIM_NAMES.add("axes")


_OWN = NestedTensor.__mro__[: NestedTensor.__mro__.index(Tensor)]


def member(func: Any) -> Callable[..., Any] | None:
    """The NestedTensor member that stands for `torch.Tensor`'s one, e.g. for `torch.Tensor.grad.__get__`."""
    own = {name: item for kind in reversed(_OWN) for name, item in vars(kind).items()}
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        descriptor = own.get(func.__self__.__name__)
        if descriptor is not None and hasattr(descriptor, name):
            return getattr(descriptor, name)
        return partial(_of_values, func)
    found = own.get(name)
    if found is None or not callable(found):
        return None
    if getattr(func, "__objclass__", None) is not None or "Tensor." in getattr(func, "__qualname__", ""):
        return found
    return None


def _of_values(func: Any, x: NestedTensor, *args: Any) -> Any:
    # A property that says nothing about the structure, such as is_cuda: true of the values.
    return func(x._values, *args[:1])


def nested_leaves(tree: Any) -> Iterator[NestedTensor]:
    """All NestedTensors in nested lists, tuples and dicts."""
    if isinstance(tree, NestedTensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from nested_leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from nested_leaves(item)


def _pick(tree: Any, i: int, elements: dict[int, tuple[Tensor, ...]]) -> Any:
    if isinstance(tree, NestedTensor):
        return elements[id(tree)][i]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_pick(item, i, elements) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_pick(item, i, elements) for item in tree)
    if isinstance(tree, dict):
        return {key: _pick(item, i, elements) for key, item in tree.items()}
    return tree


def _translate(first: NestedTensor, value: Any, name: str) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        dim = first._layout.element_dim(value)
        if dim is None:
            raise ValueError(f"{name} runs element by element and cannot work along the batch dim {value}; use .tensor")
        return dim
    if isinstance(value, (list, tuple)):
        return type(value)(_translate(first, item, name) for item in value)
    return value


def per_element(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `func` once per element and collect the results.

    Tensors of one rank become a NestedTensor, 0-d ones a dense `(B,)`, anything else a list. Arguments that torch names
    `dim` and the like are dims of `.shape` and are translated, given by name or by position.

    Raises:
        ValueError: NestedTensors of different batch size, or an empty batch, whose result cannot be known.
        NestedTensorFallbackError: Inside `strict()`.
    """
    name = getattr(func, "__name__", str(func))
    leaves = list(nested_leaves(args)) + list(nested_leaves(kwargs))
    first = leaves[0]
    batch = first._layout.batch_size
    for other in leaves[1:]:
        if other._layout.batch_size != batch:
            raise ValueError(f"{name} got NestedTensors of batch size {batch} and {other._layout.batch_size}")
    fallback(name, "per element")
    return run_per_element(func, first, leaves, args, kwargs)


def run_per_element(func: Any, first: NestedTensor, leaves: list[NestedTensor], args: Any, kwargs: Any) -> Any:
    """The loop of `per_element`, without the warning."""
    name = getattr(func, "__name__", str(func))
    batch = first._layout.batch_size
    if batch == 0:
        raise ValueError(f"{name} has no packed rule, and the result of an empty batch cannot be known without one")
    kwargs = {key: _translate(first, value, name) if key in _DIM_NAMES else value for key, value in kwargs.items()}
    places = names_of_places(func, args)
    args = [
        _translate(first, value, name) if places and places[i] in _DIM_NAMES else value for i, value in enumerate(args)
    ]
    elements = {id(x): x.unbind() for x in leaves}
    results = []
    for i in range(batch):
        with at_element(i):
            results.append(func(*_pick(args, i, elements), **_pick(kwargs, i, elements)))
    if name.endswith("_") and not name.endswith("__") and results[0] is not None:
        return args[0]  # elements are views: the work is done in place
    return collect(results, first)


def collect(results: list[Any], like: NestedTensor) -> Any:
    """Batch the results of one call per element."""
    head = results[0]
    if isinstance(head, Tensor):
        if not all(isinstance(r, Tensor) and r.dim() == head.dim() for r in results):
            return results
        if head.dim() == 0:
            return torch.stack(results)
        ragged = None
        if head.dim() == like._layout.rank:
            differ = {d for d in range(head.dim()) if len({r.shape[d] for r in results}) > 1}
            ragged = tuple(sorted(differ | set(like._layout.ragged_dims)))
        return from_elements(
            results, ragged_dims=ragged, batch_first=like._layout.batch_first, flags=like._flags, rank=head.dim()
        )
    if isinstance(head, (list, tuple)) and all(type(r) is type(head) and len(r) == len(head) for r in results):
        parts = [collect([r[j] for r in results], like) for j in range(len(head))]
        if isinstance(head, tuple) and hasattr(head, "_fields"):
            return type(head)(*parts)
        return type(head)(parts)
    return results
