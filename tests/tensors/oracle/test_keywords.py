"""Every op takes its arguments by the names that torch gives them, as well as by position."""

import pytest
import torch
from tensors.oracle import laws
from tensors.oracle.test_oracle import CASES, allowed_warnings
from torch.overrides import TorchFunctionMode

from danling.tensors import NestedTensor
from danling.tensors.ops.signatures import signatures


def by_keyword(func, args, kwargs):
    """The same call with every argument named that torch can be told by name, `None` if there is no such call."""
    first = 1 if type(func).__name__ in ("method_descriptor", "wrapper_descriptor") else 0
    for arguments in signatures(func):
        places = [a.name for a in arguments if not a.keyword_only]
        if first < len(args) <= len(places) and not set(places[: len(args)]) & set(kwargs):
            return args[:first], {**dict(zip(places[first:], args[first:], strict=False)), **kwargs}
    return None


class Keywords(TorchFunctionMode):
    """Calls torch by keyword wherever dense tensors can be."""

    def __init__(self):
        super().__init__()
        self.accepted = set()
        self.named = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = by_keyword(func, args, kwargs)
        if named is None:
            return func(*args, **kwargs)
        if any(issubclass(t, NestedTensor) for t in types):
            if func not in self.accepted:
                return func(*args, **kwargs)
            self.named += 1
            return func(*named[0], **named[1])
        try:
            out = func(*named[0], **named[1])
        except TypeError:  # torch has no such names in Python
            return func(*args, **kwargs)
        self.accepted.add(func)
        return out


@pytest.mark.slow
@allowed_warnings
@pytest.mark.parametrize(("name", "sample"), CASES)
def test_op_by_keyword(name, sample):
    if "sequences" not in sample.layouts:
        pytest.skip("not for sequences")
    with Keywords() as mode:
        laws.element_results(sample, laws.make(sample, "sequences", torch.float32))
        laws.check_values(sample, "sequences", torch.float32)
    if not mode.named:
        pytest.skip("has no named form")


def test_names_of_torch_and_of_numpy():
    x = NestedTensor([torch.randn(n, 4) for n in (3, 5)])
    weight = torch.randn(4, 2)
    assert torch.equal(torch.sum(input=x, dim=1), x.sum(1))
    assert torch.equal(torch.sum(x, axis=1, keepdims=True), x.sum(1, True))
    assert torch.equal(torch.max(input=x, dim=1).values, x.max(1).values)
    assert torch.equal(torch.matmul(input=x, other=weight), x @ weight)
    assert torch.equal(torch.reshape(input=x, shape=(2, -1, 2, 2)), x.reshape(2, -1, 2, 2))
    assert torch.equal(torch.gather(x, dim=2, index=x.new_zeros(2, 1, 1).long()), x[:, :, :1])
    assert torch.equal(torch.ops.aten.sum.dim_IntList(self=x, dim=[1]), x.sum(1))
    with pytest.raises(TypeError, match="nonsense"):
        torch.sum(x, nonsense=1)
