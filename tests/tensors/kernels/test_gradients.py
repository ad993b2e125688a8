"""Derivatives: both modes, twice, under torch.func and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danling.tensors import kernels
from danling.tensors.kernels import gradients

OFFSETS = torch.tensor([0, 3, 3, 8, 9])
FULL = [0, 2, 3]  # elements with rows
ZERO = torch.zeros((), dtype=torch.float64)
SIZES = torch.tensor([[1, 3], [2, 0], [5, 1], [1, 1]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, in forward mode


def rand(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


CASES = {
    "pad": (lambda v: kernels.pad(v, OFFSETS, None, [6], ZERO), (rand(9, 2),)),
    "pad two ragged dims": (lambda v: kernels.pad(v, OFFSETS, SIZES, [5, 3], ZERO), (rand(9, 2),)),
    "unpad": (lambda p: kernels.unpad(p, OFFSETS, None, 9), (rand(4, 6, 2),)),
    "unpad two ragged dims": (lambda p: kernels.unpad(p, OFFSETS, SIZES, 9), (rand(4, 5, 3),)),
    "unpad_lengths": (lambda p: kernels.unpad_lengths(p, OFFSETS.diff())[0], (rand(4, 6, 2),)),
    "pack": (lambda a, b: kernels.pack([a, b]), (rand(2, 3), rand(1, 3))),
    "pack kernel": (lambda a, b: gradients.pack([a, b]), (rand(2, 3), rand(1, 3))),
    "pad_list": (lambda a, b: kernels.pad_list([a, b], [3], ZERO), (rand(2, 3), rand(1, 3))),
    "expand": (lambda v: kernels.segment_expand(v, OFFSETS, 9), (rand(4, 2),)),
    "sum": (lambda v: kernels.segment_sum(v, OFFSETS), (rand(9, 2),)),
    "mean": (lambda v: kernels.segment_mean(v, OFFSETS)[FULL], (rand(9, 2),)),
    "max": (lambda v: kernels.segment_max(v, OFFSETS)[0][FULL], (rand(9, 2),)),
    "min": (lambda v: kernels.segment_min(v, OFFSETS)[0][FULL], (rand(9, 2),)),
    "softmax": (lambda v: kernels.segment_softmax(v, OFFSETS), (rand(9, 2),)),
    "log_softmax": (lambda v: kernels.segment_softmax(v, OFFSETS, True), (rand(9, 2),)),
    "softmax_backward": (lambda g, y: kernels.segment_softmax_backward(g, y, OFFSETS), (rand(9, 2), rand(9, 2))),
    "log_softmax_backward": (
        lambda g, y: kernels.segment_softmax_backward(g, y, OFFSETS, True),
        (rand(9, 2), rand(9, 2)),
    ),
    "logsumexp": (lambda v: kernels.segment_logsumexp(v, OFFSETS)[FULL], (rand(9, 2),)),
    "cumsum": (lambda v: kernels.segment_cumsum(v, OFFSETS), (rand(9, 2),)),
    "reverse cumsum": (lambda v: kernels.segment_cumsum(v, OFFSETS, True), (rand(9, 2),)),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_gradcheck(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@each_case
def test_func_transforms_agree_with_backward(name: str) -> None:
    function, inputs = CASES[name]

    def loss(*args: Tensor) -> Tensor:
        return function(*args).sin().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = [x.detach() for x in inputs]
    argnums = tuple(range(len(plain)))
    for a, b in zip(torch.func.grad(loss, argnums=argnums)(*plain), expected, strict=True):
        torch.testing.assert_close(a, b)
    tangents = [torch.ones_like(x) for x in plain]
    _, derivative = torch.func.jvp(loss, tuple(plain), tuple(tangents))
    torch.testing.assert_close(derivative, sum(g.sum() for g in expected))


def test_an_empty_element_takes_no_gradient() -> None:
    values = rand(9, 2).detach().requires_grad_()
    kernels.segment_max(values, OFFSETS)[0].masked_fill(torch.tensor([[0], [1], [0], [0]]).bool(), 0).sum().backward()
    assert values.grad.sum() == 6
    single = torch.zeros(0, 2, requires_grad=True)
    kernels.segment_sum(single, torch.tensor([0, 0])).sum().backward()
    assert single.grad.shape == (0, 2)


def test_a_stale_result_is_noticed() -> None:
    values = rand(9, 2).detach().requires_grad_()
    result = kernels.segment_softmax(values, OFFSETS)
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_only_what_needs_gradients_records_them() -> None:
    values = torch.ones(9, 2)
    assert not kernels.segment_sum(values, OFFSETS).requires_grad
    values.requires_grad_()
    assert kernels.segment_sum(values, OFFSETS).requires_grad
    with torch.no_grad():
        assert not kernels.segment_sum(values, OFFSETS).requires_grad
    assert not kernels.segment_max(values, OFFSETS)[1].requires_grad


ARGUMENTS = {
    "pad": (rand(9, 2), OFFSETS, None, [6], ZERO),
    "unpad": (rand(4, 6, 2), OFFSETS, None, 9),
    "unpad_lengths": (rand(4, 6, 2), OFFSETS.diff()),
    "pack": ([rand(2, 3), rand(1, 3)],),
    "pad_list": ([rand(2, 3), rand(1, 3)], [3], ZERO),
    "prefix_lengths": (torch.tensor([[True, False], [False, True]]),),
    "segment_expand": (rand(4, 2), OFFSETS, 9),
    "segment_sum": (rand(9, 2), OFFSETS),
    "segment_mean": (rand(9, 2), OFFSETS[[0, 1, 3, 4]]),  # opcheck takes no NaN for equal to NaN
    "segment_max": (rand(9, 2), OFFSETS[[0, 1, 3, 4]]),
    "segment_min": (rand(9, 2), OFFSETS[[0, 1, 3, 4]]),
    "segment_softmax": (rand(9, 2), OFFSETS, True),
    "segment_softmax_backward": (rand(9, 2), rand(9, 2), OFFSETS, False),
    "segment_logsumexp": (rand(9, 2), OFFSETS[[0, 1, 3, 4]]),
    "segment_cumsum": (rand(9, 2), OFFSETS, True),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.danling, name).default, ARGUMENTS[name])


def test_every_operator_is_checked() -> None:
    from danling.tensors.kernels.register import SCHEMAS

    assert set(ARGUMENTS) == set(SCHEMAS)


def test_compiled_code_serves_all_lengths_with_two_graphs() -> None:
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def step(values: Tensor, offsets: Tensor, longest: int) -> Tensor:
        probability = kernels.segment_softmax(values, offsets)
        padded = kernels.pad(probability, offsets, None, [longest], torch.zeros(()))
        back = kernels.unpad(padded, offsets, None, values.shape[0])
        return kernels.segment_sum(back * values, offsets)

    torch.manual_seed(0)
    for lengths in ([3, 4], [5, 2, 7], [2, 2, 3, 9], [6, 8], [4, 11, 5]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        values = torch.randn(sum(lengths), 3, requires_grad=True)
        result = step(values, offsets, max(lengths))
        result.sum().backward()
        expected = torch.stack([(part.softmax(0) * part).sum(0) for part in values.split(lengths)])
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(values.grad, torch.autograd.grad(expected.sum(), values)[0])
    assert len(graphs) <= 2
