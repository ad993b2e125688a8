"""Alignment of inputs as pure functions, with the rules that the containers follow.

On a single call, `from_logits="auto"` looks at the data of that call. Containers decide over all data instead and
therefore never use these functions to choose between logits and probabilities.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from .chunk import View
from .inputs import Spec, to_rows
from .state import Source, drop_invalid

__all__ = [
    "base_preprocess",
    "preprocess_binary",
    "preprocess_classification",
    "preprocess_multiclass",
    "preprocess_multilabel",
    "preprocess_regression",
]


def base_preprocess(
    input: Any, target: Any, ignore_index: int | None = None, ignore_nan: bool = False
) -> tuple[Tensor, Tensor]:
    """Return valid rows as given: NestedTensors packed, sequences joined, ignored targets left out.

    Args:
        input: predictions: a tensor, a NestedTensor, or a sequence of numbers or tensors.
        target: targets, likewise.
        ignore_index: target value that does not count.
        ignore_nan: leave out rows whose target is NaN.

    Examples:
        >>> base_preprocess([0.1, 0.9, 0.4], [0, 1, -100], ignore_index=-100)
        (tensor([0.1000, 0.9000]), tensor([0, 1]))
    """
    spec = Spec(None)
    return drop_invalid(spec, to_rows(spec, input, target), View(ignore_index, ignore_nan))


base_preprocess._is_base = True  # type: ignore[attr-defined]


def preprocess_classification(
    input: Any,
    target: Any,
    *,
    num_classes: int | None = None,
    num_labels: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return probabilities and targets: multiclass with `num_classes`, multilabel with `num_labels`, else binary."""
    if num_classes is not None and num_labels is not None:
        raise ValueError("give num_classes or num_labels, not both")
    if num_classes is not None:
        return preprocess_multiclass(input, target, num_classes=num_classes, **options)
    if num_labels is not None:
        return preprocess_multilabel(input, target, num_labels=num_labels, **options)
    return preprocess_binary(input, target, **options)


def preprocess_binary(input: Any, target: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return probabilities `(n,)` and targets `(n,)`.

    Args:
        input: scores of any shape.
        target: as many targets, 0 or 1.
        **options: `mask`, `from_logits="auto"`, `ignore_index=-100`.

    Examples:
        >>> preprocess_binary(torch.tensor([[0.5], [2.0]]), torch.tensor([0, 1]))[0]
        tensor([0.6225, 0.8808])
    """
    return _prepare(Spec("binary", 1), input, target, **options)


def preprocess_multiclass(
    input: Any, target: Any, num_classes: int | None = None, *, channel_dim: int | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return probabilities `(n, C)` (or labels `(n,)`, as given) and targets `(n,)`.

    Args:
        input: scores with a class dim, or integer labels.
        target: integer targets.
        num_classes: number of classes; the size of the class dim if None.
        channel_dim: the class dim, where shapes do not tell.
        **options: as for `preprocess_binary`.

    Examples:
        >>> preprocess_multiclass(torch.zeros(1, 4, 2), torch.tensor([[0, -100]]), 4)
        (tensor([[0., 0., 0., 0.]]), tensor([0]))
    """
    return _prepare(Spec("multiclass", num_classes, channel_dim), input, target, **options)


def preprocess_multilabel(
    input: Any, target: Any, num_labels: int | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return probabilities `(n, L)` and targets `(n, L)`; rows without any valid label are left out.

    Args:
        input: scores `(..., L)`.
        target: targets of the same shape.
        num_labels: number of labels.
        **options: as for `preprocess_binary`.

    Examples:
        >>> preprocess_multilabel(torch.tensor([[0.2, 0.8]]), torch.tensor([[0, 1]]), 2)
        (tensor([[0.2000, 0.8000]]), tensor([[0, 1]]))
    """
    return _prepare(Spec("multilabel", num_labels), input, target, **options)


def preprocess_regression(
    input: Any, target: Any, num_outputs: int = 1, *, ignore_nan: bool = True, mask: Any = None
) -> tuple[Tensor, Tensor]:
    """Return values `(n,)` or `(n, k)` and targets.

    Args:
        input: floating point predictions.
        target: targets of the same shape.
        num_outputs: number of outputs.
        ignore_nan: leave out rows whose target is NaN.
        mask: bool, True where data is.

    Examples:
        >>> preprocess_regression([1.0, 2.0], [1.5, float("nan")])
        (tensor([1.]), tensor([1.5000]))
    """
    spec = Spec("regression", num_outputs)
    return drop_invalid(spec, to_rows(spec, input, target, mask), View(None, ignore_nan))


def _prepare(
    spec: Spec,
    input: Any,
    target: Any,
    *,
    mask: Any = None,
    from_logits: bool | str = "auto",
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor]:
    view = View(ignore_index)
    source = Source(spec, from_logits, to_rows(spec, input, target, mask))
    source.validate([view])
    return source.valid_rows(view, probabilities=True)
