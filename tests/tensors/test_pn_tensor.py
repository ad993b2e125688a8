"""PNTensor, tensor() and collation."""

from __future__ import annotations

import copy
import os
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from danling.tensors import Collator, NestedTensor, PNTensor, collate, register_collate, tensor, unregister_collate

Sample = namedtuple("Sample", "x y")


def test_dtype_rules_are_those_of_torch_tensor() -> None:
    for data in ([1, 2], [1.0, 2], [True], 3, [[1.5]]):
        assert torch.equal(tensor(data).tensor, torch.tensor(data)) and tensor(data).dtype == torch.tensor(data).dtype
        assert PNTensor(data).dtype == torch.tensor(data).dtype
    made = tensor([1, 2], dtype=torch.float64, requires_grad=True)
    assert made.dtype is torch.float64 and made.requires_grad and made.is_leaf and type(made) is PNTensor


def test_views_share_data_and_are_plain() -> None:
    x = PNTensor([1.0, 2.0])
    assert type(x.tensor) is torch.Tensor and x.tensor.data_ptr() == x.data_ptr() == x.concat.data_ptr()
    assert type(x.mask) is torch.Tensor and x.mask.all() and x.mask.shape == x.shape
    source = torch.zeros(2)
    PNTensor(source)[0] = 5
    assert source[0] == 0


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.to(torch.float64),
        lambda x: x[1:],
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) * x,
        lambda x: x.clone(),
        lambda x: x.flip(0),
        lambda x: torch.cat([x, x]),
        lambda x: x.chunk(3)[0],
        lambda x: torch.stack([x, torch.zeros(3)]),
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_the_mark_survives_ops_on_data(op) -> None:
    x = PNTensor([1.0, 2.0, 3.0])
    result = op(x)
    assert type(result) is PNTensor
    assert torch.equal(result.tensor, op(x.tensor))


def test_the_mark_ends_at_models_and_batches() -> None:
    x = PNTensor([1.0, 2.0, 3.0])
    assert type(nn.Linear(3, 2)(x)) is torch.Tensor
    assert type(x * torch.ones(3, requires_grad=True)) is torch.Tensor
    assert type(x * nn.Parameter(torch.ones(3), requires_grad=False)) is torch.Tensor
    batch = NestedTensor([torch.ones(2, 3), torch.ones(1, 3)])
    assert type(batch + x) is NestedTensor and type((batch + x)[0]) is torch.Tensor
    assert type((x + batch)._values) is torch.Tensor
    assert x.sum().item() == 6.0


def test_the_mark_never_reaches_a_batch() -> None:
    batch = default_collate([PNTensor([[1.0, 2.0]]), PNTensor([[3.0, 4.0], [5.0, 6.0]])])
    assert type(batch) is NestedTensor
    for value in (batch._values, batch.tensor, batch.concat, batch[0], (batch * 2)._values, *batch.unbind()):
        assert type(value) is torch.Tensor


def test_default_collate_recurses_into_structures() -> None:
    def sample(n):
        return {
            "x": PNTensor([float(n)] * n),
            "pair": (PNTensor([n]), torch.tensor(n)),
            "t": Sample(PNTensor([n] * n), n),
        }

    batch = default_collate([sample(1), sample(3)])
    assert type(batch["x"]) is NestedTensor and batch["x"].tensor.shape == (2, 3)
    assert type(batch["pair"][0]) is NestedTensor and torch.equal(batch["pair"][1], torch.tensor([1, 3]))
    assert isinstance(batch["t"], Sample) and batch["t"].x.lengths.tolist() == [1, 3]
    assert type(default_collate([torch.zeros(2), torch.ones(2)])) is torch.Tensor


