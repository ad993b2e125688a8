"""Autograd members of NestedTensor: leaves, gradients, hooks, backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass as _PlainTensors

_Base: Any = torch._C.TensorBase


class Autograd:
    """Members that torch.Tensor reads from its C++ half; here they speak of the packed values.

    The values of a NestedTensor made by the op layer are further up the graph than the NestedTensor itself (which is a
    view of them), so a leaf's values are the leaf. A NestedTensor that got its history outside is its own root.
    """

    __slots__ = ()

    def _root(self) -> tuple[Tensor, bool]:
        from danling.tensors.nested_tensor import _Read, is_traced, values_of

        if is_traced(self._values):  # type: ignore[attr-defined]
            values = self._values  # type: ignore[attr-defined]
            return (values, False) if values.requires_grad else (self, True)  # type: ignore[return-value]
        values = values_of(self)  # type: ignore[arg-type]
        outside = isinstance(values.grad_fn, _Read._backward_cls)  # type: ignore[attr-defined]
        return (self, True) if outside else (values, False)  # type: ignore[return-value]

    def _wrap_grad(self, grad: Tensor | None) -> Any:
        from danling.tensors.nested_tensor import NestedTensor, wrap

        if grad is None or isinstance(grad, NestedTensor):
            return grad
        return wrap(grad, self._layout, self._flags)  # type: ignore[attr-defined]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are recorded; writable on leaves."""
        values = self._values  # type: ignore[attr-defined]
        if values.requires_grad:
            return True
        with _PlainTensors():
            return _Base.requires_grad.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Make a leaf record gradients, or stop."""
        from danling.tensors.nested_tensor import is_traced, rebind, values_of

        if is_traced(self._values):  # type: ignore[attr-defined]
            with _PlainTensors():
                return _Base.requires_grad_(self, requires_grad)
        values = values_of(self)  # type: ignore[arg-type]
        if values.requires_grad == requires_grad:
            return self
        values.requires_grad_(requires_grad)
        return rebind(self, values)  # type: ignore[arg-type]

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made this tensor."""
        root, outside = self._root()
        with _PlainTensors():
            return _Base.is_leaf.__get__(root) if root is self else not outside and root.is_leaf

    @property
    def grad_fn(self) -> Any:
        """The autograd node that made the values."""
        root, outside = self._root()
        with _PlainTensors():
            return _Base.grad_fn.__get__(root) if outside else root.grad_fn

    @property
    def output_nr(self) -> int:
        """Output number in `grad_fn`."""
        root, outside = self._root()
        with _PlainTensors():
            return _Base.output_nr.__get__(root) if outside else root.output_nr

    @property
    def retains_grad(self) -> bool:
        """Whether a tensor that is no leaf keeps its gradient."""
        root, _ = self._root()
        with _PlainTensors():
            return _Base.retains_grad.__get__(root)

    @property
    def _version(self) -> int:
        return self._values._version  # type: ignore[attr-defined]

    @property
    def grad(self) -> Any:
        """The gradient, a NestedTensor of the same layout, or `None`; writable."""
        root, outside = self._root()
        with _PlainTensors():
            grad = _Base.grad.__get__(root) if outside else root.grad
        return self._wrap_grad(grad)

    @grad.setter
    def grad(self, value: Any) -> None:
        from danling.tensors.nested_tensor import NestedTensor
        from danling.tensors.packing import difference

        root, outside = self._root()
        if isinstance(value, NestedTensor):
            if value._layout != self._layout:  # type: ignore[attr-defined]
                why = difference(value._layout, self._layout)  # type: ignore[attr-defined]
                raise ValueError(f"grad must have the tensor's own structure, but it {why}")
            value = value._values
        elif value is not None:
            raise TypeError(f"grad of a NestedTensor must be a NestedTensor or None, got {type(value).__name__}")
        with _PlainTensors():
            if outside:
                _Base.grad.__set__(root, value)
            else:
                root.grad = value

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    _grad = grad

    @property
    def data(self) -> Any:
        """The same values outside the graph; assigning replaces values and layout."""
        from danling.tensors.nested_tensor import wrap

        return wrap(self._values.data, self._layout, self._flags)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        from danling.tensors.nested_tensor import NestedTensor, rebind

        if not isinstance(value, NestedTensor):
            raise TypeError(f"data of a NestedTensor must be a NestedTensor, got {type(value).__name__}")
        values = self._values  # type: ignore[attr-defined]
        with torch.no_grad():
            values.data = value._values
        rebind(self, values, value._layout)  # type: ignore[arg-type]

    def detach(self) -> Any:
        """The same values outside the graph."""
        from danling.tensors.nested_tensor import wrap

        return wrap(self._values.detach(), self._layout, self._flags)  # type: ignore[attr-defined]

    def detach_(self) -> Any:
        """Leave the graph in place."""
        from danling.tensors.nested_tensor import rebind

        return rebind(self, self._values.detach())  # type: ignore[arg-type,attr-defined]

    def retain_grad(self) -> None:
        """Keep the gradient of a tensor that is no leaf."""
        root, outside = self._root()
        if not outside:
            root.retain_grad()
            return
        own = weakref.ref(self)

        def keep(grad: Tensor) -> None:
            x = own()
            if x is not None:
                with _PlainTensors():
                    old = _Base.grad.__get__(x)
                    grad = getattr(grad, "_values", grad)
                    _Base.grad.__set__(x, grad.clone() if old is None else old + grad)

        with _PlainTensors():
            root.register_hook(keep)

    def register_hook(self, hook: Callable[[Any], Any]) -> Any:
        """Call `hook` with the gradient, a NestedTensor; what it returns replaces the gradient."""
        from danling.tensors.nested_tensor import plain

        own_grad = self._grad_maker()

        def on_values(grad: Tensor) -> Any:
            out = hook(own_grad(grad))
            return None if out is None else plain(out)

        root, _ = self._root()
        with _PlainTensors():
            return torch.Tensor.register_hook(root, on_values)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], Any]) -> Any:
        """Call `hook` with this leaf after its gradient has been accumulated."""
        own = weakref.ref(self)

        def on_values(values: Tensor) -> None:
            x = own()
            if x is not None:
                hook(x)

        root, _ = self._root()
        with _PlainTensors():
            return torch.Tensor.register_post_accumulate_grad_hook(root, on_values)

    def _grad_maker(self) -> Callable[[Tensor], Any]:
        from danling.tensors.nested_tensor import NestedTensor, wrap

        layout, flags = self._layout, self._flags  # type: ignore[attr-defined]
        # None: torch calls hooks of an output that no gradient came to, too.
        return lambda grad: grad if grad is None or isinstance(grad, NestedTensor) else wrap(grad, layout, flags)

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Gradients of this tensor with respect to graph leaves.

        Args:
            gradient: A NestedTensor of equal layout, or a dense tensor of `.shape` whose padding is ignored.
            retain_graph: As torch.
            create_graph: As torch.
            inputs: As torch; NestedTensors are welcome.
        """
        from danling.tensors.nested_tensor import values_of

        if inputs is not None:
            inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            inputs = [root_of(x) for x in inputs]
        values = values_of(self)  # type: ignore[arg-type]
        torch.autograd.backward(values, packed_grad(self, gradient), retain_graph, create_graph, inputs=inputs)


def root_of(x: Any) -> Any:
    """The tensor that stands for `x` in the C++ graph."""
    return x._root()[0] if isinstance(x, Autograd) else x


def packed_grad(x: Any, grad: Any) -> Tensor | None:
    """A gradient given for `x` as packed values.

    Raises:
        ValueError: Another layout, or a dense tensor that has not `.shape`.
    """
    from danling.tensors.nested_tensor import NestedTensor, values_of
    from danling.tensors.packing import difference, to_packed

    if grad is None:
        return None
    if isinstance(grad, NestedTensor):
        if grad._layout != x._layout:
            why = difference(grad._layout, x._layout)
            raise ValueError(f"the gradient must have the tensor's own structure, but it {why}")
        return values_of(grad)
    if grad.shape == x.shape:
        return to_packed(grad, x._layout)
    if grad.shape == x._values.shape:
        return grad
    raise ValueError(f"the gradient has shape {tuple(grad.shape)}, the tensor {tuple(x.shape)}")


def autograd_grad(func: Any, outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.grad` with NestedTensors anywhere; their gradients are NestedTensors."""
    from danling.tensors.nested_tensor import values_of

    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if grad_outputs is None or isinstance(grad_outputs, Tensor):
        grad_outputs = [grad_outputs] * len(outputs)
    grads = [packed_grad(y, g) if isinstance(y, Autograd) else g for y, g in zip(outputs, grad_outputs)]
    ys = [values_of(y) if isinstance(y, Autograd) else y for y in outputs]  # type: ignore[arg-type]
    # Below the class's own dispatch: an input that is its own root is a NestedTensor still.
    with _PlainTensors():
        found = func(ys, [root_of(x) for x in inputs], grads, *args, **kwargs)
    return tuple(x._wrap_grad(g) if isinstance(x, Autograd) else g for x, g in zip(inputs, found))


def autograd_backward(func: Any, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """`torch.autograd.backward` with NestedTensors among outputs, gradients and inputs."""
    from danling.tensors.nested_tensor import values_of

    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if grad_tensors is None or isinstance(grad_tensors, Tensor):
        grad_tensors = [grad_tensors] * len(tensors)
    grads = [packed_grad(y, g) if isinstance(y, Autograd) else g for y, g in zip(tensors, grad_tensors)]
    inputs = kwargs.get("inputs")
    if inputs is not None:
        kwargs["inputs"] = [root_of(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs)]
    with _PlainTensors():
        func([values_of(y) if isinstance(y, Autograd) else y for y in tensors], grads, *args, **kwargs)  # type: ignore[arg-type]
