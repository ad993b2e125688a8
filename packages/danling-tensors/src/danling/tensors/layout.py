"""The structure of a ragged batch: which dims are ragged, how long each element is, where its rows start."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes

_INT64 = torch.int64


def host() -> Any:
    """Make real tensors outside of any graph, whatever mode is on: they are kept for every later use of the lengths."""
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return _out_of_modes()
    return _NO_MODES  # entering the others costs more than what is done there; integers take no gradients anyway


_NO_MODES = nullcontext()


@contextmanager
def _out_of_modes() -> Iterator[None]:
    modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
    # Tensors made inside inference mode could not be saved for backward later.
    with modes, torch.inference_mode(False), torch.no_grad():
        yield


class LengthsError(DataDependentOutputException):
    """A call that needs the lengths themselves where they are not known: in a traced graph, or without data."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name or called())  # type: ignore[arg-type]

    def __str__(self) -> str:
        return (
            f"{self.func} needs the lengths of a NestedTensor, which are not known while a graph is traced; "
            "call it outside of the compiled region (torch.compiler.disable) or write it on .concat"
        )


def called() -> str:
    """Name of the torch function, or of the member, that is being served, for messages."""
    name, frame = "this call", sys._getframe()
    while frame is not None:
        function = frame.f_code.co_name
        if function == "__torch_function__" and "func" in frame.f_locals:
            func = frame.f_locals["func"]
            return getattr(func, "__name__", str(func))
        if frame.f_globals.get("__name__") == "danling.tensors.nested_tensor":
            name = function
        frame = frame.f_back  # type: ignore[assignment]
    return name


def require(condition: Tensor, message: str) -> None:
    """Check a condition when the traced graph runs; a `RuntimeError` there."""
    torch._assert_async(condition, message)


def is_traced(values: Tensor) -> bool:
    """Whether a tensor is a tracer's own: fake, functional or otherwise without memory of its own."""
    return type(values).__torch_dispatch__ is not Tensor.__torch_dispatch__


def int64_tensor(numbers: list[int]) -> Tensor:
    """A CPU int64 tensor from Python ints through one flat buffer, which is much faster than `torch.tensor`."""
    if not numbers:
        return torch.empty(0, dtype=_INT64, device="cpu")
    return torch.frombuffer(array("q", numbers), dtype=_INT64)


