"""Grouped execution: elements of equal size run as one dense call, one call per distinct size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout, Segments
from danling.tensors.nested_tensor import NestedTensor, from_elements, values_of, wrap
from danling.tensors.ops.base import named_error

_PROBE = 64


def run_grouped(fn: Callable[..., Any], *xs: Tensor, ragged: Any, like: NestedTensor) -> Any:
    """Run `fn` on dense batches of equal-sized elements and put the results in element order.

    Args:
        fn: Called with one dense `(n, *element)` batch per operand; returns a tensor `(n, *result)` or a tuple of them.
        *xs: NestedTensors of one batch size; dense operands have the batch at dim 0.
        ragged: Ragged element dims of the result; `()` gives a dense `(B, *result)`, unless no operand has a ragged dim.
            A list of such tuples when `fn` returns several tensors.
        like: Gives `batch_first`, `padding_value` and `mask_value` of the result.

    Raises:
        Exception: Whatever `fn` raises, the same type, naming the first element of the group.
    """
    nested = [x for x in xs if isinstance(x, NestedTensor)]
    if all(x._layout.dense for x in nested):
        return _declared(_run(fn, nested, xs, ragged, like), like)
    return _run(fn, nested, xs, ragged, like)


def _declared(out: Any, like: NestedTensor) -> Any:
    """Results of operands that were declared to have no ragged dim: they are batches of that kind."""
    if isinstance(out, (tuple, list)):
        return tuple(_declared(o, like) for o in out)
    if isinstance(out, NestedTensor):
        return out
    return wrap(out, like._layout.with_static(tuple(out.shape[1:])), like._flags)


def _run(
    fn: Callable[..., Any], nested: list[NestedTensor], xs: Sequence[Tensor], ragged: Any, like: NestedTensor
) -> Any:
    batch = nested[0]._layout.batch_size
    if batch == 0:
        return _of_nothing(fn, xs, ragged, like)
    tables = [x._layout.segments.table for x in nested]
    widths = [x._layout.segments.k for x in nested]
    groups: dict[Any, list[int]] = {}
    for i in range(batch):
        key = tuple(tuple(t[i * k : i * k + k]) for t, k in zip(tables, widths))
        groups.setdefault(key, []).append(i)
    if len(groups) == 1:
        try:
            out = fn(*(dense_of(x) for x in xs))
        except Exception as error:
            raise named_error(0, error) from error
        return _assemble_one(out, ragged, like)
    elements = [x.unbind() if isinstance(x, NestedTensor) else x.unbind(0) for x in xs]
    parts: list[Any] = [None] * batch
    for members in groups.values():
        batches = [torch.stack([e[i] for i in members]) for e in elements]
        try:
            out = fn(*batches)
        except Exception as error:
            raise named_error(members[0], error) from error
        split = [o.unbind(0) for o in out] if isinstance(out, (tuple, list)) else out.unbind(0)
        for j, i in enumerate(members):
            parts[i] = tuple(s[j] for s in split) if isinstance(out, (tuple, list)) else split[j]
    if isinstance(parts[0], tuple):
        return tuple(_assemble([p[j] for p in parts], ragged[j], like) for j in range(len(parts[0])))
    return _assemble(parts, ragged, like)


def dense_of(x: Tensor) -> Tensor:
    """A batch of equal elements as one dense `(B, *element)` tensor."""
    if not isinstance(x, NestedTensor):
        return x
    layout = x._layout
    values = values_of(x)
    out = values.reshape(layout.batch_size, *layout.segments.max_sizes, *layout.static_sizes)
    inverse = [0] * layout.rank
    for position, d in enumerate(layout.permutation):
        inverse[d] = position + 1
    return out.permute(0, *inverse) if layout.rank else out.reshape(layout.batch_size)


def _assemble(parts: list[Tensor], ragged: tuple[int, ...], like: NestedTensor) -> Tensor:
    if not ragged:
        return torch.stack(parts)
    return from_elements(
        parts, ragged_dims=tuple(ragged), batch_first=like._layout.batch_first, flags=like._flags, rank=parts[0].dim()
    )


def _assemble_one(out: Any, ragged: Any, like: NestedTensor) -> Any:
    if isinstance(out, (tuple, list)):
        return tuple(_assemble_one(o, r, like) for o, r in zip(out, ragged))
    if not ragged:
        return out
    return nested_from_dense(out, tuple(ragged), like)


def nested_from_dense(out: Tensor, ragged: tuple[int, ...], like: NestedTensor) -> NestedTensor:
    """A dense `(B, *element)` batch as a NestedTensor with the given ragged dims (all of equal size)."""
    batch, element = out.shape[0], out.shape[1:]
    sizes = (
        torch.tensor([element[d] for d in ragged], dtype=torch.int64, device="cpu")
        .expand(batch, len(ragged))
        .contiguous()
    )
    static_dims = [d for d in range(len(element)) if d not in ragged]
    static = tuple(element[d] for d in static_dims)
    layout = Layout(Segments(sizes), ragged, static, like._layout.batch_first)
    order = (0, *(d + 1 for d in ragged), *(d + 1 for d in static_dims))
    return wrap(out.permute(order).reshape(layout.rows, *static), layout, like._flags)


def _of_nothing(fn: Callable[..., Any], xs: Sequence[Tensor], ragged: Any, like: NestedTensor) -> Any:
    # Static sizes of the result of an empty batch: those of one made-up element.
    probes = []
    for x in xs:
        if isinstance(x, NestedTensor):
            sizes = [_PROBE] * x._layout.rank
            for d, size in zip(x._layout.static_dims, x._layout.static_sizes):
                sizes[d] = size
            probes.append(torch.zeros(1, *sizes, dtype=x.dtype, device=x.device))
        else:
            probes.append(x.new_zeros(1, *x.shape[1:]))
    with torch.no_grad():
        out = fn(*probes)

    def empty(result: Tensor, dims: tuple[int, ...]) -> Tensor:
        element = result.shape[1:]
        static = tuple(element[d] for d in range(len(element)) if d not in dims)
        if not dims:
            return result.new_zeros(0, *static)
        layout = Layout(
            Segments(torch.empty(0, len(dims), dtype=torch.int64, device="cpu")),
            tuple(dims),
            static,
            like._layout.batch_first,
        )
        return wrap(result.new_zeros(0, *static), layout, like._flags)

    if isinstance(out, (tuple, list)):
        return tuple(empty(o, r) for o, r in zip(out, ragged))
    return empty(out, ragged)
