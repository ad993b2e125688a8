"""einsum and the products that reduce to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import names, same_batch
from danling.tensors.ops.grouped import run_grouped
from danling.tensors.ops.table import register

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _labels(equation: str, operands: list[Tensor]) -> tuple[list[str], str]:
    """Labels of each operand and the output, without `...`."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise RuntimeError(f"einsum: {equation!r} has {len(terms)} operands, {len(operands)} were given")
    used = set(equation)
    free = [c for c in _LETTERS if c not in used]
    widths = [x.dim() - len(term.replace("...", "")) if "..." in term else 0 for term, x in zip(terms, operands)]
    widest = max(widths, default=0)
    dots = "".join(free[:widest])
    full = []
    for term, width, x in zip(terms, widths, operands):
        term = term.replace("...", dots[widest - width :]) if "..." in term else term
        if len(term) != x.dim():
            raise RuntimeError(f"einsum: {term!r} names {len(term)} dims, the operand has {x.dim()}")
        full.append(term)
    if not arrow:
        joined = "".join(full)
        right = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in dots))
    else:
        right = right.replace("...", dots)
    return full, right


@register("linear algebra", "einsum", path="grouped")
def einsum(func: Any, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise ValueError("einsum with NestedTensors takes an equation string")
    xs = list(operands)
    terms, out = _labels(equation, xs)
    while len(xs) > 2:  # fold from the left, keeping what later terms need
        later = set("".join(terms[2:])) | set(out)
        middle = "".join(dict.fromkeys(c for c in terms[0] + terms[1] if c in later))
        batch = next((_batch_label(x, t) for x, t in zip(xs[:2], terms[:2]) if isinstance(x, NestedTensor)), "")
        middle = batch + middle.replace(batch, "") if batch else middle
        joined = torch.einsum(f"{terms[0]},{terms[1]}->{middle}", xs[0], xs[1])
        xs, terms = [joined, *xs[2:]], [middle, *terms[2:]]
    return _contract(xs, terms, out)


def _batch_label(x: NestedTensor, term: str) -> str:
    return term[x._layout.batch_dim]


def _contract(xs: list[Any], terms: list[str], out: str) -> Any:
    nested = [(x, t) for x, t in zip(xs, terms) if isinstance(x, NestedTensor)]
    if not nested:
        return torch.einsum(f"{','.join(terms)}->{out}", *xs)
    first, first_term = nested[0]
    batch = _batch_label(first, first_term)
    for x, t in nested[1:]:
        same_batch(torch.einsum, first, x)
        if _batch_label(x, t) != batch:
            raise ValueError(
                f"einsum: the batch is called {batch!r} in one operand and {_batch_label(x, t)!r} in another"
            )
    ragged = {t[x._layout.shape_dim(d)] for x, t in nested for d in x._layout.ragged_dims}
    place = out.find(batch)
    if place > 1:
        raise ValueError(f"einsum: the batch {batch!r} can be at index 0 or 1 of the output, not {place}")
    packed = _packed(xs, terms, out, batch, ragged)
    if packed is not None:
        return packed
    return _by_group(xs, terms, out, batch, ragged, first)


def _packed(xs: list[Any], terms: list[str], out: str, batch: str, ragged: set[str]) -> Any:
    """One nested operand and a dense one that shares only static labels: one einsum on values."""
    index = [i for i, x in enumerate(xs) if isinstance(x, NestedTensor)]
    if len(index) != 1:
        layouts = [xs[i]._layout for i in index]
        same = all(la.segments == layouts[0].segments for la in layouts)
        labels = [[t[la.shape_dim(d)] for d in la.ragged_dims] for la, t in zip(layouts, (terms[i] for i in index))]
        if not same or any(lab != labels[0] for lab in labels) or len(set(labels[0])) != len(labels[0]):
            return None
    x, term = xs[index[0]], terms[index[0]]
    layout = x._layout
    own = [term[layout.shape_dim(d)] for d in layout.ragged_dims]
    if len(set(term)) != len(term) or not own:
        return None
    for i, t in enumerate(terms):
        if i not in index and (batch in t or any(r in t for r in own)):
            return None
    kept = [r for r in own if r in out]
    if kept and kept != own or (kept and batch not in out):
        return None
    row = next(c for c in _LETTERS if c not in "".join(terms) + out)
    new_terms = []
    values = []
    for i, (y, t) in enumerate(zip(xs, terms)):
        if i in index:
            lay = y._layout
            new_terms.append(row + "".join(t[lay.shape_dim(d)] for d in lay.static_dims))
            values.append(values_of(y))
        else:
            new_terms.append(t)
            values.append(y)
    static_out = "".join(c for c in out if c != batch and c not in own)
    if kept:
        order = [c for c in out if c != batch]
        if [c for c in order if c in own] != own:
            return None
        result = torch.einsum(f"{','.join(new_terms)}->{row}{static_out}", *values)
        dims = tuple(order.index(r) for r in own)
        target = layout.with_dims(dims, tuple(result.shape[1:]))
        first = out.find(batch) == 0
        if target.batch_first != first:
            target = target.replace(batch_first=first)
        from danling.tensors.ops.base import like

        return like(x, result, target)
    if len(index) == 1 and batch not in out:
        return torch.einsum(f"{','.join(new_terms)}->{static_out}", *values)
    if len(index) == 1:  # sum over the element's rows afterwards
        result = torch.einsum(f"{','.join(new_terms)}->{row}{static_out}", *values)
        result = kernels.segment_sum(result, layout.segments.on("offsets", result.device))
        return torch.einsum(f"{batch}{static_out}->{out}", result)
    if batch not in out:
        return torch.einsum(f"{','.join(new_terms)}->{static_out}", *values)
    if len(terms) == 2 and set(new_terms[0]) == set(new_terms[1]) and set(static_out) == set(new_terms[0][1:]):
        result = torch.einsum(f"{','.join(new_terms)}->{row}{static_out}", *values)
        result = kernels.segment_sum(result, layout.segments.on("offsets", result.device))
        return torch.einsum(f"{batch}{static_out}->{out}", result)
    return None  # row by row products would be larger than the operands


def _by_group(xs: list[Any], terms: list[str], out: str, batch: str, ragged: set[str], first: NestedTensor) -> Any:
    """One dense einsum per group of equal sizes."""
    static: list[Any] = []
    grouped: list[Any] = []
    grouped_terms: list[str] = []
    cut: list[tuple[Tensor, str]] = []
    for x, t in zip(xs, terms):
        if isinstance(x, NestedTensor):
            grouped.append(x)
            grouped_terms.append(batch + t.replace(batch, ""))
        elif batch in t:
            grouped.append(x.movedim(t.index(batch), 0))
            grouped_terms.append(batch + t.replace(batch, ""))
        else:
            cut.append((x, t))
            static.append(None)
    where = {
        r: (i, t.index(r))
        for i, t in enumerate(grouped_terms)
        for r in t
        if r in ragged and isinstance(grouped[i], NestedTensor)
    }
    has_batch = batch in out
    target = out if has_batch else batch + out
    element = target.replace(batch, "")
    order = batch + element
    dims = tuple(i for i, c in enumerate(element) if c in ragged)

    def run(*dense: Tensor) -> Tensor:
        sizes = {r: dense[i].shape[d] for r, (i, d) in where.items()}

        def fit(x: Tensor, t: str) -> Tensor:
            for d, c in enumerate(t):
                if c in sizes and x.shape[d] > sizes[c]:
                    x = x.narrow(d, 0, sizes[c])
            return x

        operands = [fit(x, t) for x, t in zip(dense, grouped_terms)] + [fit(x, t) for x, t in cut]
        names_ = [*grouped_terms, *(t for _, t in cut)]
        return torch.einsum(f"{','.join(names_)}->{order}", *operands)

    result = run_grouped(run, *grouped, ragged=dims, like=first)
    if not has_batch:
        return torch.sum(result, result._layout.batch_dim if isinstance(result, NestedTensor) else 0)
    place = out.find(batch)
    if isinstance(result, NestedTensor):
        if result._layout.batch_dim != place:
            result.batch_first = place == 0
        return result
    return result.movedim(0, place)


@register("linear algebra", "tensordot", path="grouped")
def tensordot(func: Any, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    if isinstance(dims, int):
        left, right = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        left, right = [d % a.dim() for d in dims[0]], [d % b.dim() for d in dims[1]]
    la = list(_LETTERS[: a.dim()])
    lb = list(_LETTERS[a.dim() : a.dim() + b.dim()])
    for i, j in zip(left, right, strict=True):
        lb[j] = la[i]
    kept = [c for i, c in enumerate(la) if i not in left] + [c for j, c in enumerate(lb) if j not in right]
    return torch.einsum(f"{''.join(la)},{''.join(lb)}->{''.join(kept)}", a, b)


@register("linear algebra", "addbmm")
def addbmm(func: Any, input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.einsum("bnm,bmp->np", a, b) if isinstance(a, NestedTensor) else torch.sum(torch.matmul(a, b), 0)
    return product * alpha + (input * beta if beta else 0)


@register("linear algebra", "kron", path="grouped")
def kron(func: Any, a: Any, b: Any) -> Any:
    first = a if isinstance(a, NestedTensor) else b
    nested = [x for x in (a, b) if isinstance(x, NestedTensor)]
    rank = max(x._layout.rank if isinstance(x, NestedTensor) else x.dim() for x in (a, b))
    ragged = sorted({d + rank - x._layout.rank for x in nested for d in x._layout.ragged_dims})

    def run(*dense: Tensor) -> Tensor:
        pieces = iter(dense)
        both = [next(pieces) if isinstance(x, NestedTensor) else x.expand(dense[0].shape[0], *x.shape) for x in (a, b)]
        return torch.stack([torch.kron(x, y) for x, y in zip(*both)])

    return run_grouped(run, *nested, ragged=tuple(ragged), like=first)


@register("linear algebra", "cdist", path="grouped")
def cdist(func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    first = a if isinstance(a, NestedTensor) else b
    nested = [x for x in (a, b) if isinstance(x, NestedTensor)]
    for x in nested:
        if x._layout.rank < 2 or x._layout.rank - 1 in x._layout.ragged_dims:
            raise ValueError(f"{names(func)} needs elements (..., P, M) with a static last dim")
    dims = set()
    rank = max(x._layout.rank for x in nested)
    for x, last in ((a, rank - 2), (b, rank - 1)):
        if isinstance(x, NestedTensor):
            own = x._layout.rank
            for d in x._layout.ragged_dims:
                dims.add(last if d == own - 2 else d + rank - own)
    dense_batch = [
        x if isinstance(x, NestedTensor) or x.dim() == rank + 1 and x.shape[0] == len(first) else None for x in (a, b)
    ]

    def run(*dense: Tensor) -> Tensor:
        pieces = iter(dense)
        both = [next(pieces) if d is not None else x for d, x in zip(dense_batch, (a, b))]
        return func(both[0], both[1], *args, **kwargs)

    return run_grouped(run, *(x for x in dense_batch if x is not None), ragged=tuple(sorted(dims)), like=first)
