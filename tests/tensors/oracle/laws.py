"""The laws every op obeys, checked on one sample and one layout at a time."""

from __future__ import annotations

from typing import Any

import torch
from tensors.oracle.sample import KINDS, LAYOUTS, Sample
from torch import Tensor

from danling.tensors import Layout, NestedTensor, strict
from danling.tensors.layout import Segments
from danling.tensors.nested_tensor import wrap

BFLOAT_TOLERANCE = 2e-2


class Batch:
    """Elements of one operand, and how to make a NestedTensor of them."""

    def __init__(self, elements: list[Tensor], spec: dict[str, Any], dtype: torch.dtype) -> None:
        self.elements = elements
        self.spec = spec
        self.dtype = dtype

    def nested(self, **settings: Any) -> NestedTensor:
        batch_first = self.spec.get("batch_first", True)
        if self.elements:
            return NestedTensor(self.elements, ragged_dims=self.spec["ragged"], batch_first=batch_first, **settings)
        ragged, static = self.spec["ragged"], self.spec["static"]
        layout = Layout(Segments(torch.empty(0, len(ragged), dtype=torch.int64)), ragged, static, batch_first)
        flags = (settings.get("padding_value", 0.0), False)
        return wrap(torch.empty(0, *static, dtype=self.dtype), layout, flags)


def make(sample: Sample, layout: str, dtype: torch.dtype, seed: int = 0) -> list[Batch]:
    """Operands of a sample on a layout."""
    torch.manual_seed(seed)
    spec = dict(LAYOUTS[layout])
    if sample.shapes is not None:
        spec["shapes"] = list(sample.shapes) if spec["shapes"] else []
        spec["ragged"] = sample.ragged
        first = sample.shapes[0]
        spec["static"] = tuple(size for d, size in enumerate(first) if d not in spec["ragged"])
    out = []
    for kind in sample.operands:
        data = KINDS[kind] if isinstance(kind, str) else kind
        out.append(Batch([data(tuple(s), dtype) for s in spec["shapes"]], spec, data((1,), dtype).dtype))
    return out


def translate_for(x: NestedTensor) -> Any:
    layout = x.structure

    def d(dim: int) -> int:
        if not -layout.rank <= dim < layout.rank:
            return layout.rank + 7  # out of range for the batch as for the element
        return layout.shape_dim(dim % layout.rank)

    return d


def translate_element(dim: int) -> int:
    return dim


def parts_of(result: Any, batch: int) -> list[Any]:
    """The per-element view of a batched result."""
    if isinstance(result, NestedTensor):
        assert len(result) == batch, f"result has batch size {len(result)}, not {batch}"
        check_sound(result)
        return list(result.unbind())
    if isinstance(result, Tensor):
        assert type(result) is Tensor, f"dense result of type {type(result)}"
        if result.dim() > 1 and result.shape[0] == 1 != batch and result.shape[1] == batch:
            return list(result.unbind(1))  # keepdim leaves the batch where it was
        assert result.dim() > 0 and result.shape[0] == batch, f"dense result {tuple(result.shape)} for batch {batch}"
        return list(result.unbind(0))
    if isinstance(result, (tuple, list)):
        columns = [parts_of(r, batch) for r in result]
        return [tuple(column[i] for column in columns) for i in range(batch)]
    return [result] * batch


def check_sound(x: NestedTensor) -> None:
    """Values and layout agree."""
    layout = x.structure
    assert type(x._values) is Tensor
    assert x._values.shape == (layout.rows, *layout.static_sizes), f"values {tuple(x._values.shape)} under {layout}"


