"""NestedTensor: a batch of tensors of different sizes, kept packed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass as _PlainTensors

from danling.tensors.autograd import Autograd
from danling.tensors.constructors import Constructors
from danling.tensors.layout import Layout, is_traced
from danling.tensors.ops.signatures import by_position
from danling.tensors.ops.table import FOREIGN, TABLE, call_with_out, resolve
from danling.tensors.packing import (
    check_bool,
    check_index,
    check_number,
    make_mask,
    pack_elements,
    shape_element,
    slice_element,
    structure_of,
    to_padded,
)
from danling.tensors.refused import Refused, misplaced
from danling.tensors.serialization import Serialization
from danling.tensors.traceable import Traceable, asked_by_torch, for_guard, in_transform, reading, stripped, told

_Base: Any = torch._C.TensorBase
_as_subclass = _Base.as_subclass
_base_requires_grad = _Base.requires_grad.__get__
_grad_enabled = torch.is_grad_enabled
_transforms_active: Any = torch._C._are_functorch_transforms_active  # type: ignore[attr-defined]
_is_batched: Any = torch._C._functorch.is_batchedtensor

Flags = tuple[Any, bool]  # padding_value, mask_value

FIRST: set[type] = set()
"""Tensor types that handle an op themselves when they meet a NestedTensor in it."""


def wrap(values: Tensor, layout: Layout, flags: Flags) -> NestedTensor:
    """A NestedTensor over packed `values`, connected to them in the autograd graph.

    The result is a view of `values` as far as autograd is concerned, so code outside the op layer (a custom
    `autograd.Function`, hooks, DDP) sees the same graph at no extra cost.
    """
    if type(values) is not Tensor and is_traced(values):
        return join(values, layout, flags)
    if _transforms_active() and _is_batched(values):
        raise stripped("vmap")
    out = _as_subclass(values, NestedTensor)
    out._values = values
    out._layout = layout
    out._flags = flags
    return out


def join(values: Tensor, layout: Layout, flags: Flags) -> NestedTensor:
    """`wrap` for a tracer's tensors."""
    from danling.tensors.tracing import join

    return join(values, layout, flags)


class _Read(torch.autograd.Function):
    """The values of a NestedTensor whose history was made outside the op layer; its gradient is a NestedTensor."""

    @staticmethod
    def forward(ctx: Any, x: NestedTensor) -> Tensor:  # type: ignore[override]
        ctx.structure = x._layout, x._flags
        ctx.set_materialize_grads(False)
        if is_traced(x._values):
            return x._values.view(x._values.shape)
        return x._values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> NestedTensor | None:  # type: ignore[override]
        return None if grad is None else wrap(plain(grad), *ctx.structure)


def values_of(x: NestedTensor) -> Tensor:
    """Packed values of `x`, in the autograd graph.

    Reads a history made outside the op layer (by a custom `autograd.Function`, say) through `_Read`.
    """
    values = x._values
    if not values.requires_grad and _grad_enabled():
        with _PlainTensors():
            outside = _base_requires_grad(x)
        if outside and not is_traced(values):
            values = x._values = _Read.apply(x)
    if type(values) is not Tensor and is_traced(values):
        return traced_values(x)
    return values


def traced_values(x: NestedTensor) -> Tensor:
    """`values_of` for a tracer's tensors."""
    from danling.tensors.tracing import traced_values

    return traced_values(x)


def plain(x: Tensor) -> Tensor:
    """`x` itself, or its values when it is a NestedTensor."""
    return values_of(x) if isinstance(x, NestedTensor) else x


def rebind(x: NestedTensor, values: Tensor, layout: Layout | None = None) -> NestedTensor:
    """Put other values (and another layout) under an existing NestedTensor, for everyone who holds it."""
    with torch.enable_grad():  # a view made without it would not be part of the graph later
        fresh = wrap(values, x._layout if layout is None else layout, x._flags)
    torch._C._swap_tensor_impl(x, fresh)
    x._values, x._layout = fresh._values, fresh._layout
    return x


def from_elements(
    elements: Sequence[Tensor],
    *,
    ragged_dims: tuple[int, ...] | None,
    batch_first: bool,
    flags: Flags,
    rank: int,
) -> NestedTensor:
    """Pack elements of one rank, dtype and device; `ragged_dims=None` infers them."""
    shapes = [t.shape for t in elements]
    ragged, static = structure_of(shapes, rank, ragged_dims)
    layout = layout_of(elements, ragged, static, batch_first)
    return wrap(pack_elements(elements, layout), layout, flags)


