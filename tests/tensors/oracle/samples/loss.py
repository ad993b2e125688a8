"""Samples of the losses: `none` obeys the law per element, `mean` and `sum` have the loss of all rows as reference."""

import torch
import torch.nn.functional as F
from tensors.oracle.sample import KINDS, Sample

from danling.tensors import NestedTensor

FP32 = (torch.float32,)
ROWS = ("sequences", "batch_second", "two_ragged", "single", "equal", "empty_element")
ALL = (*ROWS, "channel_first", "empty_batch")
LINES = ("sequences", "batch_second", "single", "equal", "empty_element")


def labels(shape, dtype):
    return torch.randint(0, shape[-1], shape[:-1])


def signs(shape, dtype):
    return (torch.randint(0, 2, shape) * 2 - 1).to(dtype)


def row_signs(shape, dtype):
    return signs(shape[:-1], dtype)


def log_probabilities(shape, dtype):
    return torch.log_softmax(KINDS["normal"](shape, torch.float64), -1).to(dtype)


def probabilities(shape, dtype):
    return log_probabilities(shape, torch.float64).exp().to(dtype)


def many_labels(shape, dtype):
    picked = torch.randint(-1, shape[-1], shape)
    return picked.masked_fill((picked == -1).cumsum(-1) > 0, -1)


def same(func, *kinds, layouts=ALL, **settings):
    """A loss whose operands correspond value by value."""

    def all_rows(reduction):
        def reference(d, *lists):
            flat = [torch.cat([t.reshape(-1) for t in elements]) if elements else torch.empty(0) for elements in lists]
            return func(*flat, reduction=reduction, **settings)

        return reference

    filled = tuple(name for name in layouts if name != "empty_batch")
    return [
        Sample(lambda d, *xs: func(*xs, reduction="none", **settings), kinds, layouts, FP32),
        *(
            Sample(
                lambda d, *xs, how=how: func(*xs, reduction=how, **settings),
                kinds,
                filled,
                FP32,
                reference=all_rows(how),
                isolated=False,
            )
            for how in ("mean", "sum")
        ),
    ]


def rowwise(func, *kinds, layouts=LINES, **settings):
    """A loss with one value per row of the last dim."""

    def reference(d, *lists):
        return func(*(torch.cat(elements) for elements in lists), **settings)

    return [
        Sample(lambda d, *xs: func(*xs, reduction="none", **settings), kinds, layouts, FP32),
        Sample(lambda d, *xs: func(*xs, **settings), kinds, layouts, FP32, reference=reference, isolated=False),
    ]


CLASSIFIER = torch.linspace(-1, 1, 20, dtype=torch.float64).sin().reshape(5, 4)


def ctc(d, x):
    """CTC of one label per element; the label is the same for all of them."""
    scores = torch.log_softmax(x, d(-1))
    if isinstance(x, NestedTensor):
        count = len(x)
        return F.ctc_loss(scores, torch.ones(count, 1).long(), x.lengths, torch.ones(count).long(), reduction="none")
    return F.ctc_loss(scores, torch.tensor([1]), torch.tensor(len(x)), torch.tensor(1), reduction="none")


def linear_cross_entropy(x, y, **settings):
    return F.linear_cross_entropy(x, CLASSIFIER.to(x.dtype), y, **settings)


SAMPLES = {
    "ctc_loss": [Sample(ctc, layouts=("sequences", "single", "equal"), dtypes=FP32)],
    "linear_cross_entropy": rowwise(linear_cross_entropy, "normal", labels),
    "mse_loss": same(F.mse_loss, "normal", "normal"),
    "l1_loss": same(F.l1_loss, "normal", "normal"),
    "huber_loss": same(F.huber_loss, "normal", "normal", delta=0.5),
    "smooth_l1_loss": same(F.smooth_l1_loss, "normal", "normal", beta=0.5),
    "binary_cross_entropy": same(F.binary_cross_entropy, "unit", "unit"),
    "binary_cross_entropy_with_logits": same(F.binary_cross_entropy_with_logits, "normal", "unit"),
    "hinge_embedding_loss": same(F.hinge_embedding_loss, "normal", signs),
    "margin_ranking_loss": same(F.margin_ranking_loss, "normal", "normal", signs, margin=0.1),
    "poisson_nll_loss": same(F.poisson_nll_loss, "normal", "positive"),
    "soft_margin_loss": same(F.soft_margin_loss, "normal", signs),
    "gaussian_nll_loss": same(F.gaussian_nll_loss, "normal", "normal", "positive"),
    "kl_div": [
        *same(F.kl_div, "normal", "unit")[::2],
        Sample(
            lambda d, x, y: F.kl_div(x, y, reduction="batchmean"),
            ("normal", "unit"),
            ROWS,
            FP32,
            reference=lambda d, x, y: sum(F.kl_div(a, b, reduction="sum") for a, b in zip(x, y, strict=True)) / len(x),
            isolated=False,
        ),
    ],
    "cross_entropy": [
        *rowwise(F.cross_entropy, "normal", labels),
        *rowwise(F.cross_entropy, "normal", labels, label_smoothing=0.1, ignore_index=1),
        *rowwise(F.cross_entropy, "normal", probabilities),
    ],
    "nll_loss": rowwise(F.nll_loss, log_probabilities, labels, ignore_index=2),
    "multi_margin_loss": rowwise(F.multi_margin_loss, "normal", labels),
    "multilabel_margin_loss": rowwise(F.multilabel_margin_loss, "normal", many_labels),
    "multilabel_soft_margin_loss": rowwise(F.multilabel_soft_margin_loss, "normal", "unit"),
    "triplet_margin_loss": rowwise(F.triplet_margin_loss, "normal", "normal", "normal"),
    "triplet_margin_with_distance_loss": rowwise(F.triplet_margin_with_distance_loss, "normal", "normal", "normal"),
    "cosine_embedding_loss": rowwise(F.cosine_embedding_loss, "normal", "normal", row_signs, margin=0.2),
}