def test_collator_settings_by_key_position_and_name() -> None:
    by_key = Collator(padding_value=7, fields={"labels": {"padding_value": -100}})
    batch = by_key([{"x": PNTensor([1]), "labels": PNTensor([1, 2])}, {"x": PNTensor([1, 2]), "labels": PNTensor([3])}])
    assert batch["labels"].tensor.tolist() == [[1, 2], [3, -100]]
    assert batch["x"].tensor.tolist() == [[1, 7], [1, 2]]
    by_position = Collator(fields={1: {"padding_value": 9}})
    pair = by_position([(PNTensor([1, 2]), PNTensor([1])), (PNTensor([1]), PNTensor([2, 3]))])
    assert isinstance(pair, tuple) and pair[1].tensor.tolist() == [[1, 9], [2, 3]]
    by_name = Collator(fields={"y": {"padding_value": 9}})
    named = by_name([Sample(PNTensor([1, 2]), PNTensor([1])), Sample(PNTensor([1]), PNTensor([2, 3]))])
    assert isinstance(named, Sample) and named.y.tensor.tolist() == [[1, 9], [2, 3]]
    channels = Collator(ragged_dims=1, batch_first=False)([PNTensor(torch.zeros(2, 5))])
    assert channels.ragged_dims == (1,) and not channels.batch_first
    assert collate([PNTensor([1]), PNTensor([2, 3])]).tensor.tolist() == [[1, 0], [2, 3]]
    again = pickle.loads(pickle.dumps(by_key))
    assert repr(again) == repr(by_key)
    with pytest.raises(TypeError, match="mapping"):
        Collator(fields=3)


def test_wrong_settings_are_refused_early() -> None:
    with pytest.raises(TypeError, match="batch_first"):
        Collator(batch_first=1)
    with pytest.raises(TypeError, match="paddding_value.*padding_value"):
        Collator(fields={"x": {"paddding_value": 1}})
    with pytest.raises(KeyError, match="labls.*labels"):
        Collator(fields={"labls": {"padding_value": 1}})([{"labels": PNTensor([1])}])
    with pytest.raises(KeyError, match="PNTensor"):
        Collator(fields={"x": {"padding_value": 1}})([PNTensor([1])])


def test_only_our_own_key_is_entered_and_it_can_be_removed() -> None:
    own = {}
    register_collate(own, padding_value=5)
    assert list(own) == [PNTensor]
    unregister_collate(own)
    unregister_collate(own)
    assert own == {}
    before = default_collate_fn_map[PNTensor]
    try:
        register_collate(padding_value=5)
        assert default_collate([PNTensor([1]), PNTensor([1, 2])]).tensor.tolist() == [[1, 5], [1, 2]]
        unregister_collate()
        with pytest.raises(RuntimeError):
            default_collate([PNTensor([1]), PNTensor([1, 2])])
    finally:
        default_collate_fn_map[PNTensor] = before


class Ragged(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return {"x": PNTensor(torch.arange(index + 1, dtype=torch.float32)), "y": index}


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loader_workers_give_the_batches_of_the_main_process(context: str) -> None:
    settings = {"batch_size": 4, "collate_fn": Collator(padding_value=-1)}
    expected = list(DataLoader(Ragged(), **settings))
    loader = DataLoader(Ragged(), num_workers=2, multiprocessing_context=context, persistent_workers=True, **settings)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(expected)
        for got, want in zip(batches, expected, strict=True):
            assert got["x"].structure == want["x"].structure and got["x"].padding_value == -1
            assert torch.equal(got["x"].concat, want["x"].concat) and torch.equal(got["y"], want["y"])


def test_a_thousand_batches_leave_nothing_open() -> None:
    loader = DataLoader(Ragged(), batch_size=4, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
    list(loader)

    def open_things() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))

    before = open_things()
    count = 0
    while count < 1000:
        count += sum(1 for _ in loader)
    after = open_things()
    assert after[0] <= before[0] + 4 and after[1] <= before[1] + 4


def test_what_is_marked_is_printed_so_and_goes_with_what_is_not():
    assert repr(PNTensor([1, 2])) == "PNTensor([1, 2])"
    assert repr(PNTensor([[1, 2], [3, 4]])) == "PNTensor([[1, 2],\n          [3, 4]])"
    batch = default_collate([PNTensor([1.0]), torch.ones(2)])
    assert type(batch) is NestedTensor and batch.tolist() == [[1.0], [1.0, 1.0]]
