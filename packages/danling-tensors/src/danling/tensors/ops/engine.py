"""What torch's own machinery calls: autograd, optimisers over lists of tensors, `nn.Module`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from danling.tensors.autograd import autograd_backward, autograd_grad
from danling.tensors.nested_tensor import NestedTensor, values_of
from danling.tensors.ops.base import like
from danling.tensors.ops.table import PREFIXES, TABLE, register

TABLE[torch.autograd.grad] = partial(autograd_grad, torch.autograd.grad)
TABLE[torch.autograd.backward] = partial(autograd_backward, torch.autograd.backward)


def _bare(tree: Any) -> Any:
    if isinstance(tree, NestedTensor):
        return values_of(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_bare(item) for item in tree)
    return tree


def over_lists(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions over lists of tensors, such as `torch._foreach_add_`: on the values, list by list.

    A list of NestedTensors holds tensors of one parameter each, so structures agree by position.
    """
    out = func(*_bare(args), **{key: _bare(item) for key, item in kwargs.items()})
    models = next((a for a in args if isinstance(a, (list, tuple)) and any(isinstance(x, NestedTensor) for x in a)), ())
    if not isinstance(out, (list, tuple)) or len(out) != len(models):
        return out
    same = [isinstance(m, NestedTensor) and o.shape == m._values.shape for o, m in zip(out, models)]
    return type(out)(like(m, o) if s else o for o, m, s in zip(out, models, same))


for _prefix in ("_foreach_", "_fused_", "_amp_"):
    PREFIXES[_prefix] = over_lists


@register("engine", "_has_compatible_shallow_copy_type")
def compatible(func: Any, a: Any, b: Any) -> bool:
    return isinstance(a, NestedTensor) == isinstance(b, NestedTensor) and func(_bare(a), _bare(b))