def layout_of(
    elements: Sequence[Tensor], ragged: tuple[int, ...], static: tuple[int, ...], batch_first: bool
) -> Layout:
    """Layout of elements whose static sizes have been compared."""
    shapes = [t.shape for t in elements]
    rank = len(ragged) + len(static)
    if shapes and is_traced(elements[0]):
        from danling.tensors.tracing import listed

        table = [[shape[d] for d in ragged] for shape in shapes]
        return Layout(listed(table, len(ragged), elements[0].device), ragged, static, batch_first)
    return Layout.from_shapes(shapes, ragged, rank, static, batch_first)


def _build(*settings: Any) -> NestedTensor:
    """`danling.tensors.construct.build`, which takes this name on first use: it needs this module first."""
    global _build
    from danling.tensors.construct import build as _build

    return _build(*settings)


def _from_list(elements: list[Any]) -> NestedTensor | None:
    """`danling.tensors.quick.from_list`, likewise."""
    global _from_list
    from danling.tensors.quick import from_list as _from_list

    return _from_list(elements)


_ZERO = 0.0
"""The padding value when none is given."""


class NestedTensor(Constructors, Autograd, Serialization, Traceable, Refused, torch.Tensor):  # type: ignore[override]
    """A batch of tensors of one rank and different sizes, stored packed: no padding, exact gradients.

    `.shape` is the padded shape `(B, *element)`; dims given to torch functions mean what they mean on that shape, and
    no result ever depends on padding. Functions of torch, tensor methods, operators and modules work on it.

    Args:
        *tensors: The elements, or one iterable of them. An item is a tensor, an ndarray, a number or a nested list. One
            lone tensor or ndarray is one element.
        dtype: Default: the promoted dtype of the elements.
        device: Default: the device of the elements.
        requires_grad: `None` follows the elements, `True` makes a leaf when no element requires grad, `False` detaches.
        pin_memory: Keep values in pinned memory.
        batch_first: `.shape` is `(B, *element)`; with `False` `(element[0], B, *element[1:])`.
        padding_value: Fill of `.tensor` outside the elements.
        mask_value: The boolean that marks padding in `.mask`.
        ragged_dims: Element dims that may differ between elements. `None` infers the dims that do differ (element dim 0
            if none does). Declare them when the varying dim is not the first one, so that a batch of one, or of equal
            sizes, has the same structure as any other.

    Raises:
        ValueError: Elements of different rank or device, a static dim that differs, `ragged_dims` out of range.
        TypeError: Data or settings of the wrong kind.

    Example:
        >>> import torch
        >>> from danling.tensors import NestedTensor
        >>> x = NestedTensor([1.0, 2.0, 3.0], [4.0])
        >>> (x * 2).tensor
        tensor([[2., 4., 6.],
                [8., 0., 0.]])
        >>> x.mean(dim=1)
        tensor([2., 4.])

        Channel-first signals vary in element dim 1; saying so keeps a batch of one structured like any other:

        >>> signals = NestedTensor(torch.zeros(1, 2, 7), ragged_dims=1)
        >>> signals = NestedTensor(list(torch.zeros(1, 2, 7)), ragged_dims=1)
        >>> signals.shape, signals.ragged_dims
        (torch.Size([1, 2, 7]), (1,))
    """

    __slots__ = ("_values", "_layout", "_flags")

    _values: Tensor  # type: ignore[assignment]
    _layout: Layout
    _flags: Flags

    def __new__(
        cls,
        *tensors: Any,
        dtype: torch.dtype | None = None,
        device: Any = None,
        requires_grad: bool | None = None,
        pin_memory: bool = False,
        batch_first: bool = True,
        padding_value: Any = _ZERO,
        mask_value: bool = False,
        ragged_dims: int | Iterable[int] | None = None,
    ) -> NestedTensor:
        if (
            len(tensors) == 1
            and type(tensors[0]) is list
            and dtype is device is requires_grad is ragged_dims is None
            and pin_memory is mask_value is False
            and batch_first is True
            and padding_value is _ZERO
        ):
            found = _from_list(tensors[0])
            if found is not None:
                return found
        return _build(
            tensors, dtype, device, requires_grad, pin_memory, batch_first, padding_value, mask_value, ragged_dims
        )

    # Everything is done in __new__; torch.Tensor.__init__ takes no arguments, and one in Python costs a call.
    __init__ = object.__init__  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(types) > 1 and not FIRST.isdisjoint(types):
            return NotImplemented
        rule = TABLE.get(func)
        if rule is None:
            rule = resolve(func)
        try:
            if not kwargs:
                return rule(*args)
            unknown = FOREIGN.get(func)
            if unknown is not None and not unknown.isdisjoint(kwargs):
                args, kwargs = by_position(func, unknown, args, kwargs)
            if kwargs.get("out") is not None:
                return call_with_out(func, rule, args, kwargs)
            return rule(*args, **kwargs)
        except AttributeError as error:  # a rule asked a dense operand for its structure
            if error.name not in _PARTS or isinstance(error.obj, NestedTensor):
                raise
            raise misplaced(func, error.obj, args, kwargs) from None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd a NestedTensor is its values: the engine adds gradients, and makes views of what a custom
        # function returns as it is.
        out = func(*_bare(args), **_bare(kwargs or {}))
        first = next((a for a in args if isinstance(a, NestedTensor)), None)
        if first is None or func is _alias:
            return out
        if func not in _OUTSIDE and in_transform():
            raise stripped("torch.func")
        if func._schema.is_mutable:
            return args[0]
        if func in _KEPT and isinstance(out, Tensor) and out.shape == first._values.shape:
            return wrap(out, first._layout, first._flags)
        return out

    # Structure.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The padded shape."""
        return self._layout.shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Number of dims, batch included."""
        return self._layout.rank + 1

    def dim(self) -> int:
        """Number of dims, batch included."""
        return self._layout.rank + 1

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        """The padded shape, or one of its sizes."""
        if dim is None and is_traced(self._values) and for_guard():
            return self._values.size()
        if dim is not None and sys._getframe(1).f_globals.get("__name__") == "torch._functorch.vmap":
            raise stripped("vmap")
        if dim is None:
            return self._layout.shape
        try:
            return self._layout.shape[dim]
        except IndexError:
            self._layout.element_dim(dim)  # says which dims there are
            raise

    def __len__(self) -> int:
        return self._layout.batch_size

    def numel(self) -> int:
        """Number of real values."""
        return self._layout.numel

    nelement = numel

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the real values."""
        return self._layout.numel * self._values.element_size()

    @property
    def structure(self) -> Layout:
        """The immutable `Layout`."""
        return self._layout

    @property
    def ragged_dims(self) -> tuple[int, ...]:
        """Element dims that may differ between elements."""
        return self._layout.ragged_dims

    @property
    def lengths(self) -> Tensor:
        """int64 `(B,)` sizes of the only ragged dim, on the tensor's device.

        Raises:
            ValueError: The number of ragged dims is not one.
        """
        if len(self._layout.ragged_dims) != 1:
            raise ValueError(f"lengths needs exactly one ragged dim, got ragged_dims={self._layout.ragged_dims}")
        with reading(self._values):
            return told(self, self._layout.segments.on("lengths", self._values.device).clone())

    @property
    def occupancy(self) -> float:
        """Real values over padded values; 0.0 when there are none."""
        padded = self._layout.shape.numel()
        return self._layout.numel / padded if padded else 0.0

    @property
    def _offsets(self) -> Tensor:
        return self._layout.offsets

    @property
    def _permutation(self) -> tuple[int, ...]:
        return self._layout.permutation

    @property
    def _physical_shape(self) -> Tensor:
        return self._layout.sizes

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Data type of the values."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of the values."""
        return self._values.device

    @property
    def layout(self) -> torch.layout:  # type: ignore[override]
        """Always `torch.strided`; the structure is in `.structure`."""
        return torch.strided

    @property
    def is_nested(self) -> bool:  # type: ignore[override]
        """Always False: torch's own nested tensors are another type."""
        return False

    def stride(self, dim: int | None = None) -> Any:  # type: ignore[override]
        """Contiguous strides of `.shape`."""
        if dim is None and is_traced(self._values) and for_guard():
            return self._values.stride()
        strides, step = [], 1
        for size in reversed(self._layout.shape):
            strides.append(step)
            step *= max(size, 1)
        out = tuple(reversed(strides))
        return out if dim is None else out[dim]

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:  # type: ignore[override]
        """Whether the values are contiguous; no NestedTensor is in another memory format."""
        return memory_format in (torch.contiguous_format, torch.preserve_format) and self._values.is_contiguous()

    # Settings.
    @property
    def batch_first(self) -> bool:
        """Whether `.shape` starts with the batch; writable."""
        return self._layout.batch_first

    @batch_first.setter
    def batch_first(self, value: bool) -> None:
        self._layout = self._layout.replace(batch_first=check_bool("batch_first", value))

    @property
    def padding_value(self) -> Any:
        """Fill of `.tensor` outside the elements; writable."""
        return self._flags[0]

    @padding_value.setter
    def padding_value(self, value: Any) -> None:
        self._flags = (check_number("padding_value", value), self._flags[1])

    @property
    def mask_value(self) -> bool:
        """The boolean that marks padding in `.mask`; writable."""
        return self._flags[1]

    @mask_value.setter
    def mask_value(self, value: bool) -> None:
        self._flags = (self._flags[0], check_bool("mask_value", value))

    # Conversion.
    @property
    def tensor(self) -> Tensor:
        """Padded dense tensor of `.shape`, made afresh on each read; differentiable."""
        with reading(self._values):
            return told(self, to_padded(values_of(self), self._layout, self._flags[0]))

    @property
    def mask(self) -> Tensor:
        """bool, `not mask_value` where data is; batch and element dims up to the last ragged one."""
        with reading(self._values):
            return told(self, make_mask(self._layout, self._values.device, self._flags[1]))

    @property
    def tensor_mask(self) -> tuple[Tensor, Tensor]:
        """`(tensor, mask)`."""
        return self.tensor, self.mask

    @property
    def concat(self) -> Tensor:
        """The packed values `(R, *static)`, shared with this tensor."""
        values = values_of(self)
        if asked_by_torch():
            values._dynamo_propagated_dynamic_indices = {0}  # type: ignore[attr-defined]
        return values

    def concatenate(self) -> tuple[Tensor, tuple[torch.Size, ...]]:
        """`(concat, shapes)`, the arguments of `from_concatenated`."""
        from danling.tensors.construct import Shapes

        return values_of(self), Shapes(self._layout.element_shapes(), self._layout.ragged_dims)

    def unbind(self, dim: int | None = None) -> tuple[Any, ...]:  # type: ignore[override]
        """The elements; along a static dim, NestedTensors."""
        layout = self._layout
        if dim is None or layout.element_dim(dim) is None:
            values = values_of(self)
            if layout.dense:
                return values.unbind(0)
            parts = torch.split_with_sizes(values, layout.segments.lengths)
            if layout.ragged_dims == (0,):
                return tuple(parts)
            return tuple(shape_element(part, layout, i) for i, part in enumerate(parts))
        from danling.tensors.ops.shape import unbind_static

        return unbind_static(self, dim)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    def __reversed__(self) -> Any:
        return self[list(range(len(self) - 1, -1, -1))]

    def tolist(self) -> list[Any]:
        """Nested lists of the real values."""
        return [t.tolist() for t in self.unbind()]

    def to_torch_nested(self) -> Tensor:
        """This batch as PyTorch's own nested tensor (jagged with one ragged dim, strided with none).

        Raises:
            ValueError: There are two or more ragged dims.
        """
        from danling.tensors.construct import to_torch_nested

        return to_torch_nested(self)

    def nested_like(self, tensor: Tensor, strict: bool = True) -> NestedTensor:
        """A dense tensor in this structure; see `danling.tensors.construct.nested_like`."""
        from danling.tensors.construct import nested_like

        return nested_like(self, tensor, strict)

    def __bool__(self) -> bool:
        raise RuntimeError(
            "the truth of a NestedTensor is ambiguous; use any(), all() or numel(), whatever the number of values"
        )

    def item(self) -> Any:
        """The value, when there is exactly one.

        Raises:
            RuntimeError: There is another number of values.
        """
        if self._layout.numel != 1:
            raise RuntimeError(f"a NestedTensor with {self._layout.numel} values cannot be converted to a number")
        return self._values.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        return self.item().__index__()

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            return slice_element(values_of(self), self._layout, check_index(index, self._layout.batch_size))
        from danling.tensors.ops.indexing import read

        return read(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        from danling.tensors.ops.indexing import write

        write(self, index, value)

    def __contains__(self, item: Any) -> bool:
        return bool((self._values == item).any())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        from danling.tensors.display import describe

        return describe(self)

    def __format__(self, spec: str) -> str:
        if not spec:
            return repr(self)
        if self._layout.numel != 1:
            raise TypeError(f"format {spec!r} is for one number, and this NestedTensor has {self._layout.numel} values")
        return format(self.item(), spec)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__})


_PARTS = frozenset({"_layout", "_values", "_flags", "structure"})


_aten = torch.ops.aten
_alias = _aten.alias.default
_OUTSIDE = {_aten.detach.default, _aten.view.default}
_KEPT = {
    _aten.view.default,
    _aten.detach.default,
    _aten.clone.default,
    _aten.add.Tensor,
    _aten._to_copy.default,
}


def _bare(tree: Any) -> Any:
    if isinstance(tree, NestedTensor):
        return tree._values
    if isinstance(tree, (list, tuple)):
        return type(tree)(_bare(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _bare(item) for key, item in tree.items()}
    return tree
