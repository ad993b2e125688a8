"""NestedTensors with each other and with dense operands: every reading of the table, and what is refused."""

import pytest
import torch

from danling.tensors import NestedTensor

LENGTHS = [3, 1, 5]


def batch(width=4, **settings):
    torch.manual_seed(0)
    return NestedTensor([torch.randn(n, width) for n in LENGTHS], **settings)


@pytest.mark.parametrize(
    "shape",
    [(), (4,), (1, 4), (1, 1, 4), (5, 4), (5, 1), (1, 5, 4), (1, 5, 1), (3, 1, 4), (3, 1, 1), (3, 5, 1), (3, 5, 4)],
)
def test_dense_operands_read_as_torch_aligns_them(shape):
    x = batch()
    parts = [e.clone().requires_grad_() for e in x.unbind()]
    dense = torch.randn(shape, requires_grad=True)
    out = NestedTensor(parts) * dense
    full = dense.expand(3, 5, 4)
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(out[i], parts[i] * full[i, :n])
    out.concat.pow(2).sum().backward()
    mine, dense.grad = dense.grad, None
    sum((e.detach() * dense.expand(3, 5, 4)[i, : len(e)]).pow(2).sum() for i, e in enumerate(parts)).backward()
    torch.testing.assert_close(mine, dense.grad)


def test_batch_second_aligns_with_its_own_shape():
    x = batch(batch_first=False)
    dense = torch.randn(5, 3, 1)
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close((x + dense)[i], x[i] + dense[:n, i])


def test_flat_elements_with_values_at_padding():
    x = NestedTensor([torch.ones(n) for n in LENGTHS])
    dense = torch.full((3, 5), float("nan"))
    for i, n in enumerate(LENGTHS):
        dense[i, :n] = i
    assert (x + dense).concat.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 4), (4, 4), (1, 3, 5, 4), (6, 4)])
def test_dense_operands_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="dense operand"):
        batch() + torch.zeros(shape)


def test_one_row_per_element_is_proposed():
    with pytest.raises(ValueError, match=r"x\[:, None\]"):
        batch() + torch.zeros(3, 4)


def test_pairs_meet_packed():
    left = NestedTensor([torch.randn(n, 1) for n in LENGTHS])
    right = NestedTensor([torch.randn(1, n) for n in LENGTHS], ragged_dims=1)
    out = left * right
    assert out.ragged_dims == (0, 1) and out.shape == (3, 5, 5)
    for i in range(3):
        torch.testing.assert_close(out[i], left[i] * right[i])


def test_static_and_ragged_dims_meet():
    rows = batch()
    flat = NestedTensor([torch.randn(1, 4) for _ in LENGTHS])
    for i in range(3):
        torch.testing.assert_close((rows + flat)[i], rows[i] + flat[i])
    fixed = NestedTensor(list(torch.randn(3, 1, 4)), ragged_dims=())
    for i in range(3):
        torch.testing.assert_close((fixed - rows)[i], fixed[i] - rows[i])


def test_equal_layouts_built_apart_combine():
    assert (batch() + batch()).structure == batch().structure


def test_mismatches_name_the_element():
    other = NestedTensor([torch.randn(n, 4) for n in (3, 2, 4)])
    with pytest.raises(ValueError, match="element 2 has sizes 5 and 4"):
        batch() + other
    with pytest.raises(ValueError, match="batch sizes 3 and 2"):
        batch() + other[:2]
    with pytest.raises(ValueError, match=r"transpose\(0, 1\)"):
        batch() + batch(batch_first=False)


def test_out_and_in_place():
    x, y = batch(), batch()
    out = torch.empty_like(x)
    assert torch.add(x, y, out=out) is out and torch.equal(out.concat, (x + y).concat)
    with pytest.raises(ValueError, match="dtype"):
        torch.add(x, y, out=out.double())
    with pytest.raises(ValueError, match="structure"):
        torch.add(x, y, out=batch(3))
    with pytest.raises(NotImplementedError, match="out="):
        torch.sum(x, 1, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="in place"):
        torch.ones(3, 5, 4).add_(x)


def test_forms_agree():
    x, y = batch(), batch()
    for form in (
        x + y,
        x.add(y),
        torch.add(x, y),
        torch.ops.aten.add.Tensor(x, y),
        torch.ops.aten.add(x, y),
        x.clone().add_(y),
        x.__radd__(y),
    ):
        torch.testing.assert_close(form.concat, x.concat + y.concat)
    torch.testing.assert_close((2 - x).concat, 2 - x.concat)
    torch.testing.assert_close((2 / x).concat, 2 / x.concat)
    torch.testing.assert_close((2.0**x).concat, 2.0**x.concat)
    torch.testing.assert_close((7 % (x.abs() + 1)).concat, 7 % (x.concat.abs() + 1))
    torch.testing.assert_close((x // 0.3).concat, x.concat // 0.3)
    assert ((x > 0) & ~(y < 0)).dtype == torch.bool
    torch.testing.assert_close(torch.special.expit(x).concat, torch.sigmoid(x).concat)
    torch.testing.assert_close(torch.absolute(x).concat, x.concat.abs())
