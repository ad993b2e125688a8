"""Losses: torch's own functions on the packed values, after the structures of all operands have been compared.

On packed values `mean` divides by real values and `none` has a row per real position, so no loss needs a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import first_nested, names, outside, row_error
from danling.tensors.ops.broadcast import align, expand_dense
from danling.tensors.ops.table import register
from danling.tensors.packing import difference, to_packed

# Which operands of a loss must have one structure, and which may be of lower rank.
_SAME: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "binary_cross_entropy": (("input", "target"), ("weight",)),
    "binary_cross_entropy_with_logits": (("input", "target"), ("weight", "pos_weight")),
    "gaussian_nll_loss": (("input", "target"), ("var",)),
    "hinge_embedding_loss": (("input", "target"), ()),
    "huber_loss": (("input", "target"), ("weight",)),
    "l1_loss": (("input", "target"), ("weight",)),
    "margin_ranking_loss": (("input1", "input2", "target"), ()),
    "mse_loss": (("input", "target"), ("weight",)),
    "poisson_nll_loss": (("input", "target"), ()),
    "smooth_l1_loss": (("input", "target"), ()),
    "soft_margin_loss": (("input", "target"), ()),
}
_EXACT_WEIGHT = {"gaussian_nll_loss", "huber_loss", "l1_loss", "mse_loss"}


@lru_cache(maxsize=64)
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(_signature(func).bind(*args, **kwargs).arguments)


def _packed(func: Any, name: str, x: Any, layout: Layout) -> Tensor:
    """Values of an operand that must have exactly `layout`.

    Raises:
        ValueError: It has another structure, or is dense and not of the padded shape.
        TypeError: It is no tensor.
    """
    if isinstance(x, NestedTensor):
        if x._layout is layout or x._layout == layout:
            return values_of(x)
        raise ValueError(f"{names(func)}: {name} {difference(x._layout, layout)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{names(func)}: {name} must be a tensor, got {type(x).__name__}")
    if x.shape != layout.shape:
        raise ValueError(
            f"{names(func)}: {name} is dense with shape {tuple(x.shape)}; next to a NestedTensor it must have the "
            f"padded shape {tuple(layout.shape)}"
        )
    return to_packed(x, layout)


def _result(out: Tensor, layout: Layout, like: NestedTensor) -> Tensor:
    """A reduced loss as it is; one with a row per position as a NestedTensor."""
    if out.dim() == 0:
        return out
    return wrap(out, layout.with_static(tuple(out.shape[1:])), like._flags)


@register("loss", *_SAME)
def same_structure(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Losses whose operands correspond value by value."""
    bound = _bind(func, args, kwargs)
    operands, weights = _SAME[func.__name__]
    like = first_nested(*(bound[name] for name in operands))
    layout = like._layout
    for name in operands:
        bound[name] = _packed(func, name, bound[name], layout)
    rows = bound[operands[0]]
    for name in weights:
        weight = bound.get(name)
        if isinstance(weight, NestedTensor):
            if weight._layout == layout:
                bound[name] = values_of(weight)
            elif name == "var" and weight._layout == _without(layout, layout.rank - 1):
                bound[name] = values_of(weight)
            else:
                _, (_, bound[name]) = align([like, weight], f"{names(func)}: {name}")
        elif isinstance(weight, Tensor):
            bound[name] = expand_dense(weight, layout, f"{names(func)}: {name}")
            if func.__name__ in _EXACT_WEIGHT:
                bound[name] = bound[name].expand_as(rows)
    return _result(func(**bound), layout, like)


