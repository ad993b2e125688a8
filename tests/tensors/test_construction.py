"""Construction, conversion and the properties of NestedTensor."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from danling.tensors import Layout, NestedTensor, PNTensor

A, B = torch.arange(6.0).view(3, 2), torch.arange(2.0).view(1, 2)


def test_items_of_every_kind():
    assert NestedTensor([1, 2, 3]).shape == (3,) == NestedTensor(1, 2, 3).shape
    assert NestedTensor(A).shape == (1, 3, 2)
    assert NestedTensor(A.numpy()).shape == (1, 3, 2)
    assert NestedTensor(t for t in (A, B)).shape == (2, 3, 2)
    assert NestedTensor([[1.0, 2.0], [3.0]]).tolist() == [[1.0, 2.0], [3.0]]
    assert NestedTensor([1, 2], [3]).dtype == torch.int64
    assert NestedTensor(A, B.half()).dtype == torch.float32
    x = NestedTensor(A.t(), ragged_dims=1)
    assert NestedTensor(x).ragged_dims == (1,) and NestedTensor(x).structure == x.structure


def test_structure_and_fields():
    x = NestedTensor(A, B)
    assert x.ragged_dims == (0,) and len(x) == 2 and x.numel() == 8 and x.nbytes == 32
    assert (
        x._offsets.tolist() == [0, 3, 4] and x._permutation == (0, 1) and x._physical_shape.tolist() == [[3, 2], [1, 2]]
    )
    assert x.lengths.tolist() == [3, 1] and x.occupancy == 8 / 12
    assert x.size() == (2, 3, 2) and x.size(1) == 3 and x.dim() == x.ndim == 3 and x.stride() == (6, 2, 1)
    assert isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_nested is False
    assert isinstance(x.structure, Layout) and (x + 1).structure is x.structure
    with pytest.raises(AttributeError, match="immutable"):
        x.structure.ragged_dims = (1,)


def test_ragged_dims_are_inferred_or_declared():
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 2, 7)]
    x = NestedTensor(images)
    assert x.ragged_dims == (1, 2) and x.concat.shape == (34, 3) and x._permutation == (1, 2, 0)
    assert x.mask.shape == (2, 3, 4, 7)
    one = NestedTensor(images[:1], ragged_dims=(1, -1))
    assert one.ragged_dims == (1, 2)
    assert NestedTensor(A, A).ragged_dims == (0,) and NestedTensor(A, A, ragged_dims=()).ragged_dims == ()


def test_the_constructor_copies():
    a = A.clone()
    x = NestedTensor([a])
    x.concat.zero_()
    assert torch.equal(a, A) and not a.requires_grad


@pytest.mark.parametrize("empty", [(), ([],)])
def test_an_empty_batch(empty):
    x = NestedTensor(*empty)
    assert x.shape == (0,) and len(x) == 0 and x.ragged_dims == () and x.tolist() == [] and x.occupancy == 0.0


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: NestedTensor(3), ValueError, "iterable"),
        (lambda: NestedTensor(A, A[0]), ValueError, "element 0 has 2 dims, element 1 has 1"),
        (lambda: NestedTensor(A, torch.zeros(2, 3), ragged_dims=0), ValueError, "dim 1 .* size 2 .* 3 in element 1"),
        (lambda: NestedTensor(A, ragged_dims=2), ValueError, "out of range"),
        (lambda: NestedTensor([A], ragged_dims=(0, -2)), ValueError, "repeats"),
        (lambda: NestedTensor(A, batch_first=1), TypeError, "batch_first"),
        (lambda: NestedTensor(A, mask_value=0), TypeError, "mask_value"),
        (lambda: NestedTensor(A, padding_value="x"), TypeError, "padding_value"),
        (lambda: NestedTensor(A, ragged_dims=0.5), TypeError, "ragged_dims"),
        (lambda: NestedTensor("abc"), TypeError, "str"),
        (lambda: NestedTensor({"a": A}), TypeError, "dict"),
        (lambda: NestedTensor(A, torch.zeros(1, 2, device="meta")), ValueError, "element 0 on cpu, element 1 on meta"),
    ],
)
def test_bad_construction(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_tensor_mask_and_flags():
    x = NestedTensor([1, 2, 3], [4], padding_value=-1)
    assert x.tensor.tolist() == [[1, 2, 3], [4, -1, -1]] and x.mask.tolist() == [[True] * 3, [True, False, False]]
    x.padding_value, x.mask_value = 7, True
    assert x.tensor.tolist() == [[1, 2, 3], [4, 7, 7]] and x.mask.tolist() == [[False] * 3, [False, True, True]]
    x.tensor.zero_()
    assert x.concat.tolist() == [1, 2, 3, 4]
    big = NestedTensor(torch.tensor([2**60 + 1]), torch.tensor([1, 2]), padding_value=2**62 + 3)
    assert big.tensor.tolist() == [[2**60 + 1, 2**62 + 3], [1, 2]]
    x.padding_value = 0.5
    with pytest.raises(ValueError, match="cannot be held"):
        _ = x.tensor
    x.batch_first = False
    assert x.shape == (3, 2)


def test_batch_second():
    x = NestedTensor(A, B, batch_first=False)
    assert x.shape == (3, 2, 2) and x.mask.shape == (3, 2)
    torch.testing.assert_close(x.tensor, NestedTensor(A, B).tensor.transpose(0, 1))
    torch.testing.assert_close(x[0], A)


def test_from_lengths_and_offsets_wrap():
    values = torch.arange(8.0).view(4, 2)
    for x in (NestedTensor.from_lengths(values, [3, 1]), NestedTensor.from_offsets(values, torch.tensor([0, 3, 4]))):
        assert x.concat.data_ptr() == values.data_ptr() and [len(e) for e in x] == [3, 1]
    two = NestedTensor.from_lengths(torch.arange(8), [[2, 3], [1, 2]])
    assert two.ragged_dims == (0, 1) and two.shape == (2, 2, 3) and two[1].tolist() == [[6, 7]]
    for bad in ([3, 2], [5, -1]):
        with pytest.raises(ValueError):
            NestedTensor.from_lengths(values, bad)
    for bad in ([1, 3, 4], [0, 3, 2, 4], [0, 3]):
        with pytest.raises(ValueError):
            NestedTensor.from_offsets(values, bad)
    with pytest.raises(TypeError, match="unknown keyword"):
        NestedTensor.from_lengths(values, [4], ragged=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_from_padded_and_mask(batch_first):
    x = NestedTensor(A, B, batch_first=batch_first)
    for y in (
        NestedTensor.from_padded(x.tensor, [3, 1], batch_first=batch_first),
        NestedTensor.from_tensor_mask(x.tensor, x.mask, batch_first=batch_first),
        NestedTensor.from_tensor_mask(x.tensor, ~x.mask, batch_first=batch_first, mask_value=True),
        NestedTensor.from_tensor_mask(x.tensor, x.mask.int(), batch_first=batch_first),
    ):
        assert y.structure == x.structure and torch.equal(y.concat, x.concat)
    with pytest.raises(ValueError, match="above the padded extent"):
        NestedTensor.from_padded(x.tensor, [4, 1], batch_first=batch_first)


def test_masks_with_gaps_and_boxes():
    with pytest.raises(ValueError, match="element 1 has a gap"):
        NestedTensor.from_tensor_mask(torch.zeros(2, 3), torch.tensor([[True, True, False], [True, False, True]]))
    image = NestedTensor([torch.rand(2, 3), torch.rand(3, 1)])
    again = NestedTensor.from_tensor_mask(image.tensor, image.mask)
    assert again.structure == image.structure and torch.equal(again.concat, image.concat)
    broken = image.mask
    broken[1, 0, 0] = False
    with pytest.raises(ValueError, match="element 1"):
        NestedTensor.from_tensor_mask(image.tensor, broken)
    keep = torch.tensor([True, False, True])
    assert NestedTensor.from_tensor_mask(A, keep).shape == (1, 2, 2)
    assert NestedTensor.from_tensor_mask(A, keep, batched=True).shape == (2, 2)


def test_concatenate_round_trips_channel_first_of_one():
    x = NestedTensor(list(torch.rand(1, 2, 5)), ragged_dims=1)
    concat, shapes = x.concatenate()
    y = NestedTensor.from_concatenated(concat, shapes)
    assert y.structure == x.structure and torch.equal(y[0], x[0]) and shapes == (torch.Size((2, 5)),)
    with pytest.raises(ValueError, match="values"):
        NestedTensor.from_concatenated(concat[:-1], shapes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_nested_both_ways():
    x = NestedTensor(A, B, requires_grad=True)
    jagged = x.to_torch_nested()
    assert jagged.layout == torch.jagged and torch.equal(jagged.values(), x.concat)
    back = NestedTensor.from_torch_nested(jagged)
    assert back.structure == x.structure
    back.concat.sum().backward()
    assert torch.equal(x.grad.concat, torch.ones(4, 2))
    strided = torch.nested.nested_tensor([A, B])
    assert NestedTensor.from_torch_nested(strided).structure == x.structure
    with pytest.raises(ValueError, match="one ragged dim"):
        NestedTensor(torch.rand(2, 3), torch.rand(3, 1)).to_torch_nested()


def test_nested_like():
    x = NestedTensor(A, B)
    y = x.nested_like(x.tensor + 1)
    assert torch.equal(y.concat, x.concat + 1)
    with pytest.raises(ValueError, match="shape"):
        x.nested_like(torch.zeros(2, 4, 2))
    assert [len(e) for e in x.nested_like(torch.ones(2, 2, 2), strict=False)] == [2, 1]
    with pytest.raises(ValueError, match="structure"):
        x.nested_like(NestedTensor(A, A))


def test_numbers_truth_and_refusals():
    x = NestedTensor(A, B)
    with pytest.raises(RuntimeError, match="any"):
        bool(x)
    with pytest.raises(RuntimeError, match="8 values"):
        x.item()
    assert NestedTensor(torch.tensor([2.5])).item() == 2.5 and float(NestedTensor(torch.tensor([2.5]))) == 2.5
    for name in ("data_ptr", "numpy", "untyped_storage"):
        with pytest.raises(RuntimeError, match="concat"):
            getattr(x, name)()
    with pytest.raises(ValueError, match="padded positions"):
        torch.take(x, torch.tensor([0]))
    assert hash(x) == hash(x) and (x == x).concat.all()


def test_plain_values_whatever_is_wrapped():
    marked = NestedTensor.from_lengths(PNTensor([1.0, 2.0, 3.0]), [1, 2])
    assert type(marked.concat) is torch.Tensor
    weight = torch.nn.Parameter(torch.ones(3, 2))
    x = NestedTensor.from_lengths(weight, [1, 2])
    assert type(x.concat) is torch.Tensor and x.concat.data_ptr() == weight.data_ptr()
    x.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(3, 2))


@pytest.mark.parametrize("lengths", [np.array([1, 2], dtype=np.int32), (i for i in (1, 2)), [np.int64(1), 2], (1, 2)])
def test_lengths_of_any_integer_kind(lengths):
    assert NestedTensor.from_lengths(torch.arange(3), lengths).tolist() == [[0], [1, 2]]


def test_numbers_of_numpy_become_those_of_python():
    x = NestedTensor([1, 2], [3], padding_value=np.int64(-1), ragged_dims=np.int64(0))
    assert type(x.padding_value) is int and x.ragged_dims == (0,)
    with pytest.raises(TypeError, match="NestedTensor"):
        x + np.ones(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NestedTensor(torch.eye(2).to_sparse(), torch.eye(2).to_sparse()), "sparse_coo"),
        (lambda: NestedTensor([A], dtype="float32"), "torch.dtype"),
        (lambda: NestedTensor.from_lengths([1.0, 2.0], [1, 1]), "values must be a dense tensor, got list"),
        (lambda: NestedTensor.from_lengths(A, None), "NoneType"),
        (lambda: NestedTensor.from_lengths(A, 3), "int"),
        (lambda: NestedTensor.from_padded(NestedTensor(A), [1]), "padded must be a dense tensor"),
        (lambda: NestedTensor.from_offsets([1], [0, 1]), "values must be a dense tensor"),
        (lambda: NestedTensor.from_tensor_mask(A, None), "mask must be"),
        (lambda: NestedTensor.from_concatenated(A, 3), "list of shapes"),
        (lambda: NestedTensor(A).nested_like([1, 2]), "dense tensor, got list"),
    ],
)
def test_wrong_kinds_of_data(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_call_that_reaches_a_dense_tensor_first():
    x, dense = NestedTensor(A, B), torch.zeros(2, 3, 2)
    index = torch.zeros_like(x, dtype=torch.int64)
    for call in (
        lambda: torch.gather(dense, 1, index),
        lambda: dense.scatter(1, index, x),
        lambda: torch.nn.functional.layer_norm(dense, (2,), weight=x),
    ):
        with pytest.raises(TypeError, match=r"shape \(2, 3, 2\) \(argument 1\).*nested_like"):
            call()
    for call in (lambda: torch.nn.functional.embedding(index, x), lambda: torch.as_strided(x, (1,), (1,))):
        with pytest.raises((TypeError, RuntimeError), match="dense"):
            call()


def test_format_and_names():
    one = NestedTensor([1.5])
    assert f"{one:.2f}" == "1.50" and f"{one}" == str(one)
    with pytest.raises(TypeError, match="8 values"):
        format(NestedTensor(A, B), ".2f")
    assert {"concat", "occupancy", "sum"} <= set(dir(one))
    with pytest.raises(IndexError, match=r"range of \[-3, 2\]"):
        NestedTensor(A, B).size(3)


def test_repr_is_short_and_whole():
    assert repr(NestedTensor.from_lengths(torch.empty(0, 4), [])) == (
        "NestedTensor([], shape=(0, 0, 4), dtype=torch.float32, device='cpu', ragged_dims=(0,))"
    )
    assert repr(torch.nn.Parameter(NestedTensor(A, B))).startswith("Parameter containing:\nNestedTensor([")
    assert "batch_first=False" in repr(NestedTensor(A, B, batch_first=False))
    large = repr(NestedTensor([torch.zeros(300, 3), torch.zeros(200, 3)]))
    assert "..." in large and len(large.splitlines()) < 30
    assert "..." not in repr(NestedTensor([torch.zeros(30, 3), torch.zeros(20, 3)]))


def test_repr_names_what_matters():
    x = NestedTensor(*[torch.zeros(2)] * 12, requires_grad=True)
    text = repr(x)
    assert "12 elements" in text and "requires_grad=True" in text and "ragged_dims=(0,)" in text
    assert "grad_fn=<MulBackward0>" in repr(x * 2)


def test_copies():
    x = NestedTensor(A, B, requires_grad=True)
    (x * x).tensor.sum().backward()
    deep = copy.deepcopy(x)
    assert deep.concat.data_ptr() != x.concat.data_ptr() and torch.equal(deep.grad.concat, x.grad.concat)
    assert copy.copy(x).concat.data_ptr() == x.concat.data_ptr()


def test_meta_device():
    x = NestedTensor(A, B).to("meta")
    y = torch.nn.functional.linear(x, torch.zeros(5, 2, device="meta")).relu()
    assert y.shape == (2, 3, 5) and y.tensor.shape == (2, 3, 5) and y.mask.device.type == "meta"


def test_import_loads_nothing_else_and_replaces_nothing():
    code = (
        "import sys, torch, torch.nn.functional as F\n"
        "before = set(sys.modules); kept = (torch.cat, F.linear, torch.Tensor.add)\n"
        "import danling.tensors\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert kept == (torch.cat, F.linear, torch.Tensor.add)\n"
        "import importlib.metadata as md\n"
        "print(sorted(m for m in new if m in md.packages_distributions() and m not in ('danling', 'torch')))\n"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("[]", "['numpy']"), out.stdout


def test_the_quick_ways_in_agree_with_the_general_ones() -> None:
    padded, lengths = torch.randn(4, 5, 3), torch.tensor([2, 0, 5, 1])
    quick = NestedTensor.from_padded(padded, lengths)
    general = NestedTensor.from_padded(padded, lengths.int(), padding_value=0.0)
    assert quick.concat.equal(general.concat)
    assert quick.structure == general.structure
    assert quick.structure.sizes.equal(general.structure.sizes)
    lengths.fill_(9)  # not shared
    assert quick.lengths.tolist() == [2, 0, 5, 1]
    parts = list(quick.unbind())
    assert NestedTensor(parts).structure == NestedTensor(*parts).structure == quick.structure
    weight = torch.nn.Parameter(torch.ones(2, 3))
    for mixed in ([weight, parts[0]], [parts[0], weight]):
        batch = NestedTensor(mixed)
        assert type(batch.concat) is torch.Tensor
        assert batch.requires_grad
    padded.requires_grad_()
    NestedTensor.from_padded(padded, quick.lengths).concat.sum().backward()
    assert padded.grad.sum(2).sum(1).tolist() == [6.0, 0.0, 15.0, 3.0]
