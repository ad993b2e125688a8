"""One test over every op of the table: a batch behaves as each of its elements."""

import pytest
import torch
from tensors.oracle import laws
from tensors.oracle.samples import load

from danling.tensors import supported_ops

OPS = {name: path for name, _, path in supported_ops()}
SAMPLES = load()
CASES = [
    pytest.param(name, sample, id=f"{name}-{j}")
    for name, samples in sorted(SAMPLES.items())
    if name in OPS
    for j, sample in enumerate(samples)
]


OTHER_DEVICES = {"cuda", "xpu", "pin_memory", "record_stream"}


def test_every_op_has_a_sample():
    answering = {name for name, path in OPS.items() if path != "refused"}
    missing = sorted(answering - set(SAMPLES) - OTHER_DEVICES)
    assert not missing, f"ops without a sample: {missing}"


def allowed_warnings(test):
    """What torch and the fallback say about the ops of the table."""
    for text in (
        "ignore::danling.tensors.NestedTensorFallbackWarning",
        "ignore:index_reduce",
        "ignore:ComplexHalf",
        "ignore:.*degrees of freedom is <= 0",
        "ignore:(torch|at)..?\\w+ is deprecated",
    ):
        test = pytest.mark.filterwarnings(text)(test)
    return test


@allowed_warnings
@pytest.mark.parametrize(("name", "sample"), CASES)
def test_op(name, sample):
    for layout in sample.layouts:
        for dtype in sample.dtypes:
            laws.check_values(sample, layout, dtype)
            laws.check_poison(sample, layout, dtype)
        if sample.grad:
            laws.check_gradients(sample, layout)
        if torch.float32 in sample.dtypes:
            laws.check_isolation(sample, layout)
            laws.check_purity(sample, layout, OPS[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@allowed_warnings
@pytest.mark.parametrize(("name", "sample"), CASES if torch.cuda.is_available() else CASES[:1])
def test_op_on_cuda(name, sample):
    with torch.device("cuda"):
        test_op(name, sample)
