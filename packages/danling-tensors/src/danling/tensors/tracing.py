"""What `torch.compile` and fake tensors see of a NestedTensor.

To torch's tracers a NestedTensor is its packed values plus one int64 tensor of row offsets: `__tensor_flatten__` names these
two (and the sizes, with several ragged dims), and only which dims are ragged and the flags are constants. Row count, batch
size and longest length are symbolic ints, read from the shapes of those tensors and from the padded `.shape`, so no list of
lengths is ever guarded; what needs the lengths themselves raises `LengthsError`. Inside a trace every rule of the op table
runs as it is, on fake tensors, with a `TracedSegments` in its layout that builds index maps by torch operations on the
offsets. A traced NestedTensor is a wrapper that shares no memory with its values, so the two are joined in the autograd
graph by a pair of functions, `_Join` and the `_Read` that eager mode uses as well. Structures that are not known to be equal
because they came from different offsets are compared when the compiled code runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from danling.tensors.layout import Layout, LengthsError, Segments, is_traced, require
from danling.tensors.nested_tensor import Flags, NestedTensor, _Read, values_of, wrap

_INT64 = torch.int64


class TracedSegments(Segments):
    """Ragged sizes known by their offsets alone: symbolic in a trace, read on demand outside of one.

    Args:
        offsets: `(B+1,)` int64 on the device of the values.
        sizes: `(B, k)` int64 beside it, for `k > 1`.
        batch_size: `B`.
        rows: Number of rows.
        max_sizes: Largest size of each ragged dim; given, because reading it would take the lengths.
    """

    __slots__ = ()

    def __init__(
        self, offsets: Tensor, sizes: Tensor | None, batch_size: Any, rows: Any, max_sizes: tuple[Any, ...]
    ) -> None:
        self._sizes = None
        self._offsets = None
        self._table = None
        self._hash = None
        self.batch_size, self.k, self.rows, self.max_sizes = batch_size, len(max_sizes), rows, max_sizes
        self._cache = {"source": offsets, ("offsets", offsets.device, _INT64): offsets}
        if sizes is not None:
            self._cache[("sizes", offsets.device, _INT64)] = sizes

    @property
    def source(self) -> Tensor:
        """The offsets that stand for these segments."""
        return self._cache["source"]

    @property
    def symbolic(self) -> bool:  # type: ignore[override]
        """Whether the lengths are unknown because a graph is being traced."""
        return is_traced(self.source)

    @property
    def sizes(self) -> Tensor:
        """`(B, k)` int64, on the CPU unless traced."""
        if self._sizes is None:
            sizes = self.on("sizes", self.source.device)
            self._sizes = sizes if self.symbolic else sizes.cpu()
        return self._sizes

    @property
    def offsets(self) -> Tensor:
        """`(B+1,)` int64, on the CPU unless traced."""
        if self._offsets is None:
            self._offsets = self.source if self.symbolic else self.source.cpu()
        return self._offsets

    @property
    def table(self) -> list[int]:
        """All sizes as one flat list.

        Raises:
            LengthsError: A graph is being traced.
        """
        if self._table is None:
            if self.symbolic:
                raise LengthsError
            self._table = self.sizes.flatten().tolist()
        return self._table

    def on(self, name: Any, device: torch.device, dtype: torch.dtype = _INT64) -> Tensor:
        """See `Segments.on`."""
        if not self.symbolic:
            return super().on(name, device, dtype)
        key = (name, device, dtype)
        found = self._cache.get(key)
        if found is None:
            with torch.no_grad():
                found = self._cache[key] = self._build(name, device).to(dtype)
        return found

    def _build(self, name: Any, device: torch.device) -> Tensor:
        own = self.source.device
        if device != own:
            return self.on(name, own).to(device)
        if name == "sizes":
            return self.on("lengths", device)[:, None]
        return super()._build(name, device)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Segments):
            return NotImplemented
        if self.k != other.k or self.batch_size != other.batch_size or self.rows != other.rows:
            return False
        mine, theirs = self.source, other.on("offsets", self.source.device)
        if mine is theirs:
            return True
        if not (is_traced(mine) or is_traced(theirs)):
            return self.table == other.table
        same = (mine == theirs).all()
        if self.k > 1:
            same = same & (self.on("sizes", mine.device) == other.on("sizes", mine.device)).all()
        require(same, "NestedTensors combined in compiled code have different lengths")
        return True

    def __hash__(self) -> int:
        return id(self) if self.symbolic else super().__hash__()

    def __reduce__(self) -> Any:
        return Segments, (self.sizes,)


def uniform(batch_size: Any, length: Any, device: torch.device) -> TracedSegments:
    """Segments of equal length, of symbolic ints."""
    out = TracedSegments(
        torch.arange(batch_size + 1, device=device) * length, None, batch_size, batch_size * length, (length,)
    )
    out._cache["uniform"] = True
    return out


def listed(table: Sequence[Sequence[Any]], k: int, device: torch.device) -> TracedSegments:
    """Segments from the `k` sizes of each element, which may be symbolic ints."""
    bounds: list[Any] = [0]
    longest: list[Any] = [0] * k
    for sizes in table:
        bounds.append(bounds[-1] + math.prod(sizes))
        longest = [torch.sym_max(top, n) for top, n in zip(longest, sizes)]

    def tensor(numbers: list[Any]) -> Tensor:
        if not numbers:
            return torch.empty(0, dtype=_INT64, device=device)
        return torch.stack([torch.full((), n, dtype=_INT64, device=device) for n in numbers])

    own = tensor([n for sizes in table for n in sizes]).view(len(table), k) if k > 1 else None
    return TracedSegments(tensor(bounds), own, len(table), bounds[-1], tuple(longest))


def one_after_another(parts: list[Segments], device: torch.device) -> TracedSegments:
    """The elements of all parts, part after part."""
    offsets, rows, batch, longest = [parts[0].on("offsets", device)], parts[0].rows, parts[0].batch_size, parts[0]
    top = longest.max_sizes[0]
    if any(p.k != 1 for p in parts):
        raise LengthsError
    for p in parts[1:]:
        offsets.append(p.on("offsets", device)[1:] + rows)
        rows, batch, top = rows + p.rows, batch + p.batch_size, torch.sym_max(top, p.max_sizes[0])
    return TracedSegments(torch.cat(offsets), None, batch, rows, (top,))


def added(parts: list[Segments], device: torch.device) -> TracedSegments:
    """Element by element the sum of the lengths of all parts, of which at most one may vary."""
    if any(p.k != 1 for p in parts) or sum("uniform" not in p._cache for p in parts) > 1:
        raise LengthsError
    offsets = sum(p.on("offsets", device) for p in parts)
    longest = sum(p.max_sizes[0] for p in parts)
    return TracedSegments(offsets, None, parts[0].batch_size, sum(p.rows for p in parts), (longest,))  # type: ignore[arg-type]


def segments_of(offsets: Tensor) -> Segments:
    """The segments of real offsets, with all their index maps where they have been in use already."""
    found = getattr(offsets, "_danling_segments", None)
    if found is None:
        sizes = (offsets[1:] - offsets[:-1]).cpu()[:, None]
        found = offsets._danling_segments = Segments(sizes)  # type: ignore[attr-defined]
    return found


def bare(values: Tensor, layout: Layout, flags: Flags) -> NestedTensor:
    """A traced NestedTensor that is not part of the autograd graph."""
    with torch.no_grad():
        out = Tensor._make_wrapper_subclass(
            NestedTensor,
            values.size(),
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
        )
    out._values, out._layout, out._flags = values, layout, flags
    return out


class _Join(torch.autograd.Function):
    """Values to the NestedTensor over them; the gradient comes back as a NestedTensor, or packed already."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout, flags: Flags) -> NestedTensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        return bare(values.detach(), layout, flags)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        return (values_of(grad) if isinstance(grad, NestedTensor) else grad), None, None


