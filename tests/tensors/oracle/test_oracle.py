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


OTHER_DEVICES = {"cuda", "xpu", "pin_memory"}


def test_every_op_has_a_sample():
    answering = {name for name, path in OPS.items() if path != "refused"}
    missing = sorted(answering - set(SAMPLES) - OTHER_DEVICES)
    assert not missing, f"ops without a sample: {missing}"


@pytest.mark.filterwarnings("ignore::danling.tensors.NestedTensorFallbackWarning")
@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
@pytest.mark.filterwarnings("ignore:(torch|at)..?\\w+ is deprecated")
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
