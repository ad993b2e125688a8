"""Ways into and out of a NestedTensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.layout import Layout, LengthsError, Segments, int64_tensor, is_traced
from danling.tensors.nested_tensor import NestedTensor, layout_of, values_of, wrap
from danling.tensors.packing import check_bool, check_number, difference, pack_elements, structure_of, to_packed

# What is asked of every element: C functions, because thousands of elements are asked.
_rank_of: Any = torch._C.TensorBase.dim
_rows_of: Any = torch._C.TensorBase.__len__  # type: ignore[attr-defined]
_shape_of, _dtype_of = attrgetter("shape"), attrgetter("dtype")
_on_cpu, _device_of = attrgetter("is_cpu"), attrgetter("device")


class Shapes(tuple):
    """Shapes of all elements, with the ragged dims they had."""

    ragged_dims: tuple[int, ...]

    def __new__(cls, shapes: Iterable[torch.Size], ragged_dims: tuple[int, ...]) -> Shapes:
        out = super().__new__(cls, shapes)
        out.ragged_dims = ragged_dims
        return out

    def __reduce__(self) -> Any:
        return Shapes, (list(self), self.ragged_dims)


def check_settings(batch_first: Any, padding_value: Any, mask_value: Any) -> tuple[bool, tuple[Any, bool]]:
    """Checked `(batch_first, flags)`."""
    check_bool("batch_first", batch_first)
    return batch_first, (check_number("padding_value", padding_value), check_bool("mask_value", mask_value))


def check_ragged(ragged_dims: Any, rank: int) -> tuple[int, ...] | None:
    """Ragged dims as ascending non-negative ints.

    Raises:
        TypeError: Not ints. ValueError: Out of range or repeated.
    """
    if ragged_dims is None:
        return None
    dims = (ragged_dims,) if isinstance(ragged_dims, Integral) else ragged_dims
    if isinstance(dims, (str, bytes)) or not isinstance(dims, Iterable):
        raise TypeError(f"ragged_dims must be an int or ints, got {type(ragged_dims).__name__}")
    out = []
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, Integral):
            raise TypeError(f"ragged_dims must be ints, got {type(d).__name__}")
        d = int(d)
        if not -rank <= d < rank:
            raise ValueError(f"ragged dim {d} is out of range for elements of rank {rank}")
        out.append(d % rank)
    if len(set(out)) != len(out):
        raise ValueError(f"ragged_dims repeats a dim: {tuple(dims)}")
    return tuple(sorted(out))


def _items(tensors: tuple[Any, ...]) -> Sequence[Any]:
    if len(tensors) != 1:
        return tensors
    only = tensors[0]
    if isinstance(only, (str, bytes, Mapping)):
        raise TypeError(f"cannot build a NestedTensor from {type(only).__name__}")
    if isinstance(only, NestedTensor):
        return only.unbind()
    if isinstance(only, Tensor) or hasattr(only, "__array_interface__"):
        return tensors
    if isinstance(only, (list, tuple)):
        return only
    if not isinstance(only, Iterable):
        raise ValueError(
            f"one argument must be an iterable of elements, got {type(only).__name__}; "
            "give several elements, or a list of them"
        )
    return list(only)


def _element(item: Any) -> Tensor:
    if type(item) is Tensor:
        return item
    if isinstance(item, (str, bytes, Mapping)) or item is None:
        raise TypeError(f"an element must be a tensor, an array, a number or a nested list, got {type(item).__name__}")
    if isinstance(item, NestedTensor):
        raise TypeError("a NestedTensor cannot be an element of another one; use torch.cat to join batches")
    if isinstance(item, Tensor):
        if item.is_nested:
            raise TypeError("torch.nested tensors go through NestedTensor.from_torch_nested")
        if item.layout != torch.strided:
            raise _not_strided(item)
        kind = type(item)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # e.g. FakeTensor: plain as far as torch goes
            return item
        return item.as_subclass(Tensor)
    return torch.as_tensor(item)


def _not_strided(item: Tensor) -> TypeError:
    return TypeError(f"an element must be a dense tensor, got one of layout {item.layout}; use its to_dense()")


def _sequences(elements: Sequence[Tensor], batch_first: bool) -> tuple[Tensor, Layout] | None:
    """The common case at the cost of one `torch.cat`: CPU tensors that differ in dim 0 at most.

    `cat` compares the other sizes and devices and promotes dtypes itself. `None` where it refuses, or where an element
    is a scalar or of another rank: the general way then finds out why.
    """
    if not elements[0].is_cpu:
        return None
    try:
        lengths = list(map(_rows_of, elements))
        if 0 in lengths and len(set(map(_rank_of, elements))) != 1:  # cat overlooks shape (0,) among others
            return None
        values = torch.cat(elements)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        return None
    if values.layout is not torch.strided:
        raise _not_strided(values)
    return values, Layout.from_lengths(lengths, tuple(values.shape[1:]), 0, batch_first)


def build(
    tensors: tuple[Any, ...],
    dtype: torch.dtype | None,
    device: Any,
    requires_grad: bool | None,
    pin_memory: bool,
    batch_first: bool,
    padding_value: Any,
    mask_value: bool,
    ragged_dims: Any,
) -> NestedTensor:
    """What `NestedTensor(...)` does; arguments and errors are documented there."""
    batch_first, flags = check_settings(batch_first, padding_value, mask_value)
    if len(tensors) == 1 and ragged_dims is None and isinstance(tensors[0], NestedTensor):
        source = tensors[0]
        values = values_of(source).clone()
        layout = source._layout.replace(batch_first=batch_first)
        return _finish(values, layout, flags, dtype, device, requires_grad, pin_memory)
    elements: Sequence[Tensor] = _items(tensors)
    if set(map(type, elements)) != {Tensor}:
        elements = [_element(item) for item in elements]
    elif dtype is None and device is None and ragged_dims is None and requires_grad is not False:
        packed = _sequences(elements, batch_first)
        if packed is not None:
            return _finish(*packed, flags, None, None, requires_grad, pin_memory)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if not elements:
        ragged = check_ragged(ragged_dims, 1 if ragged_dims not in (None, ()) else 0) or ()
        layout = Layout(Segments(torch.empty(0, len(ragged), dtype=torch.int64, device="cpu")), ragged, (), batch_first)
        values = torch.empty(0, dtype=dtype, device=device)
        return _finish(values, layout, flags, None, None, requires_grad, pin_memory)
    shapes = list(map(_shape_of, elements))  # attribute by attribute: thousands of elements cost their C calls only
    rank = len(shapes[0])
    if len(set(map(len, shapes))) > 1:
        i = next(i for i, shape in enumerate(shapes) if len(shape) != rank)
        raise ValueError(f"elements have different ranks: element 0 has {rank} dims, element {i} has {len(shapes[i])}")
    ragged, static = structure_of(shapes, rank, check_ragged(ragged_dims, rank))
    if device is None and not all(map(_on_cpu, elements)) and len(set(map(_device_of, elements))) > 1:
        first = elements[0].device
        i = next(i for i, t in enumerate(elements) if t.device != first)
        raise ValueError(
            f"elements are on different devices: element 0 on {first}, element {i} on {elements[i].device}; give device="
        )
    kind = elements[0].dtype
    kinds = set(map(_dtype_of, elements))
    if len(kinds) > 1 or dtype is not None:
        for other in kinds:
            kind = torch.promote_types(kind, other)
        kind = dtype or kind
        if kinds != {kind}:
            elements = [t.to(kind) for t in elements]
    if device is not None:
        elements = [t.to(device) for t in elements]
    layout = layout_of(elements, ragged, static, batch_first)
    if requires_grad is False:
        with torch.no_grad():
            values = pack_elements(elements, layout)
    else:
        values = pack_elements(elements, layout)
    return _finish(values, layout, flags, None, None, requires_grad, pin_memory)


def _finish(
    values: Tensor,
    layout: Layout,
    flags: Any,
    dtype: torch.dtype | None,
    device: Any,
    requires_grad: bool | None,
    pin_memory: bool,
) -> NestedTensor:
    if dtype is not None or device is not None:
        values = values.to(device=device, dtype=dtype)
    if requires_grad is False:
        values = values.detach()
    if pin_memory:
        values = values.pin_memory()
    if requires_grad and not values.requires_grad:
        values = values.detach().requires_grad_()
    if values.requires_grad and not torch.is_grad_enabled():
        with torch.enable_grad():  # a view made without it would not be part of the graph later
            return wrap(values, layout, flags)
    return wrap(values, layout, flags)


def _settings(ctor: dict[str, Any]) -> dict[str, Any]:
    known = (
        "dtype",
        "device",
        "requires_grad",
        "pin_memory",
        "batch_first",
        "padding_value",
        "mask_value",
        "ragged_dims",
    )
    for name in ctor:
        if name not in known:
            raise TypeError(f"unknown keyword {name!r}; the constructor knows {', '.join(known)}")
    batch_first, flags = check_settings(
        ctor.get("batch_first", True), ctor.get("padding_value", 0.0), ctor.get("mask_value", False)
    )
    return {
        "batch_first": batch_first,
        "flags": flags,
        "finish": {
            "dtype": ctor.get("dtype"),
            "device": ctor.get("device"),
            "requires_grad": ctor.get("requires_grad"),
            "pin_memory": ctor.get("pin_memory", False),
        },
        "ragged_dims": ctor.get("ragged_dims"),
    }


def _sizes(lengths: Any) -> Tensor:
    if isinstance(lengths, (NestedTensor, str, bytes)) or not (
        isinstance(lengths, (Tensor, Iterable)) or hasattr(lengths, "__array_interface__")
    ):
        raise TypeError(f"lengths must be a list of ints or an int tensor, got {type(lengths).__name__}")
    sizes = lengths
    if not isinstance(lengths, Tensor):
        held = isinstance(lengths, (list, tuple)) or hasattr(lengths, "__array_interface__")
        sizes = torch.as_tensor(lengths if held else list(lengths), device="cpu")
        if sizes.numel() == 0:
            sizes = sizes.to(torch.int64)
    if sizes.dtype.is_floating_point or sizes.dtype.is_complex or sizes.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {sizes.dtype}")
    sizes = sizes.detach().to("cpu", torch.int64)
    if sizes.dim() == 1:
        sizes = sizes[:, None]
    if sizes.dim() != 2:
        raise ValueError(f"lengths must be (B,) or (B, k), got shape {tuple(sizes.shape)}")
    if sizes.numel() and int(sizes.min()) < 0:
        i = int((sizes < 0).any(1).nonzero()[0])
        raise ValueError(f"element {i} has a negative length {sizes[i].tolist()}")
    return sizes.clone()


def _traced_segments(data: Any, lengths: Any, name: str) -> Any:
    """Segments of a list of lengths in a traced graph, `None` outside of one."""
    if not isinstance(data, Tensor) or not is_traced(data):
        return None
    if isinstance(lengths, Tensor):
        raise LengthsError(f"{name} with lengths that are a tensor (give a list, or build the NestedTensor outside)")
    from danling.tensors.tracing import listed

    table = [list(n) if isinstance(n, (list, tuple)) else [n] for n in lengths]
    for i, sizes in enumerate(table):
        if any(n < 0 for n in sizes):
            raise ValueError(f"element {i} has a negative length {sizes}")
    return listed(table, len(table[0]) if table else 1, data.device)


def _dense(name: str, data: Any) -> Tensor:
    """Dense data as a plain tensor that shares its memory.

    Raises:
        TypeError: Something else.
    """
    if type(data) is Tensor:
        return data
    if not isinstance(data, Tensor) or isinstance(data, NestedTensor) or data.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {type(data).__name__}")
    return _element(data)


def from_lengths(values: Tensor, lengths: Any, **ctor: Any) -> NestedTensor:
    """Wrap packed values `(sum(lengths), *static)`; see `NestedTensor.from_lengths`."""
    settings, values = _settings(ctor), _dense("values", values)
    traced = _traced_segments(values, lengths, "from_lengths")
    sizes = torch.empty(0, traced.k) if traced else _sizes(lengths)
    k = sizes.shape[1]
    if values.dim() < 1:
        raise ValueError("values must have at least one dim, the rows")
    segments = traced or Segments(sizes)
    rank = k + values.dim() - 1
    ragged = check_ragged(settings["ragged_dims"], rank)
    if ragged is None:
        ragged = tuple(range(k))
    if len(ragged) != k:
        raise ValueError(f"lengths have {k} sizes per element but ragged_dims={ragged}")
    if segments.rows != values.shape[0]:
        raise ValueError(f"lengths add up to {segments.rows} rows but values have {values.shape[0]}")
    layout = Layout(segments, ragged, tuple(values.shape[1:]), settings["batch_first"])
    return _finish(values, layout, settings["flags"], **settings["finish"])


def from_offsets(values: Tensor, offsets: Any, **ctor: Any) -> NestedTensor:
    """Wrap packed values with `(B+1,)` offsets; see `NestedTensor.from_offsets`."""
    values = _dense("values", values)
    if is_traced(values):
        if isinstance(offsets, Tensor):
            raise LengthsError("from_offsets with offsets that are a tensor")
        return from_lengths(values, [b - a for a, b in zip(offsets, offsets[1:])], **ctor)
    bounds = _sizes(offsets)
    if bounds.shape[1] != 1:
        raise ValueError(f"offsets must be (B+1,), got shape {tuple(bounds.shape)}")
    bounds = bounds[:, 0]
    if bounds.numel() == 0 or int(bounds[0]) != 0:
        raise ValueError("offsets must start with 0")
    lengths = bounds[1:] - bounds[:-1]
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"offsets decrease at element {int((lengths < 0).nonzero()[0])}")
    if int(bounds[-1]) != values.shape[0]:
        raise ValueError(f"the last offset is {int(bounds[-1])} but values have {values.shape[0]} rows")
    return from_lengths(values, lengths, **ctor)


def from_padded(padded: Tensor, lengths: Any, **ctor: Any) -> NestedTensor:
    """Real values of a padded tensor; see `NestedTensor.from_padded`."""
    settings, padded = _settings(ctor), _dense("padded", padded)
    traced = _traced_segments(padded, lengths, "from_padded")
    sizes = torch.empty(traced.batch_size, traced.k) if traced else _sizes(lengths)
    batch, k = sizes.shape
    rank = padded.dim() - 1
    ragged = check_ragged(settings["ragged_dims"], rank)
    if ragged is None:
        ragged = tuple(range(k))
    if len(ragged) != k:
        raise ValueError(f"lengths have {k} sizes per element but ragged_dims={ragged}")
    batch_first = settings["batch_first"]
    batch_dim = 0 if batch_first or rank == 0 else 1
    if rank < 0 or padded.shape[batch_dim] != batch:
        shape = tuple(padded.shape)
        raise ValueError(f"padded has shape {shape}, which is not a batch of the {batch} elements that lengths tell of")
    element = list(padded.shape)
    del element[batch_dim]
    segments = traced or Segments(sizes)
    for longest, d in zip(segments.max_sizes, ragged):
        if longest > element[d]:
            j = ragged.index(d)
            i = "?" if traced else int(sizes[:, j].argmax())
            raise ValueError(f"element {i} has length {longest} along dim {d}, above the padded extent {element[d]}")
    static = tuple(size for d, size in enumerate(element) if d not in ragged)
    layout = Layout(segments, ragged, static, batch_first)
    values = to_packed(padded, layout)
    return _finish(values, layout, settings["flags"], **settings["finish"])


def _box_sizes(valid: Tensor) -> Tensor:
    """Sizes `(B, k)`, on the CPU, of the boxes that a mask `(B, E1, ..., Ek)` marks; one synchronisation.

    Raises:
        ValueError: The marked positions of an element are no box that starts at index 0.
    """
    extents = valid.shape[1:]
    if len(extents) == 1:
        sizes = kernels.prefix_lengths(valid)[:, None].cpu()
        wrong = sizes[:, 0] < 0
    else:
        columns = []
        for d in range(len(extents)):
            columns.append(valid.any(tuple(e + 1 for e in range(len(extents)) if e != d)).sum(1))
        sizes = torch.stack(columns, 1)
        sizes = sizes * (sizes > 0).all(1, keepdim=True)
        box = torch.ones_like(valid)
        for d, extent in enumerate(extents):
            shape = [1] * valid.dim()
            shape[d + 1] = extent
            inside = torch.arange(extent, device=valid.device).view(shape)
            box &= inside < sizes[:, d].view(-1, *[1] * len(extents))
        outside = (box != valid).flatten(1).any(1)
        both = torch.cat([sizes, outside[:, None].to(sizes.dtype)], 1).cpu()
        sizes, wrong = both[:, :-1].contiguous(), both[:, -1] > 0
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(f"the valid region of element {i} has a gap or does not start at index 0")
    return sizes


def from_tensor_mask(tensor: Tensor, mask: Tensor, *, batched: bool = False, **ctor: Any) -> NestedTensor:
    """Real values of a padded tensor as a mask marks them; see `NestedTensor.from_tensor_mask`."""
    settings, tensor = _settings(ctor), _dense("tensor", tensor)
    flags, batch_first = settings["flags"], settings["batch_first"]
    if mask is None or isinstance(mask, (NestedTensor, str, bytes, Mapping)):
        raise TypeError(f"mask must be a dense tensor of bools or 0/1 integers, got {type(mask).__name__}")
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
    if mask.dtype != torch.bool:
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"mask must be bool or 0/1 integers, got {mask.dtype}")
        if mask.numel() and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("an integer mask must hold 0 and 1 only")
        mask = mask.bool()
    valid = ~mask if flags[1] else mask
    if valid.dim() == 0 or valid.dim() > tensor.dim():
        raise ValueError(f"mask {tuple(mask.shape)} does not fit tensor {tuple(tensor.shape)}")
    if valid.dim() == 1:
        if valid.shape[0] != tensor.shape[0]:
            raise ValueError(f"mask has {valid.shape[0]} entries but the tensor has {tensor.shape[0]} rows")
        chosen = tensor[valid]
        names = {"batch_first", "padding_value", "mask_value", "ragged_dims", *settings["finish"]}
        kept = {name: value for name, value in ctor.items() if name in names}
        return NestedTensor(chosen.unbind(0) if batched else [chosen], **kept)
    if not batch_first:
        tensor, valid = tensor.transpose(0, 1), valid.transpose(0, 1)
    if valid.shape != tensor.shape[: valid.dim()]:
        raise ValueError(f"mask {tuple(valid.shape)} does not fit tensor {tuple(tensor.shape)} (batch first)")
    sizes = _box_sizes(valid)
    rest = tuple(tensor.shape[valid.dim() :])
    rank = tensor.dim() - 1
    given = check_ragged(settings["ragged_dims"], rank)
    if valid.dim() == 2 and given in (None, (0,)):  # needs no look at thousands of shapes
        layout = Layout(Segments(sizes), (0,), rest, True)
        rows = to_packed(tensor, layout)
    elif not len(sizes):
        ragged = (0,) if given is None else given
        element_static = tuple(size for d, size in enumerate(tensor.shape[1:]) if d not in ragged)
        layout = Layout(
            Segments(torch.empty(0, len(ragged), dtype=torch.int64, device="cpu")), ragged, element_static, True
        )
        rows = tensor.new_empty((0, *element_static))
    else:
        shapes = [torch.Size((*row, *rest)) for row in sizes.tolist()]
        ragged, element_static = structure_of(shapes, rank, given)
        layout = Layout.from_shapes(shapes, ragged, rank, element_static, True)
        # Static dims that the mask shortens everywhere are cut first.
        cut = tensor
        for d, size in zip(layout.static_dims, layout.static_sizes):
            if size != cut.shape[d + 1]:
                cut = cut.narrow(d + 1, 0, size)
        rows = to_packed(cut, layout)
    if not batch_first:
        layout = layout.replace(batch_first=False)
    return _finish(rows, layout, flags, **settings["finish"])


def from_concatenated(concat: Tensor, shapes: Sequence[Sequence[int]], **ctor: Any) -> NestedTensor:
    """Inverse of `concatenate()`; see `NestedTensor.from_concatenated`."""
    settings, concat = _settings(ctor), _dense("concat", concat)
    if not isinstance(shapes, Iterable):
        raise TypeError(f"shapes must be a list of shapes, got {type(shapes).__name__}")
    sizes = [torch.Size(shape) for shape in shapes]
    given = settings["ragged_dims"]
    if given is None:
        given = getattr(shapes, "ragged_dims", None)
    if not sizes:
        if concat.numel():
            raise ValueError(f"there are no shapes but {concat.numel()} values")
        ragged = tuple(given or ())
        static = tuple(concat.shape[1:])
        layout = Layout(
            Segments(torch.empty(0, len(ragged), dtype=torch.int64, device="cpu")),
            ragged,
            static,
            settings["batch_first"],
        )
        return _finish(concat, layout, settings["flags"], **settings["finish"])
    rank = len(sizes[0])
    for i, shape in enumerate(sizes):
        if len(shape) != rank:
            raise ValueError(f"shapes have different ranks: element 0 has {rank} dims, element {i} has {len(shape)}")
    ragged, static = structure_of(sizes, rank, check_ragged(given, rank))
    layout = Layout.from_shapes(sizes, ragged, rank, static, settings["batch_first"])
    if layout.numel != concat.numel():
        raise ValueError(f"the shapes hold {layout.numel} values but concat has {concat.numel()}")
    values = concat.reshape(layout.rows, *static)
    return _finish(values, layout, settings["flags"], **settings["finish"])


def from_torch_nested(t: Any, **ctor: Any) -> NestedTensor:
    """A NestedTensor from PyTorch's own; see `NestedTensor.from_torch_nested`."""
    if isinstance(t, NestedTensor) or not getattr(t, "is_nested", False):
        raise TypeError(f"from_torch_nested needs a torch.nested tensor, got {type(t).__name__}")
    if t.layout != torch.jagged:
        parts = t.unbind()
        if "ragged_dims" not in ctor and not parts:
            return NestedTensor([], **ctor)
        return NestedTensor(list(parts), **ctor)
    settings = _settings(ctor)
    values, offsets = t.values(), t.offsets()
    ragged = t._ragged_idx - 1  # type: ignore[attr-defined]
    lengths = t.lengths()
    if lengths is not None:
        # Rows between the elements belong to nobody: leave them out.
        moved = values.movedim(ragged, 0)
        count, start = lengths.cpu(), offsets.cpu()
        keep = [moved[s : s + n] for s, n in zip(start.tolist(), count.tolist())]
        rows = torch.cat(keep) if keep else moved[:0]
        sizes = count
    else:
        rows = values.movedim(ragged, 0)
        host = offsets.cpu()
        sizes = host[1:] - host[:-1]
    layout = Layout(Segments(_sizes(sizes)), (ragged,), tuple(rows.shape[1:]), settings["batch_first"])
    return _finish(rows, layout, settings["flags"], **settings["finish"])


