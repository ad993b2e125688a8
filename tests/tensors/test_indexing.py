"""Reading and writing by index: the container view, errors, and assignments that change sizes."""

import numpy as np
import pytest
import torch

from danling.tensors import NestedTensor

LENGTHS = [3, 1, 5]


def batch(**settings):
    torch.manual_seed(0)
    return NestedTensor([torch.randn(n, 4) for n in LENGTHS], **settings)


def same(x, parts):
    assert isinstance(x, NestedTensor) and len(x) == len(parts)
    for a, b in zip(x, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0], [2, 0]),
        ([True, False, True], [0, 2]),
        (torch.tensor([-1, 1]), [2, 1]),
        (torch.tensor([False, True, False]), [1]),
        (slice(3, None), []),
    ],
)
def test_elements(batch_first, index, chosen):
    x = batch(batch_first=batch_first)
    out = x[index]
    same(out, [x[i] for i in chosen])
    assert out.ragged_dims == (0,) and out.batch_first == batch_first


def test_an_element_is_a_view():
    x = batch()
    x[1].zero_()
    assert x.concat[3].eq(0).all()
    torch.testing.assert_close(x[-1], x.concat[4:])
    torch.testing.assert_close(x[0, 1:, 2], x.concat[1:3, 2])


def test_positions():
    x = batch()
    torch.testing.assert_close(x[:, 0], torch.stack([e[0] for e in x]))
    torch.testing.assert_close(x[:, -1], torch.stack([e[-1] for e in x]))
    torch.testing.assert_close(x[:, [0, -1]], torch.stack([e[[0, -1]] for e in x]))
    same(x[:, :-1], [e[:-1] for e in x])
    same(x[:, -2:, 1:3], [e[-2:, 1:3] for e in x])
    own = NestedTensor([2, -1], [0], [4, 4, 0])
    same(x[:, own], [e[i] for e, i in zip(x, own, strict=True)])
    b, t = torch.tensor([0, 2, 2]), torch.tensor([1, 4, -5])
    torch.testing.assert_close(x[b, t], torch.stack([x[0][1], x[2][4], x[2][0]]))
    same(x[x > 0], [e[e > 0] for e in x])
    same(x[x.sum(-1) > 0], [e[e.sum(-1) > 0] for e in x])
    same(x[x.mask], list(x))


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (3, IndexError, "out of range"),
        ((slice(None), 1), IndexError, "element 1 of size 1"),
        ((slice(None), [0, -2]), IndexError, "element 1"),
        ((torch.tensor([1]), torch.tensor([1])), IndexError, "element 1 of size 1"),
        (None, ValueError, "before the batch"),
        ([True, False], IndexError, "batch of 3"),
        ((0, 0, 0, 0), IndexError, "too many"),
    ],
)
def test_bad_indices(index, error, text):
    with pytest.raises(error, match=text):
        batch()[index]


def test_assignment_of_equal_sizes_writes_in_place():
    x = batch()
    pointer = x.concat.data_ptr()
    x[1] = torch.ones(1, 4)
    x[0] = 2.0
    x[:, 0:1] = 7.0
    x[x > 6] = -1.0
    assert x.concat.data_ptr() == pointer
    assert x[1].tolist() == [[-1.0] * 4] and x[0].tolist() == [[-1.0] * 4, [2.0] * 4, [2.0] * 4]


def test_assignment_of_another_size_changes_every_report():
    x = batch()
    view = x
    x[0] = torch.zeros(7, 4)
    assert view.shape == x.size() == (3, 7, 4) and x.mask.shape == (3, 7) and x._offsets.tolist() == [0, 7, 8, 13]
    with torch._C.DisableTorchFunctionSubclass():
        assert torch._C.TensorBase.size(x) == (13, 4)
    x[1:] = [torch.ones(2, 4), torch.ones(0, 4)]
    assert [len(e) for e in x] == [7, 2, 0] and (x + 1).shape == (3, 7, 4)


def test_assignment_stays_in_the_graph():
    x = batch()
    w = torch.randn(2, 4, requires_grad=True)
    x[1] = w * 2
    x.concat.sum().backward()
    torch.testing.assert_close(w.grad, torch.full((2, 4), 2.0))


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda x: x.__setitem__(0, torch.zeros(3, 5)), ValueError),
        (lambda x: x.__setitem__(0, torch.zeros(3)), ValueError),
        (lambda x: x.__setitem__(5, torch.zeros(3, 4)), IndexError),
        (lambda x: x.__setitem__(slice(0, 2), [torch.zeros(3, 4)]), ValueError),
        (lambda x: x.__setitem__((slice(None), 1), 0.0), IndexError),
        (lambda x: x.__setitem__((slice(None), slice(0, 1)), batch()), ValueError),
        (lambda x: x.__setitem__(slice(0, 2), [torch.zeros(9, 4), torch.zeros(1, 3)]), ValueError),
    ],
)
def test_failed_assignments_leave_everything_as_it_was(write, error):
    x = batch()
    before, structure = x.concat.clone(), x.structure
    with pytest.raises(error):
        write(x)
    assert torch.equal(x.concat, before) and x.structure is structure


def test_indices_of_python_numpy_and_torch_agree():
    x = batch()
    assert x[...] is x or torch.equal(x[...], x)
    assert torch.equal(x[np.int64(1)], x[1]) and torch.equal(x[torch.tensor(-1)], x[2])
    assert torch.equal(x[np.array([2, 0])], x[[2, 0]]) and torch.equal(x[x.mask.numpy()], x[x.mask])
    assert torch.equal(x[torch.tensor([1, 0, 1], dtype=torch.uint8)], x[[True, False, True]])
    for index in ("a", 1.0, {0}, np.bool_(True)):
        with pytest.raises(TypeError, match="an index is made of"):
            x[index]


def test_two_lists_are_pairs_as_in_torch():
    x = batch()
    dense = x.tensor
    for b, t, *rest in ([[0, 2], [1, 4]], [[0, 2], [1, 4], [3, 0]], [[2, 0], 1, [0, 1]], [[2, 0], [[0], [1]]]):
        torch.testing.assert_close(x[(b, t, *rest)], dense[(b, t, *rest)])
    torch.testing.assert_close(x[[True, False, True], [1, 4]], dense[[True, False, True], [1, 4]])
    x[[0, 2], [1, 4]] = 7.0
    assert x[0][1].eq(7).all() and x[2][4].eq(7).all() and x.concat.eq(7).sum() == 8
    with pytest.raises(IndexError, match="choose the elements first"):
        x[[0, 1], :, [0, 1]]
    with pytest.raises(IndexError, match="beyond element 1"):
        x[[0, 1], [0, 3]]


def test_one_value_for_each_chosen_one():
    x = batch()
    mask, count = x > 0, int((x > 0).sum())
    expected = x.concat.clone()
    expected[expected > 0] = torch.arange(float(count))
    x[mask] = torch.arange(float(count))
    torch.testing.assert_close(x.concat, expected)


def test_a_parameter_that_is_given_other_sizes_stays_one():
    weight = torch.nn.Parameter(batch())
    with torch.no_grad():
        weight[0] = torch.ones(9, 4)
    assert weight.is_leaf and weight.requires_grad and isinstance(weight, torch.nn.Parameter)
    weight.sum().backward()
    assert weight.grad.structure == weight.structure


def test_a_leaf_refuses():
    x = batch(requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        x[0] = 1.0
