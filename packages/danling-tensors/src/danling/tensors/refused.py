"""What a NestedTensor cannot do, and what it says then."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Refused:
    """Methods of a tensor that would need one block of memory of `.shape`, or another kind of values."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a NestedTensor has no dense storage; use .concat (packed values) or .tensor (padded copy)")

    data_ptr = storage = as_strided = as_strided_ = set_ = resize_ = _refuse
    __array_ufunc__ = None  # operators with arrays say that they cannot, instead of asking for the storage
    resize_as_ = numpy = __array__ = __dlpack__ = __dlpack_device__ = _refuse

    def _refuse_map(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Python callbacks per value are not supported on a NestedTensor; apply them to .concat")

    apply_ = map_ = map2_ = _refuse_map  # type: ignore[assignment]

    def _refuse_kind(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("sparse and quantised values are not supported in a NestedTensor; convert .concat instead")

    to_sparse = to_sparse_csr = to_sparse_csc = to_sparse_bsr = to_sparse_bsc = to_sparse_coo = _refuse_kind
    to_dense = to_mkldnn = sparse_mask = sparse_resize_ = _refuse_kind


def misplaced(func: Any, dense: Any, args: Any, kwargs: Any) -> Exception:
    """The error for a dense operand (or something else) where the call needs a NestedTensor."""
    name = getattr(func, "__name__", str(func))
    places: list[tuple[Any, Any]] = [*enumerate(args, 1), *(kwargs or {}).items()]
    place = next((f" (argument {key})" for key, value in places if value is dense), "")
    what = f"shape {tuple(dense.shape)}" if isinstance(dense, Tensor) else f"type {type(dense).__name__}"
    return TypeError(
        f"{name} needs a NestedTensor where it got a dense operand of {what}{place}; "
        "use .tensor or .concat of the NestedTensors, or nested_like to give the dense operand their structure"
    )
