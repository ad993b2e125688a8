"""Bad arguments raise before memory is touched, and say what is wrong."""

from __future__ import annotations

import pytest
import torch

from danling.tensors import kernels

O = torch.tensor([0, 2, 3])  # noqa: E741
V = torch.zeros(3, 2)
F = torch.zeros(())
pytestmark = pytest.mark.skipif(not kernels.info()["cpu"]["loaded"], reason=kernels.info()["reason"])

BAD = {
    "offsets dtype": (lambda: kernels.segment_sum(V, O.int()), "offsets must be int64"),
    "offsets rank": (lambda: kernels.segment_sum(V, O[None]), "offsets must be one-dimensional"),
    "no offsets": (lambda: kernels.segment_sum(V, O[:0]), "offsets must be one-dimensional"),
    "values rank": (lambda: kernels.segment_sum(F, O), "at least one dim"),
    "end of offsets": (lambda: kernels.segment_sum(V, torch.tensor([0, 2])), "end at 3"),
    "start of offsets": (lambda: kernels.segment_sum(V, torch.tensor([1, 3])), "begin at 0"),
    "offsets decrease": (lambda: kernels.segment_sum(V, torch.tensor([0, 4, 3])), "decrease at element 1"),
    "offsets beyond rows": (lambda: kernels.pad(V, torch.tensor([0, 9, 3]), None, [9], F), "decrease at element 1"),
    "negative offsets": (lambda: kernels.pad(V, torch.tensor([0, -4, 3]), None, [9], F), "decrease at element 0"),
    "max_sizes too small": (lambda: kernels.pad(V, O, None, [1], F), "element 0 has 2 rows, more than 1"),
    "max_sizes negative": (lambda: kernels.pad(V, O, None, [-1], F), "negative"),
    "no max_sizes": (lambda: kernels.pad(V, O, None, [], F), "ragged dims"),
    "fill dtype": (lambda: kernels.pad(V, O, None, [2], torch.tensor(0)), "fill must have the dtype"),
    "fill count": (lambda: kernels.pad(V, O, None, [2], torch.zeros(2)), "one value"),
    "sizes missing": (lambda: kernels.pad(V, O, None, [2, 2], F), "sizes are needed"),
    "sizes shape": (
        lambda: kernels.pad(V, O, torch.zeros(3, 2, dtype=torch.int64), [2, 2], F),
        "sizes must have shape",
    ),
    "sizes product": (lambda: kernels.pad(V, O, torch.tensor([[1, 1], [1, 1]]), [2, 2], F), "sizes that give 1"),
    "sizes too large": (lambda: kernels.pad(V, O, torch.tensor([[2, 1], [1, 3]]), [2, 2], F), "size 3 in ragged dim 1"),
    "unpad batch": (lambda: kernels.unpad(torch.zeros(3, 2, 2), O, None, 3), "disagree in batch size"),
    "unpad rows": (lambda: kernels.unpad(torch.zeros(2, 2, 2), O, None, 4), "end at 4"),
    "unpad length": (lambda: kernels.unpad(torch.zeros(2, 1, 2), O, None, 3), "element 0 has 2 rows"),
    "unpad rank": (lambda: kernels.unpad(torch.zeros(2), O, None, 3), "batch dim"),
    "lengths dtype": (lambda: kernels.unpad_lengths(torch.zeros(2, 2), torch.zeros(2)), "lengths must be int64"),
    "lengths batch": (lambda: kernels.unpad_lengths(torch.zeros(2, 2), torch.tensor([1])), "disagree in batch size"),
    "lengths rank": (lambda: kernels.unpad_lengths(torch.zeros(2), torch.tensor([1, 1])), "ragged dim"),
    "lengths too large": (lambda: kernels.unpad_lengths(torch.zeros(2, 2), torch.tensor([1, 3])), "within 0 and 2"),
    "negative lengths": (lambda: kernels.unpad_lengths(torch.zeros(2, 2), torch.tensor([-1, 1])), "within 0 and 2"),
    "mask dtype": (lambda: kernels.prefix_lengths(V), "mask must be bool"),
    "mask rank": (lambda: kernels.prefix_lengths(V.bool()[0]), "mask must be bool"),
    "expand batch": (lambda: kernels.segment_expand(V, O, 3), "disagree in batch size"),
    "expand rows": (lambda: kernels.segment_expand(V[:2], O, 9), "end at 9"),
    "pad_list size": (lambda: kernels.pad_list([V, V[:1]], [2], F), "tensor 0 has size 3 in dim 0, more than 2"),
    "pad_list dtype": (lambda: kernels.pad_list([V, V.long()], [3], F), "differ in dtype"),
    "pad_list static": (lambda: kernels.pad_list([V, torch.zeros(3, 5)], [3], F), "differ in dim 1: 2 and 5"),
    "mean of integers": (lambda: kernels.segment_mean(V.long(), O), "segment_mean does not take"),
    "softmax of integers": (lambda: kernels.segment_softmax(V.long(), O), "segment_softmax does not take"),
    "order of complex": (lambda: kernels.segment_max(V + 0j, O), "no order"),
    "softmax shapes": (lambda: kernels.segment_softmax_backward(V, V[:, :1], O), "differ in shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call()