def same(actual: Any, expected: Any, tolerance: float, where: str) -> None:
    """Equal in value, dtype and shape."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{where}: {type(actual)} instead of a tensor"
        if expected.dtype == torch.bfloat16:
            tolerance = BFLOAT_TOLERANCE
        if not (expected.is_floating_point() or expected.is_complex()):
            tolerance = 0.0
        try:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} results instead of {len(expected)}"
        for j, (a, e) in enumerate(zip(actual, expected, strict=True)):
            same(a, e, tolerance, f"{where}[{j}]")
    else:
        assert actual == expected or actual != actual, f"{where}: {actual!r} instead of {expected!r}"


def element_results(sample: Sample, batches: list[Batch]) -> tuple[list[Any], Exception | None]:
    out = []
    for row in zip(*(b.elements for b in batches), strict=True):
        try:
            out.append(sample.call(translate_element, *row))
        except Exception as error:
            return [], error
    return out, None


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors_in(item)]
    return []


def check_values(sample: Sample, layout: str, dtype: torch.dtype) -> None:
    """`op(nt)[i] == op(nt[i])`; where torch raises for an element, the batch raises the same type."""
    batches = make(sample, layout, dtype)
    nested = [b.nested() for b in batches]
    d = translate_for(nested[0])
    if sample.reference is not None:
        expected = sample.reference(translate_element, *(b.elements for b in batches))
        torch.manual_seed(1)
        same(sample.call(d, *nested), expected, sample.tolerance, f"{layout} {dtype}")
        return
    expected, error = element_results(sample, batches)
    if error is not None:
        try:
            sample.call(d, *nested)
        except type(error):
            return
        except Exception as other:
            raise AssertionError(f"{layout} {dtype}: raised {other!r}, an element raises {error!r}") from other
        raise AssertionError(f"{layout} {dtype}: did not raise {error!r}")
    result = sample.call(d, *nested)
    for i, (actual, wanted) in enumerate(zip(parts_of(result, len(expected)), expected, strict=True)):
        same(actual, wanted, sample.tolerance, f"{layout} {dtype} element {i}")


def check_gradients(sample: Sample, layout: str) -> None:
    """Gradients of every floating operand equal those of the op on each element."""
    dtype = torch.float64
    batches = make(sample, layout, dtype)
    if not batches[0].elements:
        return
    gradients = []
    for nested in (True, False):
        leaves = [
            [e.clone().requires_grad_(e.is_floating_point() or e.is_complex()) for e in b.elements] for b in batches
        ]
        wrapped = [Batch(row, b.spec, b.dtype) for row, b in zip(leaves, batches, strict=True)]
        try:
            if nested:
                xs = [b.nested() for b in wrapped]
                result = sample.call(translate_for(xs[0]), *xs)
                if sample.reference is None:
                    result = parts_of(result, len(batches[0].elements))
            elif sample.reference is not None:
                result = sample.reference(translate_element, *leaves)
            else:
                result, error = element_results(sample, wrapped)
                if error is not None:
                    return
        except Exception:
            if not nested:
                return
            _, error = element_results(sample, wrapped)
            if error is not None:
                return
            raise
        torch.manual_seed(7)
        outputs = [t for t in tensors_in(result) if t.is_floating_point() or t.is_complex()]
        weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in outputs]
        pairs = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
        inputs = [e for row in leaves for e in row if e.requires_grad]
        if not pairs:
            gradients.append([torch.zeros_like(e) for e in inputs])
            continue
        found = torch.autograd.grad(
            [t for t, _ in pairs], inputs, [w for _, w in pairs], allow_unused=True, materialize_grads=True
        )
        gradients.append(list(found))
    for j, (actual, expected) in enumerate(zip(*gradients, strict=True)):
        same(actual, expected, max(sample.tolerance, 1e-7), f"{layout} gradient {j}")


def flat(result: Any) -> list[Tensor]:
    return [r._values if isinstance(r, NestedTensor) else r for r in tensors_in(result)]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def check_poison(sample: Sample, layout: str, dtype: torch.dtype) -> None:
    """The padding value changes no bit."""
    batches = make(sample, layout, dtype)
    if element_results(sample, batches)[1] is not None and sample.reference is None:
        return
    results = []
    for fill in (0.0, 1e30, float("nan")):
        nested = [b.nested(padding_value=fill) for b in batches]
        torch.manual_seed(3)
        results.append(flat(sample.call(translate_for(nested[0]), *nested)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert bits_equal(a, b), f"{layout} {dtype}: the result depends on padding_value"


def check_isolation(sample: Sample, layout: str) -> None:
    """An inf or NaN in one element leaves the results of the others bitwise unchanged."""
    if not sample.isolated or sample.reference is not None:
        return
    batches = make(sample, layout, torch.float32)
    first = batches[0].elements
    if len(first) < 2 or not first[0].is_floating_point() or first[0].numel() == 0:
        return
    if element_results(sample, batches)[1] is not None:
        return
    nested = [b.nested() for b in batches]
    clean = parts_of(sample.call(translate_for(nested[0]), *nested), len(first))
    for bad in (float("inf"), float("nan")):
        first[0] = torch.full_like(first[0], bad)
        nested = [b.nested() for b in batches]
        try:
            dirty = parts_of(sample.call(translate_for(nested[0]), *nested), len(first))
        except Exception:
            if element_results(sample, batches)[1] is not None:
                continue  # torch refuses the value itself
            raise
        for i in range(1, len(first)):
            for a, b in zip(tensors_in(dirty[i]), tensors_in(clean[i]), strict=True):
                assert bits_equal(a, b), f"{layout}: {bad} in element 0 changed element {i}"


def check_purity(sample: Sample, layout: str, path: str) -> None:
    """Operands are unchanged, and strict() lets packed and grouped ops pass."""
    batches = make(sample, layout, torch.float32)
    if element_results(sample, batches)[1] is not None:
        return
    nested = [b.nested() for b in batches]
    before = [x._values.clone() for x in nested]
    layouts = [x.structure for x in nested]
    if path in ("packed", "grouped"):
        with strict():
            sample.call(translate_for(nested[0]), *nested)
    else:
        sample.call(translate_for(nested[0]), *nested)
    for x, values, structure in zip(nested, before, layouts, strict=True):
        assert x.structure is structure and bits_equal(x._values, values), f"{layout}: an operand was changed"
        assert not x.requires_grad