class Segments:
    """Ragged sizes of a batch, and the index maps made of them.

    Independent of static dims, so every layout derived from another one by an op that keeps the lengths shares one
    `Segments` object, and with it all device copies and index maps.

    Args:
        sizes: `(B, k)` CPU int64, size of each of the `k` ragged dims in each element.
        table: The same numbers as one flat Python list, when the caller has them at hand.
    """

    __slots__ = ("batch_size", "k", "rows", "max_sizes", "_sizes", "_offsets", "_table", "_hash", "_cache")

    rows: int
    max_sizes: tuple[int, ...]
    _sizes: Tensor | None
    _offsets: Tensor | None
    _table: list[int] | None
    _hash: int | None
    _cache: dict[Any, Any]
    symbolic = False
    """Whether the lengths are unknown because a graph is being traced; see `danling.tensors.tracing`."""

    def __init__(self, sizes: Tensor | None, table: list[int] | None = None) -> None:
        self._sizes = sizes
        self._table = table
        if sizes is None:  # with one ragged dim the Python list alone is enough; the rest follows in __getattr__
            assert table is not None
            self.batch_size, self.k = len(table), 1
            return
        self.batch_size, self.k = sizes.shape
        if self.k == 0:
            self.rows = self.batch_size
            self.max_sizes = ()
        elif table is None and self.batch_size > 256 and not is_traced(self.sizes):
            # A list of thousands of lengths would take longer than the copies they are wanted for.
            self.rows = int(self.offsets[-1])
            self.max_sizes = tuple(self.sizes.amax(0).tolist())
        elif self.k == 1:
            table = self.table
            self.rows = sum(table)
            self.max_sizes = (max(table) if table else 0,)
        else:
            table = self.table
            self.rows = int(self.offsets[-1])
            self.max_sizes = tuple(max(table[j :: self.k], default=0) for j in range(self.k))

    def __getattr__(self, name: str) -> Any:
        # Building segments must cost next to nothing, so the rest is made when it is asked for.
        build = _FOLLOWING_LENGTHS.get(name)
        if build is None:
            raise AttributeError(f"Segments has no attribute {name!r}")
        value = build(self)
        setattr(self, name, value)
        return value

    @classmethod
    def of_offsets(cls, offsets: Tensor, rows: int, longest: int) -> Segments:
        """One ragged dim, from CPU int64 offsets `(B+1,)` that are known to be right, their end and the largest length."""
        out = cls.__new__(cls)
        out._sizes, out._offsets, out._table = None, offsets, None
        out.batch_size, out.k, out.rows, out.max_sizes = offsets.shape[0] - 1, 1, rows, (longest,)
        return out

    @property
    def sizes(self) -> Tensor:
        """CPU int64 `(B, k)`."""
        if self._sizes is None:
            with host():
                if self._table is not None:
                    self._sizes = int64_tensor(self._table).view(-1, 1)
                else:
                    self._sizes = self.offsets.diff()[:, None]
        return self._sizes

    @property
    def offsets(self) -> Tensor:
        """CPU int64 `(B+1,)`: rows before each element."""
        if self._offsets is None:
            with host():
                if self.k == 0:
                    self._offsets = torch.arange(self.batch_size + 1, device="cpu")
                elif self.k == 1 and self._table is not None and self.batch_size <= 256:
                    self._offsets = int64_tensor(self.bounds)  # fewer calls than below
                else:
                    self._offsets = torch.zeros(self.batch_size + 1, dtype=_INT64, device="cpu")
                    rows = self.sizes[:, 0] if self.k == 1 else self.sizes.prod(1)
                    torch.cumsum(rows, 0, out=self._offsets[1:])
        return self._offsets

    @property
    def table(self) -> list[int]:
        """All sizes as one flat list, element by element."""
        if self._table is None:
            if is_traced(self.sizes):
                raise LengthsError
            self._table = self.sizes.flatten().tolist()
        return self._table

    @property
    def lengths(self) -> list[int]:
        """Rows of each element."""
        if self.k == 1:
            return self.table
        return self.memo("lengths", lambda: (self.offsets[1:] - self.offsets[:-1]).tolist())

    @property
    def bounds(self) -> list[int]:
        """`offsets` as a list."""
        return self.memo("bounds", lambda: [0, *accumulate(self.lengths)])

    def memo(self, key: Any, build: Any) -> Any:
        """The cached value under `key`, built on first use."""
        try:
            return self._cache[key]
        except KeyError:
            value = self._cache[key] = build()
            return value

    def on(self, name: str, device: torch.device, dtype: torch.dtype = _INT64) -> Tensor:
        """One of the index tensors on a device, copied or built once.

        `name` is `"offsets"` `(B+1,)`, `"lengths"` `(B,)`, `"sizes"` `(B, k)`, `"element"` `(R,)` (which element a row
        belongs to), `"row"` `(R,)` (its index inside the element), or `("coord", j)` `(R,)` (its index along ragged
        dim number `j`).
        """
        if name == "offsets" and device.type == "cpu" and dtype is _INT64:
            return self.offsets
        key = (name, device, dtype)
        found = self._cache.get(key)
        if found is None:
            with host():
                found = self._cache[key] = self._build(name, device).to(dtype)
        return found

    def _build(self, name: Any, device: torch.device) -> Tensor:
        if name == "offsets":
            return self.offsets.to(device, non_blocking=True)
        if name == "sizes":
            return self.sizes.to(device, non_blocking=True)
        if name == "lengths":
            offsets = self.on("offsets", device)
            return offsets[1:] - offsets[:-1]
        if name == "element":
            index = torch.arange(self.batch_size, device=device)
            return torch.repeat_interleave(index, self.on("lengths", device), output_size=self.rows)
        if name == "row":
            start = self.on("offsets", device)[:-1].index_select(0, self.on("element", device))
            return torch.arange(self.rows, device=device) - start
        _, j = name
        row = self.on("row", device)
        if self.k == 1:
            return row
        sizes = self.on("sizes", device).index_select(0, self.on("element", device))
        for later in range(self.k - 1, j, -1):
            row = row // sizes[:, later]
        return row if j == 0 else row % sizes[:, j]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Segments):
            return NotImplemented
        return (
            self.batch_size == other.batch_size
            and self.k == other.k
            and self.rows == other.rows
            and hash(self) == hash(other)
            and self.table == other.table
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.batch_size, self.k, tuple(self.table)))
        return self._hash

    def __reduce__(self) -> Any:
        return Segments, (self.sizes,)


_FOLLOWING_LENGTHS: dict[str, Any] = {
    "rows": lambda segments: sum(segments.table),
    "max_sizes": lambda segments: (max(segments.table, default=0),),
    "_offsets": lambda segments: None,
    "_hash": lambda segments: None,
    "_cache": lambda segments: {},
}


