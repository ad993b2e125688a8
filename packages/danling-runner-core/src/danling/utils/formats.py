"""The file formats that `save` and `load` know, one writer and one reader each.

A writer checks the object and returns a function that writes it to an open binary file, so that an object of the wrong
kind is refused before the file is touched. Libraries are imported when a format is used.
"""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .unpickling import safe_load

Emit = Callable[[Any], Any]


class Format(NamedTuple):
    """How one file format is written and read.

    Attributes:
        write: called with the object and the caller's arguments; returns what writes to an open binary file.
        read: called with an open binary file, whether the file is trusted, and the caller's arguments.
    """

    write: Callable[..., Emit]
    read: Callable[..., Any]


def require(library: str, purpose: str) -> Any:
    """Import a library, or say what needs it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        top = library.partition(".")[0]
        raise ImportError(f"{purpose} needs {top}, which is not usable here ({error}): pip install {top}") from error


def _untrusted(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"{what}; if you trust the origin of the file, pass trusted=True")


def _path_for(stream: Any, maps: bool) -> Any:
    """Return the path of an open file for libraries that map memory, which want to open it themselves."""
    return stream.name if maps and isinstance(getattr(stream, "name", None), (str, bytes)) else stream


# torch


def _write_torch(obj: Any, *args: Any, **kwargs: Any) -> Emit:
    torch = require("torch", "a pt or pth file")
    return lambda stream: torch.save(obj, stream, *args, **kwargs)


def _read_torch(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    torch = require("torch", "a pt or pth file")
    file = _path_for(stream, bool(kwargs.get("mmap")))
    if trusted:
        return torch.load(file, *args, **{"weights_only": False, **kwargs})
    try:
        return torch.load(file, *args, **{**kwargs, "weights_only": True})
    except pickle.UnpicklingError as error:
        raise _untrusted(f"torch refused the file: {str(error).splitlines()[0]}") from error


# NumPy


def _array(obj: Any, kind: str) -> Any:
    """Return `obj` as an array that the format can hold."""
    numpy = require("numpy", f"an {kind} file")
    if not isinstance(obj, (numpy.ndarray, numpy.generic)) or isinstance(obj, numpy.ma.MaskedArray):
        raise TypeError(f"{kind} files hold NumPy arrays, not {type(obj).__name__}")
    array = numpy.asanyarray(obj)
    if array.dtype.hasobject:
        raise TypeError(f"{kind} files hold arrays of numbers and strings, not of Python objects ({array.dtype})")
    return array


def _write_npy(obj: Any) -> Emit:
    array = _array(obj, "npy")
    return lambda stream: require("numpy.lib.format", "an npy file").write_array(stream, array, allow_pickle=False)


def _read_npy(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    numpy = require("numpy", "an npy file")
    file = _path_for(stream, kwargs.get("mmap_mode") is not None)
    try:
        return numpy.load(file, *args, **{**kwargs, "allow_pickle": trusted})
    except ValueError as error:
        if not trusted and "pickle" in str(error):
            raise _untrusted("the file holds pickled Python objects instead of numbers") from error
        raise


# An npz file is a zip archive of npy files. The comment tells one array from a mapping that holds one array.
_ONE_ARRAY = b"one array"


def _write_npz(obj: Any, compressed: bool = False) -> Emit:
    arrays = {}
    for name, value in obj.items() if isinstance(obj, Mapping) else [("arr_0", obj)]:
        if not isinstance(name, str):
            raise TypeError(f"npz files name their arrays by strings, not by {type(name).__name__}")
        if "\0" in name:
            raise ValueError(f"npz files cannot name an array {name!r}")
        arrays[name] = _array(value, "npz")

    def emit(stream: Any) -> None:
        write_array = require("numpy.lib.format", "an npz file").write_array
        method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.comment = b"" if isinstance(obj, Mapping) else _ONE_ARRAY
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    write_array(member, array, allow_pickle=False)

    return emit


def _read_npz(stream: Any, trusted: bool) -> Any:
    require("numpy", "an npz file")
    with zipfile.ZipFile(stream) as archive:
        arrays = {}
        for name in archive.namelist():
            with archive.open(name) as member:
                arrays[name.removesuffix(".npy")] = _read_npy(member, trusted)
        return arrays["arr_0"] if archive.comment == _ONE_ARRAY else arrays


# JSON and YAML


def _write_json(obj: Any, *args: Any, **kwargs: Any) -> Emit:
    try:
        data = json.dumps(obj, *args, **kwargs).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"a json file cannot hold this {type(obj).__name__}: {error}") from error
    return lambda stream: stream.write(data)


def _read_json(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    return json.loads(stream.read(), *args, **kwargs)


def _write_yaml(obj: Any, *args: Any, **kwargs: Any) -> Emit:
    yaml = require("yaml", "a yaml file")
    options = {"sort_keys": False, "allow_unicode": True, **kwargs}
    try:
        data = yaml.safe_dump(obj, *args, **options).encode()
    except (yaml.YAMLError, RecursionError) as error:
        raise TypeError(f"a yaml file cannot hold this {type(obj).__name__}: {error}") from error
    return lambda stream: stream.write(data)


def _read_yaml(stream: Any, trusted: bool) -> Any:
    return require("yaml", "a yaml file").safe_load(stream)


# Data frames


def _frame(obj: Any, kind: str) -> Any:
    pandas = require("pandas", f"a {kind} file")
    if not isinstance(obj, pandas.DataFrame):
        raise TypeError(f"{kind} files hold a data frame, not {type(obj).__name__}")
    return pandas


def _write_table(kind: str, separator: str) -> Callable[..., Emit]:
    def write(obj: Any, *args: Any, **kwargs: Any) -> Emit:
        pandas = _frame(obj, kind)
        # Rows that are only numbered are numbered again by the reader; other labels become the first column.
        numbered = isinstance(obj.index, pandas.RangeIndex) and obj.index.equals(pandas.RangeIndex(len(obj)))
        options = {"sep": separator, "index": not numbered, **kwargs}
        return lambda stream: obj.to_csv(stream, *args, **options)

    return write


def _write_parquet(obj: Any, *args: Any, **kwargs: Any) -> Emit:
    if type(obj).__module__.partition(".")[0] == "pyarrow":
        parquet = require("pyarrow.parquet", "a parquet file")
        if not isinstance(obj, require("pyarrow", "a parquet file").Table):
            raise TypeError(f"parquet files hold a data frame or an Arrow table, not {type(obj).__name__}")
        return lambda stream: parquet.write_table(obj, stream, *args, **kwargs)
    _frame(obj, "parquet")
    return lambda stream: stream.write(obj.to_parquet(None, *args, **kwargs))


def _write_frame(obj: Any, **kwargs: Any) -> Emit:
    _frame(obj, "pandas")
    return _write_pickle(obj, **kwargs)


def read_frame(kind: str) -> Callable[..., Any]:
    """Return a reader of data frames that calls the function of this name in pandas."""

    def read(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
        return getattr(require("pandas", "a table"), kind)(stream, *args, **kwargs)

    return read


def read_tabs(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    """Read tab-separated values."""
    return require("pandas", "a table").read_csv(stream, *args, **{"sep": "\t", **kwargs})


def read_pickled_frame(stream: Any, trusted: bool, **kwargs: Any) -> Any:
    """Read a pickled data frame."""
    obj = _read_pickle(stream, trusted, **kwargs)
    pandas = require("pandas", "a data frame")
    if not isinstance(obj, pandas.DataFrame):
        raise TypeError(f"the file holds a {type(obj).__name__}, not a data frame")
    return obj


# Pickles


def _write_pickle(obj: Any, *args: Any, **kwargs: Any) -> Emit:
    return lambda stream: pickle.dump(obj, stream, *args, **kwargs)


def _read_pickle(stream: Any, trusted: bool, **kwargs: Any) -> Any:
    return pickle.load(stream, **kwargs) if trusted else safe_load(stream, **kwargs)


_TORCH = Format(_write_torch, _read_torch)
_NPY = Format(_write_npy, _read_npy)
_YAML = Format(_write_yaml, _read_yaml)
_PARQUET = Format(_write_parquet, read_frame("read_parquet"))
_FRAME = Format(_write_frame, read_pickled_frame)
_PICKLE = Format(_write_pickle, _read_pickle)

FORMATS: dict[str, Format] = {
    "pt": _TORCH,
    "pth": _TORCH,
    "npy": _NPY,
    "numpy": _NPY,
    "npz": Format(_write_npz, _read_npz),
    "json": Format(_write_json, _read_json),
    "yaml": _YAML,
    "yml": _YAML,
    "csv": Format(_write_table("csv", ","), read_frame("read_csv")),
    "tsv": Format(_write_table("tsv", "\t"), read_tabs),
    "parquet": _PARQUET,
    "pq": _PARQUET,
    "pandas": _FRAME,
    "pd": _FRAME,
    "pkl": _PICKLE,
    "pickle": _PICKLE,
}
