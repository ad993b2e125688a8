"""Losses over structures the per-element law does not reach: channel-first, dense operands, ragged choices, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from danling.tensors import NestedTensor, strict

LENGTHS = (3, 1, 5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with strict():
        yield


def rows(*tail, lengths=LENGTHS):
    return [torch.randn(n, *tail) for n in lengths]


def labels(classes=4, lengths=LENGTHS):
    return [torch.randint(0, classes, (n,)) for n in lengths]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_channel_first_scores(reduction: str, batch_first: bool) -> None:
    scores, target = [r.T.contiguous().requires_grad_() for r in rows(4)], labels()
    if batch_first:
        x = NestedTensor(scores, ragged_dims=1)
        loss = F.cross_entropy(x, NestedTensor(target), reduction=reduction)
        expected = F.cross_entropy(torch.cat([s.T for s in scores]), torch.cat(target), reduction=reduction)
    else:  # with the batch second, dim 1 of .shape is the batch: the class dim is the last one
        x = NestedTensor([s.T for s in scores], batch_first=False)
        loss = F.cross_entropy(x, NestedTensor(target, batch_first=False), reduction=reduction)
        expected = F.cross_entropy(torch.cat([s.T for s in scores]), torch.cat(target), reduction=reduction)
    if reduction == "none":
        assert loss.structure == NestedTensor(target, batch_first=batch_first).structure
        loss = loss.concat
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss.sum(), scores)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), scores), strict=True):
        torch.testing.assert_close(a, b)


def test_images_with_class_maps() -> None:
    sizes = [(2, 3), (4, 1)]
    scores = NestedTensor([torch.randn(5, *s) for s in sizes], ragged_dims=(1, 2))
    target = NestedTensor([torch.randint(0, 5, s) for s in sizes])
    expected = F.cross_entropy(
        torch.cat([s.flatten(1).T for s in scores]), torch.cat([t.flatten() for t in target]), torch.rand(5).fill_(0.5)
    )
    torch.testing.assert_close(F.cross_entropy(scores, target, torch.full((5,), 0.5)), expected)


def test_further_static_dims() -> None:
    scores = NestedTensor(rows(6, 4))
    target = NestedTensor([torch.randint(0, 4, (n, 6)) for n in LENGTHS])
    expected = F.cross_entropy(scores.concat.movedim(-1, 1), target.concat, reduction="none")
    loss = F.cross_entropy(scores, target, reduction="none")
    assert loss.structure == target.structure
    torch.testing.assert_close(loss.concat, expected)


def test_a_padded_label_matrix_is_read_where_data_is() -> None:
    scores, target = NestedTensor(rows(4)), NestedTensor(labels(), padding_value=-7)
    expected = F.cross_entropy(scores, target)
    torch.testing.assert_close(F.cross_entropy(scores, target.tensor), expected)
    torch.testing.assert_close(F.cross_entropy(scores.tensor, target), expected)
    torch.testing.assert_close(F.cross_entropy(scores.tensor.transpose(1, 2), target), expected)
    x, y = NestedTensor(rows(4)), NestedTensor(rows(4), padding_value=float("nan"))
    torch.testing.assert_close(F.mse_loss(x, y.tensor), F.mse_loss(x.concat, y.concat))
    torch.testing.assert_close(F.mse_loss(x.tensor, y), F.mse_loss(x.concat, y.concat))


def test_one_label_per_element() -> None:
    scores = NestedTensor(list(torch.randn(3, 4)), ragged_dims=())
    target = torch.tensor([1, 3, 0])
    torch.testing.assert_close(F.cross_entropy(scores, target), F.cross_entropy(scores.tensor, target))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_varying_number_of_choices(settings: dict, reduction: str) -> None:
    choices = [c.requires_grad_() for c in rows(lengths=(3, 1, 5))]
    target = torch.tensor([2, 0, 4])
    loss = F.cross_entropy(NestedTensor(choices), target, reduction=reduction, **settings)
    each = torch.stack(
        [F.cross_entropy(c, t, reduction="sum", **settings) for c, t in zip(choices, target, strict=True)]
    )
    valid = (target != settings.get("ignore_index", -100)).sum()
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / valid}[reduction]
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss.sum(), choices), torch.autograd.grad(expected.sum(), choices), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_choice_that_does_not_exist() -> None:
    with pytest.raises(IndexError, match="element 1.*1 choices"):
        F.cross_entropy(NestedTensor(rows(lengths=(3, 1))), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="class weights"):
        F.cross_entropy(NestedTensor(rows(lengths=(3, 1))), torch.tensor([0, 0]), weight=torch.ones(3))


def test_weights_of_lower_rank_broadcast() -> None:
    x, y = NestedTensor(rows(4)), NestedTensor([torch.rand(n, 4) for n in LENGTHS])
    weight = torch.rand(4)
    logits = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        logits(x, y, weight=weight, pos_weight=weight), logits(x.concat, y.concat, weight=weight, pos_weight=weight)
    )
    per_element = torch.rand(3, 1, 1)
    spread = per_element.flatten().repeat_interleave(torch.tensor(LENGTHS))[:, None]
    torch.testing.assert_close(logits(x, y, per_element), logits(x.concat, y.concat, spread))
    ragged = NestedTensor([torch.rand(n, 4) for n in LENGTHS])
    torch.testing.assert_close(F.mse_loss(x, y, weight=ragged), F.mse_loss(x.concat, y.concat, weight=ragged.concat))
    var = NestedTensor([torch.rand(n, 1) + 0.1 for n in LENGTHS])
    torch.testing.assert_close(
        F.gaussian_nll_loss(x, y, var), F.gaussian_nll_loss(x.concat, y.concat, var.concat.expand(-1, 4))
    )


def test_modules_work_unchanged() -> None:
    x, target = NestedTensor(rows(4)), NestedTensor(labels())
    criterion = nn.CrossEntropyLoss(weight=torch.rand(4), label_smoothing=0.1, ignore_index=1)
    torch.testing.assert_close(criterion(x, target), criterion(x.concat, target.concat))
    torch.testing.assert_close(nn.SmoothL1Loss()(x, x + 1), torch.tensor(0.5))


def test_all_targets_ignored_is_nan_as_in_torch() -> None:
    x, target = NestedTensor(rows(4)), NestedTensor([torch.full((n,), -100) for n in LENGTHS])
    assert F.cross_entropy(x, target).isnan()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: F.mse_loss(x, NestedTensor([torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 4)])), "element 1"),
        (lambda x: F.mse_loss(x, NestedTensor([torch.ones(3, 4)])), "batch size 1"),
        (lambda x: F.mse_loss(x, torch.ones(3, 4)), r"padded shape \(3, 5, 4\)"),
        (lambda x: F.mse_loss(x, NestedTensor(list(x), batch_first=False)), "batch_first"),
        (lambda x: F.cross_entropy(x, NestedTensor(labels(lengths=(3, 1, 4)))), "element 2"),
        (
            lambda x: F.cross_entropy(NestedTensor([torch.ones(2, 3), torch.ones(1, 4)], ragged_dims=(0, 1)), x),
            "static",
        ),
        (lambda x: F.triplet_margin_loss(NestedTensor(rows()), NestedTensor(rows()), NestedTensor(rows())), "static"),
    ],
)
def test_structures_that_differ_are_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(NestedTensor(rows(4)))


def test_an_operand_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="target.*list"):
        F.mse_loss(NestedTensor(rows(4)), [1.0])


@pytest.mark.filterwarnings("ignore::danling.tensors.NestedTensorFallbackWarning")
@pytest.mark.parametrize("batch_first", [True, False])
def test_ctc(batch_first: bool) -> None:
    lengths, label_lengths = (7, 5, 9), (3, 2, 4)
    frames = [torch.randn(n, 6, dtype=torch.float64).log_softmax(-1).requires_grad_() for n in lengths]
    texts = [torch.randint(1, 6, (n,)) for n in label_lengths]
    sizes = torch.tensor(lengths), torch.tensor(label_lengths)
    expected = torch.stack(
        [
            F.ctc_loss(f, t, torch.tensor(len(f)), torch.tensor(len(t)), reduction="none")
            for f, t in zip(frames, texts, strict=True)
        ]
    )
    import danling.tensors.ops.table as table

    token = table._strict.set(False)
    try:
        x = NestedTensor(frames, batch_first=batch_first, padding_value=float("nan"))
        loss = F.ctc_loss(x, NestedTensor(texts, padding_value=-5), *sizes, reduction="none")
    finally:
        table._strict.reset(token)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss.sum(), frames), torch.autograd.grad(expected.sum(), frames), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match="ctc_loss runs padded"):
        F.ctc_loss(NestedTensor(frames), NestedTensor(texts), *sizes)


def test_an_index_that_is_out_of_bounds_names_its_element():
    scores = NestedTensor(torch.zeros(2, 3), torch.zeros(4, 3))
    labels = NestedTensor([0, 2], [1, 0, 3, 1])
    for call in (
        lambda: F.cross_entropy(scores, labels),
        lambda: F.nll_loss(scores, labels.tensor),
        lambda: F.embedding(labels, torch.zeros(3, 2)),
    ):
        with pytest.raises(IndexError, match="element 1:.*out of"):
            call()
