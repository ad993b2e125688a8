"""PNTensor: a tensor that says "I vary in size", and becomes part of a NestedTensor at collation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danling.tensors.nested_tensor import FIRST, NestedTensor


class PNTensor(torch.Tensor):
    """A plain tensor with a mark: `default_collate` packs marked tensors into a `NestedTensor`.

    The mark survives ops on data (casts, slices, arithmetic with plain tensors, `.to`, copies, pickling), so that the
    transforms of a dataset keep it. It ends at the first operand that is a NestedTensor, a parameter or requires grad.

    Args:
        data: Anything `torch.tensor` takes, with its dtype rules; a tensor is copied.

    Example:
        >>> import torch
        >>> from torch.utils.data import default_collate
        >>> from danling.tensors import PNTensor
        >>> batch = default_collate([PNTensor([1, 2, 3]) + 1, PNTensor([4])])
        >>> batch.tensor
        tensor([[2, 3, 4],
                [4, 0, 0]])
    """

    def __new__(cls, data: Any) -> PNTensor:
        return mark(_copied(data))

    def __init__(self, data: Any) -> None:
        # Everything is done in __new__; torch.Tensor.__init__ takes no arguments.
        pass

    @property
    def tensor(self) -> Tensor:
        """This tensor without the mark, sharing data."""
        return self.as_subclass(Tensor)

    concat = tensor

    @property
    def mask(self) -> Tensor:
        """All-true bool tensor of the same shape."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.as_subclass:
            return super().__torch_function__(func, types, args, kwargs)
        operands = list(_tensors((args, kwargs)))
        if any(isinstance(x, NestedTensor) for x in operands):
            return func(*_unmarked(args), **_unmarked(kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            ends = any(isinstance(x, nn.Parameter) or x.requires_grad for x in operands)
        return _unmarked(out) if ends and func not in _KEEPING else _marked(out, args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return mark, (self.tensor,)

    def __deepcopy__(self, memo: dict[int, Any]) -> PNTensor:
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("only leaf tensors can be deep-copied; detach() first")
            copied = mark(self.tensor.detach().clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = "PNTensor" + repr(self.tensor.detach()).removeprefix("tensor").replace("\n", "\n  ")
        return text[:-1] + ", requires_grad=True)" if self.requires_grad else text


FIRST.add(PNTensor)

_KEEPING = {torch.Tensor.requires_grad_}


def mark(x: Tensor) -> PNTensor:
    """`x` as a PNTensor, sharing its data."""
    return x.as_subclass(PNTensor)  # type: ignore[return-value]


def tensor(
    data: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> PNTensor:
    """`torch.tensor` that returns a `PNTensor`.

    Example:
        >>> from danling.tensors import tensor
        >>> tensor([1, 2])
        PNTensor([1, 2])
    """
    if isinstance(data, Tensor):
        copied = _copied(data).to(device=device, dtype=dtype)
        copied = copied.pin_memory() if pin_memory else copied
    else:
        copied = torch.tensor(data, dtype=dtype, device=device, pin_memory=pin_memory)
    return mark(copied).requires_grad_(requires_grad)  # type: ignore[return-value]


def _copied(data: Any) -> Tensor:
    if isinstance(data, NestedTensor):
        raise TypeError("a NestedTensor is a whole batch; mark its elements one by one")
    if isinstance(data, Tensor):
        return _unmarked(data).detach().clone()
    return torch.tensor(data)


def _tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _convert(tree: Any, change: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_convert(item, change) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_convert(item, change) for item in tree)
    if isinstance(tree, dict):
        return {key: _convert(item, change) for key, item in tree.items()}
    return tree


def _unmarked(tree: Any) -> Any:
    return _convert(tree, lambda x: x.as_subclass(Tensor) if isinstance(x, PNTensor) else x)


def _marked(tree: Any, args: Any) -> Any:
    def change(x: Tensor) -> Tensor:
        if type(x) is not Tensor or any(x is a for a in args):
            return x
        return mark(x)

    return _convert(tree, change)