def to_torch_nested(x: NestedTensor) -> Tensor:
    """PyTorch's own nested tensor of the same values."""
    layout = x._layout
    if len(layout.ragged_dims) > 1:
        raise ValueError(f"torch.nested knows one ragged dim, got ragged_dims={layout.ragged_dims}")
    values = values_of(x)
    if layout.dense:
        return torch.nested.as_nested_tensor(list(values.unbind(0)), layout=torch.strided)
    d = layout.ragged_dims[0]
    offsets = layout.segments.on("offsets", values.device).clone()
    return torch.nested.nested_tensor_from_jagged(values.movedim(0, d), offsets, jagged_dim=d + 1)


def nested_like(x: NestedTensor, tensor: Tensor, strict: bool = True) -> NestedTensor:
    """A dense tensor in the structure of `x`.

    Args:
        x: Whose layout is used.
        tensor: Dense, of `x.shape`; or a NestedTensor of equal layout, which is cloned.
        strict: With `False` each element keeps the overlap of its own extent and the dense one; the batch must agree.

    Raises:
        ValueError: The shape or the layout differs.
    """
    layout = x._layout
    if isinstance(tensor, NestedTensor):
        if tensor._layout != layout:
            raise ValueError(f"nested_like needs an equal structure, but tensor {difference(tensor._layout, layout)}")
        return wrap(values_of(tensor).clone(), layout, x._flags)
    tensor = _dense("tensor", tensor)
    if tensor.shape == layout.shape:
        return wrap(to_packed(tensor, layout), layout, x._flags)
    if strict:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}, the NestedTensor {tuple(layout.shape)}")
    batch_dim = layout.batch_dim
    if tensor.dim() != layout.rank + 1 or tensor.shape[batch_dim] != layout.batch_size:
        raise ValueError(
            f"tensor of shape {tuple(tensor.shape)} has not the batch and rank of {tuple(layout.shape)}, "
            "which strict=False needs too"
        )
    extents = int64_tensor([size for d, size in enumerate(tensor.shape) if d != batch_dim])
    sizes = torch.minimum(layout.sizes, extents)
    ragged = layout.ragged_dims
    static = tuple(min(size, int(extents[d])) for d, size in zip(layout.static_dims, layout.static_sizes))
    kept = Layout(Segments(sizes[:, list(ragged)].contiguous()), ragged, static, layout.batch_first)
    for d, size in zip(kept.static_dims, static):
        tensor = tensor.narrow(kept.shape_dim(d), 0, size)
    return wrap(to_packed(tensor, kept), kept, x._flags)
