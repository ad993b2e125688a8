"""Unpickling with a list of allowed types.

A pickle is a program: it names functions and calls them. Here a name is looked up only if it stands in `ALLOWED`, whose
members do nothing but build values. Two functions that could do more are replaced by narrow ones.
"""

from __future__ import annotations

import importlib
import io
import pickle
from typing import Any

_PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}

# Module -> names. Functions are those with which the listed types rebuild themselves.
ALLOWED: dict[str, set[str]] = {
    "builtins": {
        "Ellipsis",
        "NotImplemented",
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
    },
    "collections": {
        "ChainMap",
        "Counter",
        "OrderedDict",
        "UserDict",
        "UserList",
        "UserString",
        "defaultdict",
        "deque",
    },
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "torch": {"Size", "Tensor", "device"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_parameter",
        "_rebuild_sparse_tensor",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
    },
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "pandas": {
        "BooleanDtype",
        "Categorical",
        "CategoricalDtype",
        "CategoricalIndex",
        "DataFrame",
        "DatetimeIndex",
        "DatetimeTZDtype",
        "Float32Dtype",
        "Float64Dtype",
        "Index",
        "Int16Dtype",
        "Int32Dtype",
        "Int64Dtype",
        "Int8Dtype",
        "IntervalDtype",
        "IntervalIndex",
        "MultiIndex",
        "NA",
        "PeriodDtype",
        "PeriodIndex",
        "RangeIndex",
        "Series",
        "StringDtype",
        "TimedeltaIndex",
        "UInt16Dtype",
        "UInt32Dtype",
        "UInt64Dtype",
        "UInt8Dtype",
    },
    "pandas.arrays": {
        "ArrowStringArray",
        "BooleanArray",
        "Categorical",
        "DatetimeArray",
        "FloatingArray",
        "IntegerArray",
        "IntervalArray",
        "PeriodArray",
        "StringArray",
        "TimedeltaArray",
    },
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.interval": {"Interval", "__pyx_unpickle_IntervalMixin"},
    "pandas._libs.missing": {"NAType"},
    "pandas._libs.tslibs.nattype": {"_nat_unpickle"},
    "pandas._libs.tslibs.period": {"Period"},
    "pandas._libs.tslibs.timedeltas": {"Timedelta", "_timedelta_unpickle"},
    "pandas._libs.tslibs.timestamps": {"Timestamp", "_unpickle_timestamp"},
    "pandas._libs.tslibs.offsets": {
        "BusinessDay",
        "Day",
        "Hour",
        "Micro",
        "Milli",
        "Minute",
        "MonthBegin",
        "MonthEnd",
        "Nano",
        "QuarterBegin",
        "QuarterEnd",
        "Second",
        "Week",
        "YearBegin",
        "YearEnd",
    },
    "pandas.core.arrays.arrow.array": {"ArrowExtensionArray"},
    "pandas.core.arrays.boolean": {"BooleanArray", "BooleanDtype"},
    "pandas.core.arrays.categorical": {"Categorical"},
    "pandas.core.arrays.datetimes": {"DatetimeArray"},
    "pandas.core.arrays.floating": {"Float32Dtype", "Float64Dtype", "FloatingArray"},
    "pandas.core.arrays.integer": {
        "Int16Dtype",
        "Int32Dtype",
        "Int64Dtype",
        "Int8Dtype",
        "IntegerArray",
        "UInt16Dtype",
        "UInt32Dtype",
        "UInt64Dtype",
        "UInt8Dtype",
    },
    "pandas.core.arrays.interval": {"IntervalArray"},
    "pandas.core.arrays.period": {"PeriodArray"},
    "pandas.core.arrays.string_": {"StringArray", "StringDtype"},
    "pandas.core.arrays.string_arrow": {"ArrowStringArray"},
    "pandas.core.arrays.timedeltas": {"TimedeltaArray"},
    "pandas.core.dtypes.dtypes": {"CategoricalDtype", "DatetimeTZDtype", "IntervalDtype", "PeriodDtype"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.category": {"CategoricalIndex"},
    "pandas.core.indexes.datetimes": {"DatetimeIndex", "_new_DatetimeIndex"},
    "pandas.core.indexes.interval": {"IntervalIndex", "_new_IntervalIndex"},
    "pandas.core.indexes.multi": {"MultiIndex"},
    "pandas.core.indexes.period": {"PeriodIndex", "_new_PeriodIndex"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.indexes.timedeltas": {"TimedeltaIndex", "_new_TimedeltaIndex"},
    "pandas.core.internals.managers": {"BlockManager", "SingleBlockManager"},
    "pandas.core.series": {"Series"},
    "pyarrow.lib": {"py_buffer", "type_for_alias"},
}


def _attribute(obj: Any, name: str) -> Any:
    """Stand in for `getattr`, which time zones need for one method and which could reach everything."""
    if getattr(obj, "__qualname__", None) == "ZoneInfo" and obj.__module__ == "zoneinfo" and name == "_unpickle":
        return obj._unpickle
    raise pickle.UnpicklingError(f"the file asks for attribute {name!r} of {obj!r}, which only a trusted file may")


def _storage(data: bytes) -> Any:
    """Stand in for the function with which torch storages load themselves, which runs any pickle."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _arrow_array(data: Any) -> Any:
    """Rebuild an Arrow array and check that its offsets stay inside its buffers."""
    import pyarrow

    array = pyarrow.lib._restore_array(data)
    array.validate(full=True)
    return array


_REPLACED = {
    ("builtins", "getattr"): _attribute,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("pyarrow.lib", "_restore_array"): _arrow_array,
}


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that finds only what `ALLOWED` lists."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object behind a name.

        Raises:
            pickle.UnpicklingError: the name is not allowed.
            ImportError: it is allowed, but its library is missing.
        """
        if module.startswith("numpy.core."):  # before NumPy 2
            module = module.replace("numpy.core.", "numpy._core.", 1)
        replaced = _REPLACED.get((module, name))
        if replaced is not None:
            return replaced
        if name in ALLOWED.get(module, ()) or module == "torch" and self._is_dtype(name):
            try:
                return getattr(importlib.import_module(module), name)
            except ImportError as error:
                library = module.partition(".")[0]
                raise ImportError(
                    f"the file holds {module}.{name}, and {library} is not usable here ({error}): pip install {library}"
                ) from error
        raise pickle.UnpicklingError(
            f"the file holds {module}.{name}, which is not among the types that are loaded from any file; "
            "if you trust its origin, pass trusted=True"
        )

    @staticmethod
    def _is_dtype(name: str) -> bool:
        import torch

        return isinstance(getattr(torch, name, None), torch.dtype)


def safe_load(stream: Any, **kwargs: Any) -> Any:
    """Load a pickle that holds allowed types only."""
    return SafeUnpickler(stream, **kwargs).load()