class Layout:
    """The immutable structure of a `NestedTensor`.

    Rows (index tuples over the ragged dims) are packed one after another; `values` is `(rows, *static_sizes)`.
    Two layouts are equal by content. Every result of an op carries a layout, so nothing is ever inferred from sizes.

    Args:
        segments: Ragged sizes of the elements.
        ragged_dims: Element dims that differ between elements, ascending.
        static_sizes: Sizes of the other element dims, ascending.
        batch_first: Whether `.shape` starts with the batch.

    Example:
        >>> import torch
        >>> from danling.tensors import NestedTensor
        >>> layout = NestedTensor(torch.zeros(2, 3), torch.zeros(4, 3)).structure
        >>> layout.shape, layout.ragged_dims, layout.rows
        (torch.Size([2, 4, 3]), (0,), 6)
    """

    __slots__ = (
        "segments",
        "ragged_dims",
        "static_sizes",
        "batch_first",
        "rank",
        "static_dims",
        "permutation",
        "shape",
        "last_static",
        "_sizes",
        "_derived",
        "_equal",
        "__weakref__",
    )

    segments: Segments
    ragged_dims: tuple[int, ...]
    static_sizes: tuple[int, ...]
    static_dims: tuple[int, ...]
    permutation: tuple[int, ...]
    batch_first: bool
    rank: int
    shape: torch.Size
    last_static: bool
    _sizes: Any
    _derived: dict[Any, Any]
    _equal: Any

    def __init__(
        self,
        segments: Segments,
        ragged_dims: tuple[int, ...] = (),
        static_sizes: tuple[int, ...] = (),
        batch_first: bool = True,
    ) -> None:
        init = object.__setattr__
        init(self, "segments", segments)
        init(self, "ragged_dims", ragged_dims)
        init(self, "static_sizes", static_sizes)
        init(self, "batch_first", batch_first)

    def __getattr__(self, name: str) -> Any:
        # Building a layout must cost next to nothing, so the rest is made when it is asked for.
        build = _FOLLOWING.get(name)
        if build is None:
            raise AttributeError(f"Layout has no attribute {name!r}")
        value = build(self)
        object.__setattr__(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Layout is immutable; use replace({name}=...) to get a new one")

    # What is stored once for all layouts with the same lengths.
    @property
    def batch_size(self) -> int:
        """Number of elements."""
        return self.segments.batch_size

    @property
    def offsets(self) -> Tensor:
        """CPU int64 `(B+1,)`: rows before each element."""
        return self.segments.offsets

    @property
    def max_sizes(self) -> tuple[int, ...]:
        """Largest size of each ragged dim; 0 when there is no element."""
        return self.segments.max_sizes

    @property
    def rows(self) -> int:
        """Number of all rows, the length of `values`."""
        return self.segments.rows

    @property
    def numel(self) -> int:
        """Number of real values."""
        return self.rows * math.prod(self.static_sizes)

    @property
    def sizes(self) -> Tensor:
        """CPU int64 `(B, rank)`: size of every element along every element dim."""
        if self._sizes is None:
            sizes = torch.empty(self.batch_size, self.rank, dtype=_INT64, device="cpu")
            if self.ragged_dims:
                sizes[:, list(self.ragged_dims)] = self.segments.sizes
            if self.static_dims:
                sizes[:, list(self.static_dims)] = int64_tensor(list(self.static_sizes))
            object.__setattr__(self, "_sizes", sizes)
        return self._sizes

    @property
    def batch_dim(self) -> int:
        """Index of the batch in `shape`."""
        return 0 if self.batch_first or self.rank == 0 else 1

    @property
    def dense(self) -> bool:
        """Whether no dim is ragged."""
        return not self.ragged_dims

    def element_shape(self, i: int) -> torch.Size:
        """Shape of element `i`."""
        table, k = self.segments.table, self.segments.k
        sizes = [0] * self.rank
        for j, d in enumerate(self.ragged_dims):
            sizes[d] = table[i * k + j]
        for d, size in zip(self.static_dims, self.static_sizes):
            sizes[d] = size
        return torch.Size(sizes)

    def element_shapes(self) -> list[torch.Size]:
        """Shapes of all elements."""
        if self.ragged_dims == (0,):
            return [torch.Size((n, *self.static_sizes)) for n in self.segments.table]
        return [self.element_shape(i) for i in range(self.batch_size)]

    # Dims.
    def element_dim(self, dim: int) -> int | None:
        """Translate a dim of `shape` to an element dim; `None` is the batch.

        Raises:
            IndexError: `dim` is out of range.
        """
        ndim = self.rank + 1
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], but got {dim})"
            )
        if dim < 0:
            dim += ndim
        if self.batch_first or self.rank == 0:
            return dim - 1 if dim else None
        return None if dim == 1 else dim - (dim > 1)

    def shape_dim(self, element_dim: int) -> int:
        """Translate an element dim (not negative) to a dim of `shape`."""
        if self.batch_first:
            return element_dim + 1
        return element_dim + (element_dim >= 1)

    def values_dim(self, element_dim: int) -> int:
        """The dim of `values` that holds a static element dim."""
        return 1 + self.static_dims.index(element_dim)

    # Derived layouts.
    def derive(self, key: Any, build: Any) -> Any:
        """The cached layout (or index map) under `key`, built on first use."""
        try:
            return self._derived[key]
        except KeyError:
            value = self._derived[key] = build()
            return value
        except TypeError:  # symbolic ints in the key: of one trace only
            return build()

    def with_static(self, static_sizes: tuple[int, ...]) -> Layout:
        """Same lengths and number of dims, other static sizes."""
        if static_sizes == self.static_sizes:
            return self
        try:
            return self._derived[static_sizes]
        except KeyError:
            found = Layout(self.segments, self.ragged_dims, static_sizes, self.batch_first)
            self._derived[static_sizes] = found
            return found
        except TypeError:  # as in derive
            return Layout(self.segments, self.ragged_dims, static_sizes, self.batch_first)

    def with_dims(self, ragged_dims: tuple[int, ...], static_sizes: tuple[int, ...]) -> Layout:
        """Same lengths, ragged dims elsewhere in the element."""
        if ragged_dims == self.ragged_dims:
            return self.with_static(static_sizes)
        key = (ragged_dims, static_sizes)
        return self.derive(key, lambda: Layout(self.segments, ragged_dims, static_sizes, self.batch_first))

    def replace(
        self,
        *,
        segments: Segments | None = None,
        ragged_dims: tuple[int, ...] | None = None,
        static_sizes: tuple[int, ...] | None = None,
        batch_first: bool | None = None,
    ) -> Layout:
        """A layout with some fields changed."""
        return Layout(
            self.segments if segments is None else segments,
            self.ragged_dims if ragged_dims is None else tuple(ragged_dims),
            self.static_sizes if static_sizes is None else tuple(static_sizes),
            self.batch_first if batch_first is None else batch_first,
        )

    @staticmethod
    def from_lengths(
        lengths: list[int], static_sizes: tuple[int, ...] = (), ragged_dim: int = 0, batch_first: bool = True
    ) -> Layout:
        """Layout with one ragged dim, from Python lengths."""
        segments = Segments(None, lengths)
        return Layout(segments, (ragged_dim,), tuple(static_sizes), batch_first)

    @staticmethod
    def from_shapes(
        shapes: list[torch.Size], ragged_dims: tuple[int, ...], rank: int, static_sizes: Any, batch_first: bool = True
    ) -> Layout:
        """Layout of elements with the given shapes (already checked against each other)."""
        k = len(ragged_dims)
        if k == 1:
            d = ragged_dims[0]
            table = list(map(itemgetter(d), shapes))
        else:
            table = [shape[d] for shape in shapes for d in ragged_dims]
        sizes = (
            int64_tensor(table).view(len(shapes), k) if k else torch.empty(len(shapes), 0, dtype=_INT64, device="cpu")
        )
        return Layout(Segments(sizes, table), ragged_dims, tuple(static_sizes), batch_first)

    def __eq__(self, other: object) -> bool:
        if self is other or self._equal is other:
            return True
        if not isinstance(other, Layout):
            return NotImplemented
        equal = (
            self.ragged_dims == other.ragged_dims
            and self.static_sizes == other.static_sizes
            and self.batch_first == other.batch_first
            and self.segments == other.segments
        )
        if equal:  # the pair is likely to meet again
            object.__setattr__(self, "_equal", other)
        return equal

    def __hash__(self) -> int:
        return hash((self.ragged_dims, self.static_sizes, self.batch_first, self.segments))

    def __repr__(self) -> str:
        return (
            f"Layout(shape={tuple(self.shape)}, ragged_dims={self.ragged_dims}, static_sizes={self.static_sizes}, "
            f"rows={self.rows}, batch_first={self.batch_first})"
        )

    def __reduce__(self) -> Any:
        return Layout, (self.segments, self.ragged_dims, self.static_sizes, self.batch_first)

    def __deepcopy__(self, memo: Any) -> Layout:
        return self

    def __copy__(self) -> Layout:
        return self


def _padded_shape(layout: Layout) -> torch.Size:
    sizes = layout.segments.max_sizes
    element = [0] * layout.rank
    for d, size in zip(layout.ragged_dims, sizes):
        element[d] = size
    for d, size in zip(layout.static_dims, layout.static_sizes):
        element[d] = size
    element.insert(layout.batch_dim, layout.segments.batch_size)
    return torch.Size(element)


_FOLLOWING: dict[str, Any] = {
    "rank": lambda layout: len(layout.ragged_dims) + len(layout.static_sizes),
    "_sizes": lambda layout: None,
    "_derived": lambda layout: {},
    "_equal": lambda layout: None,
    "static_dims": lambda layout: tuple(d for d in range(layout.rank) if d not in layout.ragged_dims),
    "permutation": lambda layout: layout.ragged_dims + layout.static_dims,
    "shape": _padded_shape,
    "last_static": lambda layout: layout.rank > 0 and layout.rank - 1 not in layout.ragged_dims,
}