@register("loss", "kl_div")
def kl_div(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`batchmean` divides by the number of elements."""
    bound = _bind(func, args, kwargs)
    like = first_nested(bound["input"], bound["target"])
    layout = like._layout
    for name in ("input", "target"):
        bound[name] = _packed(func, name, bound[name], layout)
    if bound.get("reduction") == "batchmean" and bound.get("reduce") is None and bound.get("size_average") is None:
        return func(**{**bound, "reduction": "sum"}) / layout.batch_size
    return _result(func(**bound), layout, like)


# Losses with a class dim.


def _without(layout: Layout, d: int) -> Layout:
    """The layout without the static element dim `d`."""

    def build() -> Layout:
        ragged = tuple(r - (r > d) for r in layout.ragged_dims)
        static = tuple(s for e, s in zip(layout.static_dims, layout.static_sizes) if e != d)
        return Layout(layout.segments, ragged, static, layout.batch_first)

    if d in layout.ragged_dims:
        return layout
    return layout.derive(("without", d), build)


def _with(layout: Layout, d: int, size: int) -> Layout:
    """The layout with a new static element dim `d`."""
    ragged = tuple(r + (r >= d) for r in layout.ragged_dims)
    static_dims = [e + (e >= d) for e in layout.static_dims]
    static = list(layout.static_sizes)
    static.insert(sum(e < d for e in static_dims), size)
    return Layout(layout.segments, ragged, tuple(static), layout.batch_first)


def _class_dim(func: Any, layout: Layout) -> int | None:
    """Element dim of the classes: `.shape` dim 1 if static, else the last; `None` when only a ragged dim is there."""
    if layout.rank == 0:
        raise ValueError(f"{names(func)}: elements of rank 0 have no class dim")
    if layout.batch_first and 0 not in layout.ragged_dims:
        return 0
    last = layout.rank - 1
    if last not in layout.ragged_dims:
        return last
    if layout.ragged_dims == (0,) and layout.rank == 1:
        return None
    raise ValueError(
        f"{names(func)}: neither dim 1 nor the last dim of {tuple(layout.shape)} is static, so none holds classes"
    )


def _dense_class_layout(func: Any, x: Tensor, target: Layout) -> tuple[int, Layout]:
    """Class dim and layout of dense scores that go with a nested target."""
    shape = tuple(x.shape)
    batch_dim = target.batch_dim
    for dim in dict.fromkeys((1, x.dim() - 1)):
        if dim != batch_dim and 0 < dim < len(shape) and shape[:dim] + shape[dim + 1 :] == tuple(target.shape):
            d = dim - 1
            return d, _with(target, d, shape[dim])
    raise ValueError(
        f"{names(func)}: dense scores of shape {shape} do not fit a target of padded shape {tuple(target.shape)}; "
        "the class dim is dim 1 or the last"
    )


def _scores(func: Any, bound: dict[str, Any]) -> tuple[NestedTensor, Layout, int | None]:
    """Like-tensor, layout and class dim of the scores."""
    x, target = bound["input"], bound["target"]
    like = first_nested(x, target)
    if isinstance(x, NestedTensor):
        return like, x._layout, _class_dim(func, x._layout)
    same_rank = x.dim() == target.dim()
    if same_rank and not target.dtype.is_floating_point:
        raise ValueError(
            f"{names(func)}: scores are dense with shape {tuple(x.shape)}, the target is a NestedTensor of shape "
            f"{tuple(target.shape)}; give padded scores with a class dim, or use target.concat"
        )
    if same_rank:  # class probabilities, or one row of labels per position
        return like, target._layout, _class_dim(func, target._layout)
    d, layout = _dense_class_layout(func, x, target._layout)
    return like, layout, d


def _to_dim_one(values: Tensor, layout: Layout, d: int) -> Tensor:
    """`(R, C, *rest)` from values whose class dim is element dim `d`."""
    position = layout.values_dim(d)
    return values if position == 1 else values.movedim(position, 1)


@register("loss", "cross_entropy", "nll_loss")
def classes(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Class scores against class indices (or probabilities, for `cross_entropy`)."""
    bound = _bind(func, args, kwargs)
    like, layout, d = _scores(func, bound)
    if d is None:
        return _ragged_choices(func, bound)
    target, out_layout = bound["target"], _without(layout, d)
    bound["input"] = _to_dim_one(_packed(func, "input", bound["input"], layout), layout, d)
    probabilities = func.__name__ == "cross_entropy" and isinstance(target, Tensor) and target.dtype.is_floating_point
    if probabilities:
        bound["target"] = _to_dim_one(_packed(func, "target", target, layout), layout, d)
    elif out_layout.dense and out_layout.rank == 0 and not isinstance(target, NestedTensor):
        bound["target"] = target
    else:
        bound["target"] = _packed(func, "target", target, out_layout)
    if bound["input"].dim() == 2:
        bound["target"] = bound["target"].reshape(bound["input"].shape if probabilities else -1)
    _plain_weight(func, bound)
    try:
        return _result(func(**bound), out_layout, like)
    except IndexError as error:
        wrong = outside(bound["target"], bound["input"].shape[1]) & (bound["target"] != bound.get("ignore_index", -100))
        raise row_error(error, out_layout, wrong) from error


def _plain_weight(func: Any, bound: dict[str, Any]) -> None:
    if isinstance(bound.get("weight"), NestedTensor):
        raise TypeError(f"{names(func)}: weight is one number per class, a dense (C,) tensor")


def _ragged_choices(func: Any, bound: dict[str, Any]) -> Tensor:
    """Elements `(C_i,)` with dense targets `(B,)`: every element has its own number of choices."""
    x, target = bound["input"], bound["target"]
    layout = x._layout
    if (
        isinstance(target, NestedTensor)
        or not isinstance(target, Tensor)
        or tuple(target.shape) != (layout.batch_size,)
    ):
        raise ValueError(
            f"{names(func)}: scores with a varying number of choices need a dense target ({layout.batch_size},)"
        )
    if bound.get("weight") is not None:
        raise ValueError(f"{names(func)}: class weights need a fixed number of classes, this one varies per element")
    ignore = bound.get("ignore_index", -100)
    smoothing = bound.get("label_smoothing", 0.0)
    values = values_of(x)
    segments = layout.segments
    offsets, lengths = segments.on("offsets", values.device), segments.on("lengths", values.device)
    if func.__name__ == "cross_entropy":
        values = kernels.segment_softmax(values, offsets, True)
    valid = target != ignore
    outside = valid & ((target < 0) | (target >= lengths))
    if bool(outside.any()):
        i = int(outside.nonzero()[0, 0])
        raise IndexError(
            f"{names(func)}: target {int(target[i])} of element {i} is out of bounds for {segments.table[i]} choices"
        )
    # An ignored element may have no row at all: it reads row 0 of the batch, and its loss is masked out.
    index = torch.where(valid, offsets[:-1] + target, torch.zeros_like(target))
    if values.shape[0]:
        loss = -values.index_select(0, index)
    else:
        loss = values.new_zeros(layout.batch_size)
    if smoothing:
        uniform = -kernels.segment_mean(values, offsets)
        loss = (1 - smoothing) * loss + smoothing * uniform
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    reduction = bound.get("reduction", "mean")
    if reduction == "none":
        return loss
    return loss.sum() / valid.sum() if reduction == "mean" else loss.sum()


@register("loss", "linear_cross_entropy")
def linear_cross_entropy(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Hidden states `(..., D)` with the classifier inside the loss; the rows are the batch."""
    bound = _bind(func, args, kwargs)
    x, target = bound["input"], bound["target"]
    like = first_nested(x, target)
    if isinstance(x, NestedTensor):
        layout = x._layout
    else:
        layout = _with(target._layout, target._layout.rank, x.shape[-1])
    last = layout.rank - 1
    if layout.rank == 0 or last in layout.ragged_dims:
        raise ValueError(f"{names(func)}: the last dim of {tuple(layout.shape)} must be static, it holds the features")
    out_layout = _without(layout, last)
    rows = _packed(func, "input", x, layout)
    labels = _packed(func, "target", target, out_layout)
    bound["input"], bound["target"] = rows.reshape(-1, rows.shape[-1]), labels.reshape(-1)
    out = func(**bound)
    return out if out.dim() == 0 else wrap(out.reshape(labels.shape), out_layout, like._flags)


@register("loss", "multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss")
def margins(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Margins over classes: one loss per row of classes."""
    bound = _bind(func, args, kwargs)
    like, layout, d = _scores(func, bound)
    if d is None:
        raise ValueError(f"{names(func)}: the class dim must be static, got elements of rank 1 with varying size")
    out_layout = _without(layout, d)
    many = func.__name__ != "multi_margin_loss"
    x = _packed(func, "input", bound["input"], layout).movedim(layout.values_dim(d), -1)
    target = bound["target"]
    if many:
        target = _packed(func, "target", target, layout).movedim(layout.values_dim(d), -1).reshape(-1, x.shape[-1])
    elif isinstance(target, NestedTensor) or out_layout.rank:
        target = _packed(func, "target", target, out_layout).reshape(-1)
    bound["input"], bound["target"] = x.reshape(-1, x.shape[-1]), target
    _plain_weight(func, bound)
    out = func(**bound)
    return out if out.dim() == 0 else wrap(out.reshape(x.shape[:-1]), out_layout, like._flags)


# Losses over feature vectors.


def _vectors(func: Any, bound: dict[str, Any], operands: tuple[str, ...]) -> tuple[NestedTensor, Layout]:
    like = first_nested(*(bound[name] for name in operands))
    layout = like._layout
    last = layout.rank - 1
    if layout.rank == 0 or last in layout.ragged_dims:
        raise ValueError(f"{names(func)}: the last dim of {tuple(layout.shape)} must be static, it holds the features")
    for name in operands:
        rows = _packed(func, name, bound[name], layout)
        bound[name] = rows.reshape(-1, rows.shape[-1])
    return like, _without(layout, last)


@register("loss", "triplet_margin_loss", "triplet_margin_with_distance_loss")
def triplets(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Triplets of feature vectors, one per position."""
    bound = _bind(func, args, kwargs)
    like, out_layout = _vectors(func, bound, ("anchor", "positive", "negative"))
    out = func(**bound)
    if out.dim() == 0:
        return out
    return wrap(out.reshape(out_layout.rows, *out_layout.static_sizes), out_layout, like._flags)


@register("loss", "cosine_embedding_loss")
def cosine_embedding(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Pairs of feature vectors, one per position, with a target of 1 or -1 for each."""
    bound = _bind(func, args, kwargs)
    like, out_layout = _vectors(func, bound, ("input1", "input2"))
    target = bound["target"]
    if isinstance(target, NestedTensor) or out_layout.rank:
        bound["target"] = _packed(func, "target", target, out_layout).reshape(-1)
    out = func(**bound)
    if out.dim() == 0:
        return out
    return wrap(out.reshape(out_layout.rows, *out_layout.static_sizes), out_layout, like._flags)


@register("loss", "ctc_loss", path="padded")
def ctc_loss(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """CTC over elements `(T, C)`; its kernel reads padded frames only up to `input_lengths`."""
    bound = _bind(F.ctc_loss, args, kwargs)
    scores, targets = bound["log_probs"], bound["targets"]
    if isinstance(scores, NestedTensor):
        if scores._layout.ragged_dims != (0,) or scores._layout.rank != 2:
            raise ValueError(f"ctc_loss: log_probs need elements (T, C) with T ragged, got {tuple(scores.shape)}")
        bound["log_probs"] = scores.tensor.transpose(0, 1) if scores.batch_first else scores.tensor
    if isinstance(targets, NestedTensor):
        if targets._layout.ragged_dims != (0,) or targets._layout.rank != 1:
            raise ValueError(f"ctc_loss: targets need elements (S,), got {tuple(targets.shape)}")
        # Labels outside the elements are never read, but must be legal ones.
        layout = targets._layout.replace(batch_first=True)
        bound["targets"] = wrap(values_of(targets), layout, (0, False)).tensor
    return F.ctc_loss(**bound)