def join(values: Tensor, layout: Layout, flags: Flags) -> NestedTensor:
    """What `wrap` does with the tensors of a tracer."""
    if not (values.requires_grad and torch.is_grad_enabled()):
        return bare(values, layout, flags)
    out = _Join.apply(values, layout, flags)
    out._values = values
    return out


def packed(x: NestedTensor) -> Tensor:
    """The values outside the autograd graph: in a trace the NestedTensor alone is part of it."""
    values = x._values
    if is_traced(values) or not values.requires_grad:
        return values
    kept = x.__dict__.get("_kept")  # guards refer to the very tensor
    if kept is None or kept[0] is not values:
        kept = x._kept = values, values.detach()  # type: ignore[attr-defined]
    return kept[1]


def flatten(x: NestedTensor) -> tuple[list[str], Any]:
    """Names of the tensors inside, and what is constant about them."""
    layout, flags = x._layout, x._flags
    fill = "nan" if flags[0] != flags[0] else flags[0]  # NaN would not equal itself, and compile anew each time
    k = len(layout.ragged_dims)
    for tensor in (x._packed, x._row_offsets) if k else (x._packed,):
        tensor._dynamo_propagated_dynamic_indices = {0}  # type: ignore[attr-defined]
    if k and not is_traced(x._row_offsets):
        x._row_offsets._danling_segments = layout.segments  # type: ignore[attr-defined]
    names = ["_packed", "_row_offsets", "_row_sizes"] if k > 1 else ["_packed", "_row_offsets"] if k else ["_packed"]
    return Inner(names), (layout.ragged_dims, layout.batch_first, fill, type(fill), flags[1])


