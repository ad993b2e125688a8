"""Shape ops that repeat, reorder or cut rows: repeat, flip, roll, narrow, unfold, pad and their kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like, names
from danling.tensors.ops.rows import flat_values, from_flat, remap_ragged, take_elements
from danling.tensors.ops.shape import ints_of
from danling.tensors.ops.table import register


def _along(x: NestedTensor, dim: int) -> tuple[str, int]:
    """Whether a dim of `.shape` is `"batch"`, `"static"` (and its dim of values) or `"ragged"` (and its number)."""
    d = x._layout.element_dim(dim)
    if d is None:
        return "batch", 0
    if d in x._layout.ragged_dims:
        return "ragged", x._layout.ragged_dims.index(d)
    return "static", x._layout.values_dim(d)


def _column(x: NestedTensor, j: int) -> Tensor:
    return x._layout.segments.sizes[:, j]


def like_static(x: NestedTensor, out: Tensor) -> NestedTensor:
    """Values of the same rows with other static sizes."""
    return like(x, out, x._layout.with_static(tuple(out.shape[1:])))


@register("shape", "repeat", "tile")
def repeat(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    counts = ints_of((kwargs.get("repeats", kwargs.get("dims")),) if kwargs else args)
    ndim = x._layout.rank + 1
    if len(counts) < ndim:
        if names(func) == "repeat":
            raise RuntimeError(
                "Number of dimensions of repeat dims can not be smaller than number of dimensions of tensor"
            )
        counts = [1] * (ndim - len(counts)) + counts
    if len(counts) > ndim:
        raise ValueError(f"{names(func)}: {counts} would add dims before the batch")
    for dim, count in enumerate(counts):
        if count == 1:
            continue
        kind, at = _along(x, dim)
        if kind == "batch":
            x = take_elements(x, list(range(len(x))) * count)
        elif kind == "static":
            x = like_static(x, values_of(x).repeat([count if v == at else 1 for v in range(x._values.dim())]))
        else:
            x = remap_ragged(x, at, _column(x, at) * count, lambda c, size: c % size)
    return x


@register("shape", "repeat_interleave")
def repeat_interleave(func: Any, x: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Any:
    if dim is None:
        return func(flat_values(x), repeats)
    kind, at = _along(x, dim)
    if kind == "batch":
        counts = [repeats] * len(x) if isinstance(repeats, int) else torch.as_tensor(repeats).expand(len(x)).tolist()
        return take_elements(x, [i for i, n in enumerate(counts) for _ in range(n)])
    if kind == "static":
        return like_static(x, func(values_of(x), repeats, at))
    if not isinstance(repeats, int):
        if isinstance(repeats, Tensor) and repeats.numel() == 1:
            repeats = int(repeats)
        else:
            raise ValueError("repeat_interleave along a ragged dim takes one number of repeats")
    return remap_ragged(x, at, _column(x, at) * repeats, lambda c, size: c // repeats)


@register("shape", "flip", "fliplr", "flipud")
def flip(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = names(func)
    if name == "fliplr":
        dims = [1]
    elif name == "flipud":
        dims = [0]
    else:
        dims = ints_of((kwargs["dims"],) if "dims" in kwargs else args)
    for dim in dims:
        kind, at = _along(x, dim)
        if kind == "batch":
            x = take_elements(x, list(range(len(x)))[::-1])
        elif kind == "static":
            x = like(x, values_of(x).flip(at))
        else:
            x = remap_ragged(x, at, _column(x, at), lambda c, size: size - 1 - c)
    return x


@register("shape", "roll")
def roll(func: Any, x: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return from_flat(flat_values(x).roll(shifts), x._layout, x._flags)
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    for shift, dim in zip(shifts, dims, strict=True):
        kind, at = _along(x, dim)
        if kind == "batch":
            n = len(x)
            x = take_elements(x, [(i - shift) % n for i in range(n)])
        elif kind == "static":
            x = like(x, values_of(x).roll(shift, at))
        else:
            x = remap_ragged(x, at, _column(x, at), lambda c, size, s=shift: (c - s) % size)  # type: ignore[misc]
    return x


@register("shape", "rot90")
def rot90(func: Any, x: Any, k: int = 1, dims: Any = (0, 1)) -> Any:
    a, b = dims
    turns = k % 4
    if turns == 1:
        return torch.flip(x, [b]).transpose(a, b)
    if turns == 2:
        return torch.flip(x, [a, b])
    if turns == 3:
        return torch.flip(x.transpose(a, b), [b])
    return x.clone()


@register("shape", "narrow")
def narrow(func: Any, x: Any, dim: int, start: Any, length: int) -> Any:
    start = int(start)
    kind, at = _along(x, dim)
    if kind == "batch":
        begin = start + len(x) if start < 0 else start
        if not 0 <= begin <= begin + length <= len(x):
            raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({len(x)})")
        return take_elements(x, list(range(begin, begin + length)))
    if kind == "static":
        return like_static(x, values_of(x).narrow(at, start, length))
    if x._layout.segments.symbolic and isinstance(length, int):
        from danling.tensors.ops.indexing import traced_positions

        return traced_positions(x, x._layout.ragged_dims[at], list(range(start, start + length)))
    column = _column(x, at)
    begin_ = column + start if start < 0 else torch.full_like(column, start)
    wrong = (begin_ < 0) | (begin_ + length > column) | torch.tensor(length < 0, device="cpu")
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise RuntimeError(f"narrow: element {i} of size {int(column[i])} has no range of {length} from {start}")
    out = remap_ragged(
        x, at, torch.full_like(column, length), lambda c, size: c + (size + start if start < 0 else start)
    )
    return fixed_ragged(out, at, length)


def fixed_ragged(x: NestedTensor, j: int, size: int) -> Any:
    """A ragged dim that got one size from an argument becomes static; dense when it was the last ragged one."""
    layout = x._layout
    d = layout.ragged_dims[j]
    values = values_of(x)
    if layout.segments.k == 1:
        out = values.reshape(layout.batch_size, size, *layout.static_sizes)
        return out.movedim(1, d + 1)
    # The dim moves from the rows to the static dims: bring it last among the ragged ones first.
    from danling.tensors.ops.groups import group_rows

    groups = group_rows(layout, False, (j,))
    rows = groups.sort(values)
    assert groups.segments is not None
    out = rows.reshape(groups.count, size, *layout.static_sizes)
    place = sum(e < d for e in layout.static_dims)
    out = out.movedim(1, 1 + place)
    ragged = tuple(r for r in layout.ragged_dims if r != d)
    return like(x, out, Layout(groups.segments, ragged, tuple(out.shape[1:]), layout.batch_first))


@register("shape", "diff")
def diff(func: Any, x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    parts = [p for p in (prepend, x, append) if p is not None]
    if len(parts) > 1:
        x = torch.cat(parts, dim)
    d = x._layout.element_dim(dim)
    if d is None:
        raise ValueError("diff along the batch dim would read padding; use .tensor")
    head = (slice(None),) * (d + 1)
    for _ in range(n):
        late, early = x[(*head, slice(1, None))], x[(*head, slice(None, -1))]
        x = torch.logical_xor(late, early) if x.dtype == torch.bool else late - early
    return x


@register("shape", "unfold")
def unfold(func: Any, x: Any, dimension: int, size: int, step: int) -> Any:
    kind, at = _along(x, dimension)
    if kind == "batch":
        raise ValueError("unfold along the batch dim would read padding; use .tensor")
    layout = x._layout
    if kind == "static":
        out = values_of(x).unfold(at, size, step)
        return like(x, out, layout.with_dims(layout.ragged_dims, tuple(out.shape[1:])))
    column = _column(x, at)
    if bool((column < size).any()):
        i = int((column < size).nonzero()[0])
        raise RuntimeError(f"unfold: element {i} of size {int(column[i])} is smaller than the window of {size}")
    windows = (column - size) // step + 1
    parts = [remap_ragged(x, at, windows, lambda c, _, o=offset: c * step + o) for offset in range(size)]  # type: ignore[misc]
    values = torch.stack([values_of(p) for p in parts], -1)
    first = parts[0]._layout
    return like(x, values, first.with_dims(first.ragged_dims, (*first.static_sizes, size)))


@register("shape", "pad", "constant_pad_nd")
def pad(func: Any, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode != "constant":
        from danling.tensors.ops.grouped import run_grouped

        layout = x._layout
        return run_grouped(lambda v: func(v, pad, mode, value), x, ragged=layout.ragged_dims, like=x)
    value = 0 if value is None else value
    for j in range(len(pad) // 2):
        before, after = pad[2 * j], pad[2 * j + 1]
        if before == 0 and after == 0:
            continue
        dim = x._layout.rank - j
        kind, at = _along(x, dim)
        if kind == "batch":
            raise ValueError("pad along the batch dim is not possible; use torch.cat")
        if kind == "static":
            sizes = [0] * (2 * x._values.dim())
            sizes[2 * (x._values.dim() - 1 - at)], sizes[2 * (x._values.dim() - 1 - at) + 1] = before, after
            x = like_static(x, torch.nn.functional.pad(values_of(x), sizes, "constant", value))
        else:
            counts = _column(x, at) + before + after
            if bool((counts < 0).any()):
                i = int((counts < 0).nonzero()[0])
                raise RuntimeError(f"pad: element {i} of size {int(_column(x, at)[i])} would get a negative size")
            x = remap_ragged(x, at, counts, lambda c, _, b=before: c - b, fill=value)  # type: ignore[misc]
    return x
