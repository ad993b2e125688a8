"""Batched matrix functions: packed when the matrix dims are static, one call per distinct size when they are ragged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import first_nested, names
from danling.tensors.ops.broadcast import expand_dense
from danling.tensors.ops.grouped import run_grouped
from danling.tensors.ops.table import find, register

# Functions of one matrix or several: how many trailing dims each operand's matrix has.
_MATRICES = """det logdet slogdet inverse cholesky cholesky_inverse cholesky_solve triangular_solve qr geqrf orgqr ormqr svd
pinverse matrix_exp matrix_power lu_solve lu_unpack frobenius_norm nuclear_norm"""
_LINALG = """cholesky cholesky_ex cond det eig eigh eigvals eigvalsh householder_product inv inv_ex ldl_factor
ldl_factor_ex ldl_solve lu lu_factor lu_factor_ex lu_solve matrix_exp matrix_power matrix_rank pinv qr slogdet solve
solve_ex solve_triangular svd svdvals"""
_VECTORS = {"orgqr": (2, 1), "ormqr": (2, 1, 2), "linalg_householder_product": (2, 1), "linalg_lu_solve": (2, 1, 2)}
_VECTORS |= {"lu_solve": (2, 2, 1), "lu_unpack": (2, 1), "linalg_ldl_solve": (2, 1, 2)}


def _names() -> list[str]:
    listed = _MATRICES.split() + [f"linalg_{name}" for name in _LINALG.split()]
    return [name for name in listed if name not in ("frobenius_norm", "nuclear_norm") and find(name)]


def _canonical(func: Any) -> str:
    name = func.__name__
    return name if name.startswith("linalg_") or getattr(func, "__module__", "") != "torch.linalg" else f"linalg_{name}"


@register("matrices", *_names())
def matrix_function(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Whatever torch computes for a batch of matrices in the last two dims of `.shape`.

    With ragged matrix dims all matrix dims of the results are ragged, so a result without any is dense `(B, ...)`.
    """
    slots: list[tuple[Any, Any]] = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    slots += [(key, a) for key, a in kwargs.items() if isinstance(a, Tensor)]
    like = first_nested(*(a for _, a in slots))
    widths = _VECTORS.get(_canonical(func), ())
    trailing = [widths[j] if j < len(widths) else 2 for j in range(len(slots))]
    _check_batch(func, like._layout)
    for (_, operand), width in zip(slots, trailing):
        if isinstance(operand, NestedTensor):
            _check_operand(func, operand._layout, like._layout, width)
    ragged_matrix = any(
        isinstance(a, NestedTensor) and any(d >= a._layout.rank - width for d in a._layout.ragged_dims)
        for (_, a), width in zip(slots, trailing)
    )

    def call(*operands: Tensor) -> Any:
        new_args, new_kwargs = list(args), dict(kwargs)
        for (slot, _), value in zip(slots, operands):
            if isinstance(slot, int):
                new_args[slot] = value
            else:
                new_kwargs[slot] = value
        return func(*new_args, **new_kwargs)

    if ragged_matrix:
        return _by_size(func, call, [a for _, a in slots], trailing, like)
    lead = like._layout.rank - trailing[[a is like for _, a in slots].index(True)]
    values = []
    for (_, operand), width in zip(slots, trailing):
        if isinstance(operand, NestedTensor):
            values.append(values_of(operand))
        elif operand.dim() > width:
            tail = tuple(operand.shape[operand.dim() - width :])
            layout = _matrix_layout(like._layout, lead, tail)
            values.append(expand_dense(operand, layout, names(func)))
        else:
            values.append(operand)
    return _wrap(call(*values), like, lead)


def _wrap(out: Any, like: NestedTensor, lead: int) -> Any:
    if isinstance(out, Tensor):
        return wrap(out, _matrix_layout(like._layout, None, tuple(out.shape[1:])), like._flags)
    if isinstance(out, (tuple, list)):
        parts = [_wrap(o, like, lead) for o in out]
        return type(out)(parts)  # type: ignore[call-arg]
    return out


def _matrix_layout(layout: Layout, lead: int | None, tail: tuple[int, ...]) -> Layout:
    """The layout with other static sizes: all of them, or those after the first `lead` element dims."""
    if lead is not None:
        kept = tuple(s for d, s in zip(layout.static_dims, layout.static_sizes) if d < lead)
        tail = kept + tail
    return layout.with_dims(layout.ragged_dims, tail)


def _check_batch(func: Any, layout: Layout) -> None:
    if not layout.batch_first and layout.rank < 3:
        raise ValueError(
            f"{names(func)}: the batch is among the last two dims of {tuple(layout.shape)}, which hold the matrix; "
            "use transpose(0, 1)"
        )


def _check_operand(func: Any, layout: Layout, first: Layout, width: int) -> None:
    if layout.rank < width:
        raise ValueError(f"{names(func)}: elements of rank {layout.rank} hold no operand with {width} dims")
    if layout.batch_size != first.batch_size:
        raise ValueError(f"{names(func)} got NestedTensors of batch size {first.batch_size} and {layout.batch_size}")


def _by_size(func: Any, call: Any, operands: list[Tensor], trailing: list[int], like: NestedTensor) -> Any:
    lead = like._layout.rank - trailing[[a is like for a in operands].index(True)]
    leading = tuple(d for d in like._layout.ragged_dims if d < lead)
    # Dense operands without a batch of their own are the same for every element.
    shared = {j: a for j, a in enumerate(operands) if not isinstance(a, NestedTensor) and a.dim() <= trailing[j]}
    varying = [j for j in range(len(operands)) if j not in shared]
    results: list[tuple[Any, list[tuple[int, ...]]]] = []

    def run(*dense: Tensor) -> Any:
        if like._layout.batch_size == 0:
            dense = tuple(_solvable(value, trailing[j]) for j, value in zip(varying, dense))
        merged = [shared.get(j) for j in range(len(operands))]
        for j, value in zip(varying, dense):
            merged[j] = value
        out = call(*merged)
        flat = list(out) if isinstance(out, (tuple, list)) else [out]
        results.append((out, [tuple(range(lead, t.dim() - 1)) for t in flat]))
        return tuple(flat)

    class _Ragged:
        """Ragged dims of the results, known once the first group has run."""

        def __getitem__(self, j: int) -> tuple[int, ...]:
            return leading + results[0][1][j]

        def __iter__(self) -> Any:
            return (leading + dims for dims in results[0][1])

    out = run_grouped(run, *(operands[j] for j in varying), ragged=_Ragged(), like=like)
    shape_of = results[0][0]
    if isinstance(shape_of, Tensor):
        return out[0]
    return type(shape_of)(out) if isinstance(shape_of, (tuple, list)) else out


def _solvable(probe: Tensor, width: int) -> Tensor:
    """Made-up operands that no factorisation refuses, to learn the sizes of an empty batch's result."""
    if width == 1:
        return torch.ones_like(probe)
    return torch.eye(*probe.shape[-2:], dtype=probe.dtype, device=probe.device).expand_as(probe)


def _norm(name: str) -> Any:
    order = {"frobenius_norm": "fro", "nuclear_norm": "nuc"}[name]

    def rule(func: Any, input: NestedTensor, dim: Any = (-2, -1), keepdim: bool = False) -> Any:
        return torch.linalg.matrix_norm(input, order, tuple(dim), keepdim)

    rule.__doc__ = f"The {order} norm of matrices, as `torch.linalg.matrix_norm`."
    return rule


for _name in ("frobenius_norm", "nuclear_norm"):
    register("matrices", _name)(_norm(_name))
