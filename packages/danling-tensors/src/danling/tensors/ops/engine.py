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


_aten = torch.ops.aten
TABLE[_aten.sym_size.int] = lambda x, dim: x.size(dim)
TABLE[_aten.sym_size.default] = lambda x: x.size()
TABLE[_aten.sym_stride.int] = lambda x, dim: x.stride(dim)
TABLE[_aten.sym_stride.default] = lambda x: x.stride()
TABLE[_aten.sym_numel.default] = lambda x: x.numel()
TABLE[_aten.sym_storage_offset.default] = lambda x: 0


def refuse_duals(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("forward-mode duals of a NestedTensor are not supported; make duals of .concat")


PREFIXES["_make_dual"] = PREFIXES["_unpack_dual"] = refuse_duals

for _prefix in ("_foreach_", "_fused_", "_amp_"):
    PREFIXES[_prefix] = over_lists


@register("engine", "_has_compatible_shallow_copy_type")
def compatible(func: Any, a: Any, b: Any) -> bool:
    return isinstance(a, NestedTensor) == isinstance(b, NestedTensor) and func(_bare(a), _bare(b))
