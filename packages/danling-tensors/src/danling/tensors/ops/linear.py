"""Matrix products in which one side is packed rows: linear, and matmul with dense matrices or matching structures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import like, names, same_batch
from danling.tensors.ops.grouped import run_grouped
from danling.tensors.ops.table import register


def last_is_static(x: NestedTensor) -> bool:
    """Whether the last element dim is static, and so the last dim of values."""
    layout = x._layout
    return layout.rank > 0 and layout.rank - 1 not in layout.ragged_dims


@register("linear algebra", "linear")
def linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(input, NestedTensor) or isinstance(weight, NestedTensor):
        raise ValueError("linear takes a NestedTensor as input only; weight and bias must be dense")
    layout = input._layout
    if not layout.last_static:
        raise ValueError(f"linear works on the last dim, which is ragged here (ragged_dims={layout.ragged_dims})")
    out = func(values_of(input), weight, bias)
    static = layout.static_sizes
    if weight.dim() != 2 or weight.shape[0] != static[-1]:
        layout = layout.with_static((*static[:-1], *weight.shape[:-1]))
    return wrap(out, layout, input._flags)


@register("linear algebra", "bilinear")
def bilinear(func: Any, input1: Any, input2: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    first = input1 if isinstance(input1, NestedTensor) else input2
    if not (isinstance(input1, NestedTensor) and isinstance(input2, NestedTensor)):
        from danling.tensors.ops.broadcast import align

        _, (v1, v2) = align([input1, input2], "bilinear")
    else:
        a, b = input1._layout, input2._layout
        if a.segments != b.segments or a.ragged_dims != b.ragged_dims or a.static_sizes[:-1] != b.static_sizes[:-1]:
            raise ValueError(f"bilinear needs operands of one structure, got {a} and {b}")
        v1, v2 = values_of(input1), values_of(input2)
    out = func(v1, v2, weight, bias)
    return like(first, out, first._layout.with_static(tuple(out.shape[1:])))


@register("linear algebra", "matmul", "mm", "bmm", "mv", "dot", "vdot", "linalg_vecdot", path="grouped")
def matmul(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    if name in ("__rmatmul__",):
        a, b = b, a
    if name == "linalg_vecdot":
        return vecdot(a, b, *args, **kwargs)
    if isinstance(a, NestedTensor) and isinstance(b, NestedTensor):
        return _nested_matmul(a, b, name)
    if isinstance(a, NestedTensor) and isinstance(b, Tensor):
        return _by_matrix(a, b, name)
    if isinstance(a, Tensor) and isinstance(b, NestedTensor):
        return _matrix_by(a, b, name)
    raise TypeError(f"{name} multiplies tensors, got {type(a).__name__} and {type(b).__name__}")


def vecdot(a: Any, b: Any, *, dim: int = -1) -> Any:
    """`sum(conj(a) * b, dim)`."""
    return torch.sum(torch.conj(a) * b, dim)


def _by_matrix(a: NestedTensor, b: Tensor, name: str) -> Any:
    """NestedTensor times dense."""
    layout = a._layout
    values = values_of(a)
    if b.dim() == 0 or layout.rank == 0:
        raise RuntimeError(f"{name}: both arguments need at least one dim")
    if b.dim() <= 2 and layout.rank - 1 not in layout.ragged_dims:
        out = torch.matmul(values, b)
        if b.dim() == 2:
            return like(a, out, layout.with_static((*layout.static_sizes[:-1], b.shape[-1])))
        return like(a, out, layout.with_static(layout.static_sizes[:-1]))
    if b.dim() == 1:  # the contracted dim is ragged: read b at each element's positions
        return torch.sum(a * b, layout.shape_dim(layout.rank - 1))
    return _grouped(a, b, name)


def _matrix_by(a: Tensor, b: NestedTensor, name: str) -> Any:
    """Dense times NestedTensor."""
    layout = b._layout
    values = values_of(b)
    if layout.rank == 1:
        if layout.ragged_dims:
            if a.dim() == 1:
                return torch.sum(b * a, -1)
        elif a.dim() <= 2:
            return like(b, torch.matmul(values, a.mT if a.dim() == 2 else a), _drop_last(b, a))
    contracted = layout.rank - 2
    if a.dim() <= 2 and contracted >= 0 and contracted not in layout.ragged_dims:
        d = layout.values_dim(contracted)
        if a.dim() == 1:
            out = torch.tensordot(values, a, ([d], [0]))
            ragged = tuple(r - (r > contracted) for r in layout.ragged_dims)
            return like(b, out, layout.with_dims(ragged, tuple(out.shape[1:])))
        out = torch.tensordot(values, a, ([d], [1])).movedim(-1, d)
        return like(b, out, layout.with_static(tuple(out.shape[1:])))
    if a.dim() == 1:
        return torch.sum(b * a[:, None], layout.shape_dim(contracted))
    return _grouped(a, b, name)


def _drop_last(b: NestedTensor, a: Tensor) -> Any:
    layout = b._layout
    return layout.with_static((a.shape[0],) if a.dim() == 2 else ())


def _nested_matmul(a: NestedTensor, b: NestedTensor, name: str) -> Any:
    same_batch(torch.matmul, a, b)
    la, lb = a._layout, b._layout
    if la.rank == 0 or lb.rank == 0:
        raise RuntimeError(f"{name}: both arguments need at least one dim")
    rows_shared = la.segments == lb.segments and la.ragged_dims == lb.ragged_dims and la.rank == lb.rank
    if rows_shared and all(d < la.rank - 2 for d in la.ragged_dims) and la.rank > 2 and la.ragged_dims:
        out = torch.matmul(values_of(a), values_of(b))
        return like(a, out, la.with_static(tuple(out.shape[1:])))
    if la.rank == 1 and lb.rank == 1:
        return torch.sum(a * b, la.shape_dim(0)) if la == lb else _refuse(a, b, name)
    return _grouped(a, b, name)


def _refuse(a: NestedTensor, b: NestedTensor, name: str) -> Any:
    shapes = zip(a._layout.element_shapes(), b._layout.element_shapes())
    i, (sa, sb) = next((i, pair) for i, pair in enumerate(shapes) if pair[0] != pair[1])
    raise RuntimeError(f"{name}: element {i} has sizes {tuple(sa)} and {tuple(sb)}")


def _ragged_of(x: Tensor, rank: int) -> set[int]:
    return {d + rank - x._layout.rank for d in x._layout.ragged_dims} if isinstance(x, NestedTensor) else set()


def _grouped(a: Any, b: Any, name: str) -> Any:
    """One dense product per distinct size pair."""
    first = a if isinstance(a, NestedTensor) else b
    nested = [x for x in (a, b) if isinstance(x, NestedTensor)]
    if len(nested) == 1:
        return _grouped_with_dense(a, b, first)
    ra, rb = a._layout.rank, b._layout.rank
    rank = max(ra, rb, 2)
    ragged_a, ragged_b = _ragged_of(a, rank), _ragged_of(b, rank)
    if ra == 1:
        ragged_a = {rank - 1} if a._layout.ragged_dims else set()
    if rb == 1:
        ragged_b = {rank - 2} if b._layout.ragged_dims else set()
    out = {d for d in ragged_a | ragged_b if d < rank - 2}
    out |= {rank - 2} & ragged_a if ra > 1 else set()
    out |= {rank - 1} & ragged_b if rb > 1 else set()
    dims = sorted(out)
    if ra == 1:
        dims = [d - 1 if d == rank - 1 else d for d in dims]

    def product(x: Tensor, y: Tensor) -> Tensor:
        if x.dim() == 2:
            return torch.matmul(x.unflatten(0, (x.shape[0],) + (1,) * max(y.dim() - 3, 0))[..., None, :], y).squeeze(-2)
        if y.dim() == 2:
            return torch.matmul(x, y.unflatten(0, (y.shape[0],) + (1,) * max(x.dim() - 3, 0))[..., None]).squeeze(-1)
        if x.dim() < y.dim():
            x = x.reshape(x.shape[0], *(1,) * (y.dim() - x.dim()), *x.shape[1:])
        if y.dim() < x.dim():
            y = y.reshape(y.shape[0], *(1,) * (x.dim() - y.dim()), *y.shape[1:])
        return torch.matmul(x, y)

    return run_grouped(product, a, b, ragged=tuple(dims), like=first)


def _grouped_with_dense(a: Any, b: Any, first: NestedTensor) -> Any:
    """A product with a dense operand that meets a ragged contracted dim, or has dims of its own for the batch."""
    layout = first._layout
    dense = b if first is a else a
    if dense.dim() - 1 > layout.rank:
        raise ValueError(f"matmul: a dense operand {tuple(dense.shape)} has more dims than {tuple(layout.shape)}")
    contracted = layout.rank - 1 if first is a else max(layout.rank - 2, 0)
    side = dense.dim() - 2 if first is a else dense.dim() - 1
    padded = layout.shape[layout.shape_dim(contracted)]
    if dense.shape[side] != padded:
        raise ValueError(
            f"matmul: the contracted sizes are {dense.shape[side]} (dense) and {padded} (padded size of the NestedTensor)"
        )
    per_element = dense.dim() == layout.rank + 1 and dense.shape[layout.batch_dim] == layout.batch_size
    ragged = [d for d in layout.ragged_dims if d != contracted]
    if per_element:
        dense = dense.movedim(layout.batch_dim, 0)

    def cut(x: Tensor, size: int) -> Tensor:
        return x.narrow(-2 if first is a else -1, 0, size)

    def product(x: Tensor, *other: Tensor) -> Tensor:
        y = other[0] if other else dense
        if contracted in layout.ragged_dims:
            y = cut(y, x.shape[contracted + 1])
        return torch.matmul(x, y) if first is a else torch.matmul(y, x)

    extra = (dense,) if per_element else ()
    return run_grouped(product, first, *extra, ragged=tuple(ragged), like=first)


@register("linear algebra", "inner")
def inner(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, NestedTensor) and not isinstance(b, NestedTensor):
        return torch.matmul(a, b.mT if b.dim() == 2 else b) if b.dim() <= 2 else _inner_dense(func, a, b)
    if isinstance(a, NestedTensor) and a._layout.rank == 1:
        return torch.matmul(a, b)
    if isinstance(a, NestedTensor):
        return torch.matmul(a, b.mT)
    return torch.matmul(a, b.mT)


def _inner_dense(func: Any, a: NestedTensor, b: Tensor) -> Any:
    out = func(values_of(a), b)
    layout = a._layout
    return like(a, out, layout.with_static(tuple(out.shape[1:])))


@register("linear algebra", "outer")
def outer(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, NestedTensor) and isinstance(b, NestedTensor):
        if a._layout.rank != 1 or b._layout.rank != 1:
            raise RuntimeError("outer: Expected 1-D elements")
        return a.unsqueeze(-1) * b[:, None]
    if isinstance(a, NestedTensor):
        if a._layout.rank != 1 or b.dim() != 1:
            raise RuntimeError("outer: Expected 1-D elements")
        return a.unsqueeze(-1) * b
    return b[:, None] * a[:, None]


@register("linear algebra", "addmm", "addmv", "baddbmm", "addr")
def addmm(func: Any, input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.outer(a, b) if names(func).rstrip("_") == "addr" else torch.matmul(a, b)
    out = product * alpha if alpha != 1 else product
    if beta == 0:
        return out
    return out + (input * beta if beta != 1 else input)


@register("linear algebra", "cosine_similarity")
def cosine_similarity(func: Any, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    n1 = torch.linalg.vector_norm(x1, 2, dim, True).clamp_min(eps)
    n2 = torch.linalg.vector_norm(x2, 2, dim, True).clamp_min(eps)
    return torch.sum((x1 / n1) * (x2 / n2), dim)


@register("linear algebra", "pairwise_distance")
def pairwise_distance(func: Any, x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


@register("linear algebra", "cross", "linalg_cross")
def cross(func: Any, a: Any, b: Any, dim: int | None = None) -> Any:
    from danling.tensors.ops.broadcast import align

    first = a if isinstance(a, NestedTensor) else b
    layout = first._layout
    dim = -1 if dim is None and names(func).startswith("linalg") else dim
    if dim is None:
        d = next((d for d in layout.static_dims if layout.static_sizes[layout.static_dims.index(d)] == 3), None)
    else:
        d = layout.element_dim(dim)
    if d is None or d in layout.ragged_dims:
        raise RuntimeError("cross needs a static dim of size 3")
    common, (va, vb) = align([a, b], "cross")
    out = torch.linalg.cross(va, vb, dim=common.values_dim(d))
    return like(first, out, common.with_static(tuple(out.shape[1:])))


@register("linear algebra", "chain_matmul", "linalg_multi_dot")
def multi_dot(func: Any, *tensors: Any) -> Any:
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    out = tensors[0]
    for other in tensors[1:]:
        out = torch.matmul(out, other)
    return out