class Inner(list):
    """Names of inner tensors; members that are tensors made of them count as such when a trace asks for one."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in ("tensor", "mask", "concat", "lengths")


def unflatten(inner: dict[str, Tensor], constants: Any, outer_size: Any, outer_stride: Any) -> NestedTensor:
    """The inverse of `flatten`, in a trace and when compiled code returns."""
    ragged_dims, batch_first, fill, kind, mask_value = constants
    values = inner["_packed"]
    flags = (float("nan") if fill == "nan" else fill), mask_value
    batch_dim = 0 if batch_first or len(outer_size) == 1 else 1
    batch = outer_size[batch_dim]
    static = tuple(values.shape[1:])
    if not ragged_dims:
        segments: Segments = Segments(torch.empty(batch, 0, dtype=_INT64)) if not is_traced(values) else fixed(values)
    else:
        element = [size for d, size in enumerate(outer_size) if d != batch_dim]
        offsets = inner["_row_offsets"]
        if is_traced(offsets) and offsets.shape[0] != batch + 1:  # tells the tracer so
            raise ValueError(f"offsets of shape {tuple(offsets.shape)} do not belong to a batch of {batch}")
        found = getattr(offsets, "_danling_segments", None)
        if found is not None and not is_traced(offsets):
            segments = found
        else:
            segments = TracedSegments(
                offsets, inner.get("_row_sizes"), batch, values.shape[0], tuple(element[d] for d in ragged_dims)
            )
    layout = Layout(segments, ragged_dims, static, batch_first)
    if is_traced(values):
        out = bare(values, layout, flags)
        out._entered = True  # type: ignore[attr-defined]
        return out
    return wrap(values, layout, flags)


def traced_values(x: NestedTensor) -> Tensor:
    """`values_of` in a trace.

    What enters a compiled region is viewed in its own shape, so that the number of rows is computed in the graph: the
    graph's inputs name the padded sizes only, and inductor looks for every symbol it meets.
    """
    if x.requires_grad and torch.is_grad_enabled() and not x._values.requires_grad:
        return _Read.apply(x)
    if not (isinstance(x._values, FunctionalTensor) and x.__dict__.pop("_entered", False)):
        return x.__dict__.get("_viewed", x._values)
    x._viewed = x._values.view(x._values.shape)  # type: ignore[attr-defined]
    return x._viewed  # type: ignore[attr-defined]


def stable_hash(x: NestedTensor) -> str:
    """What compiled code on disk depends on, for torch's caches."""
    values = x._values
    about = values.shape, values.stride(), values.dtype, values.device, x.requires_grad
    return str((flatten(x)[1], tuple(x.shape), *about))


def fixed(values: Tensor) -> TracedSegments:
    """Segments of elements without ragged dims."""
    batch = values.shape[0]
    offsets = torch.arange(batch + 1, device=values.device)
    return TracedSegments(offsets, None, batch, batch, ())


class InGraph(NestedTensor):
    """A call that torch.compile takes into its graph as one step: it does so with the classes it could flatten.

    `InGraph("from_padded", padded, lengths)` is `danling.tensors.construct.from_padded(padded, lengths)`.
    """

    def __new__(cls, name: str, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
        from danling.tensors import construct

        return getattr(construct, name)(*args, **kwargs)


def hide(*classes: type) -> None:
    """Keep torch.compile out of the methods of NestedTensor where it runs them, after a graph break: they are eager code."""
    frames: Any = torch._C._dynamo.eval_frame  # private: without it a graph break costs attempts to trace, nothing else
    if not all(hasattr(frames, name) for name in ("_FrameExecStrategy", "_FrameAction", "set_code_exec_strategy")):
        return
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for kind in classes:
        for member in vars(kind).values():
            for function in (member, *(getattr(member, name, None) for name in ("fget", "fset", "__func__"))):
                if isinstance(function, FunctionType):
                    frames.set_code_exec_strategy(function.__code__, strategy)


hide(NestedTensor, *(kind for kind in NestedTensor.__mro__ if kind.__module__.startswith("danling.")))
