"""Saving and loading by file extension: atomically, and without running code from the file."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from .formats import FORMATS, read_frame, read_pickled_frame, read_tabs, require

File = TypeVar("File")


def save(obj: Any, file: File, *args: Any, format: str | None = None, **kwargs: Any) -> File:
    """Save an object in the format that the file's extension names.

    The file is written beside its place, flushed to disk and renamed, so that a failure or a crash leaves the old file
    as it was. Its directory is created if necessary.

    | extension | object |
    |---|---|
    | `pt` `pth` | anything that `torch.save` takes |
    | `npy` `numpy`; `npz` | one array; a mapping of arrays, or one array |
    | `json`; `yaml` `yml` | plain values |
    | `csv` `tsv` | data frames; row labels are written unless they only number the rows |
    | `parquet` `pq`; `pandas` `pd` | data frames; for parquet Arrow tables too |
    | `pkl` `pickle` | anything that pickles |

    Args:
        obj: what to save.
        file: path (`str`, `bytes` or `PathLike`), or a binary file open for writing.
        *args: passed on to the writer of the format.
        format: an extension that decides instead of the file's own.
        **kwargs: passed on to the writer of the format.

    Returns:
        `file`.

    Raises:
        ValueError: the extension is unknown.
        TypeError: the format cannot hold the object; nothing has been written.
        ImportError: the library of the format is missing.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save({"epoch": 3}, f"{folder}/runs/state.json")
        ...     load(path)
        {'epoch': 3}
    """
    emit = _of(file, format, FORMATS).write(obj, *args, **kwargs)
    if hasattr(file, "write"):
        emit(file)
    else:
        with _replacing(os.fsdecode(file)) as stream:  # type: ignore[arg-type]
            emit(stream)
    return file


def load(file: Any, *args: Any, format: str | None = None, trusted: bool = False, **kwargs: Any) -> Any:
    """Load what `save` wrote; tables come as data frames.

    Nothing in the file is executed unless `trusted`: torch files are read with `weights_only=True`, NumPy files without
    object arrays, YAML with the safe loader, and pickles may only hold types from a short list (containers, scalars,
    dates, paths, arrays, tensors, data frames).

    Args:
        file: path (`str`, `bytes` or `PathLike`), or a binary file open for reading.
        *args: passed on to the reader of the format.
        format: an extension that decides instead of the file's own.
        trusted: allow the file to run code.
        **kwargs: passed on to the reader of the format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the extension is unknown.
        pickle.UnpicklingError: the file holds a type that is not allowed; the message names it and `trusted`.
        ImportError: the library of the format is missing.
    """
    return _read(file, _of(file, format, FORMATS).read, trusted, args, kwargs)


def load_pandas(file: Any, *args: Any, format: str | None = None, trusted: bool = False, **kwargs: Any) -> Any:
    """Load a table as a `pandas.DataFrame`.

    Known extensions: `csv tsv json xml xlsx xls h5 hdf5 parquet pq sql pandas pd pkl pickle`. A `sql` file holds one
    query and needs `con=...`. HDF5 files can run code and therefore need `trusted=True`.

    Args:
        file: path (`str`, `bytes` or `PathLike`), or a binary file open for reading.
        *args: passed on to the reader of pandas.
        format: an extension that decides instead of the file's own.
        trusted: allow the file to run code.
        **kwargs: passed on to the reader of pandas.

    Raises:
        FileNotFoundError, ValueError, pickle.UnpicklingError, ImportError: as for `load`.
        TypeError: a `sql` file without `con`, or a pickle that holds no data frame.
    """
    return _read(file, _of(file, format, TABLES), trusted, args, kwargs)


def _read(file: Any, reader: Callable[..., Any], trusted: bool, args: Any, kwargs: Any) -> Any:
    if hasattr(file, "read"):
        return reader(file, trusted, *args, **kwargs)
    with open(file, "rb") as stream:
        return reader(stream, trusted, *args, **kwargs)


def _read_query(stream: Any, trusted: bool, *args: Any, con: Any = None, **kwargs: Any) -> Any:
    if con is None:
        raise TypeError("a sql file holds a query: pass con=..., the connection that answers it")
    return require("pandas", "a query").read_sql_query(stream.read().decode(), con, *args, **kwargs)


def _read_hdf(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    if not trusted:
        raise pickle.UnpicklingError(
            "HDF5 tables may hold pickled objects, which run code; if you trust the origin of the file, "
            "pass trusted=True"
        )
    return require("pandas", "an HDF5 file").read_hdf(stream.name, *args, **kwargs)


def _read_xml(stream: Any, trusted: bool, *args: Any, **kwargs: Any) -> Any:
    # The parser of the standard library fetches nothing that the file names.
    return require("pandas", "an XML file").read_xml(stream, *args, **{"parser": "etree", **kwargs})


TABLES: dict[str, Callable[..., Any]] = {
    "csv": read_frame("read_csv"),
    "tsv": read_tabs,
    "json": read_frame("read_json"),
    "xml": _read_xml,
    "xlsx": read_frame("read_excel"),
    "xls": read_frame("read_excel"),
    "h5": _read_hdf,
    "hdf5": _read_hdf,
    "parquet": read_frame("read_parquet"),
    "pq": read_frame("read_parquet"),
    "sql": _read_query,
    "pandas": read_pickled_frame,
    "pd": read_pickled_frame,
    "pkl": read_pickled_frame,
    "pickle": read_pickled_frame,
}


def _of(file: Any, format: str | None, known: Mapping[str, Any]) -> Any:
    """Return the entry of a table of formats that belongs to a file."""
    suffix = _extension(file, format)
    if suffix not in known:
        raise ValueError(f"unknown extension {suffix!r} of {file!r}; known are {', '.join(known)}")
    return known[suffix]


def _extension(file: Any, format: str | None) -> str:
    if format is not None:
        return format.lower().lstrip(".")
    name = file
    if hasattr(file, "write") or hasattr(file, "read"):
        name = getattr(file, "name", None)
        if not isinstance(name, (str, bytes)):
            raise ValueError("an open file without a name needs format=..., for example format='json'")
    return os.path.splitext(os.fsdecode(name))[1].lower().lstrip(".")


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[Any]:
    """Open a sibling of `path` for writing and, once it is complete and on disk, rename it to `path`."""
    target = os.path.realpath(path)  # a symbolic link stays, as it does with `open`
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        with open(target, "wb") as stream:  # a pipe or a device; for a directory the clear error of `open`
            yield stream
        return
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make a rename last through a power cut, where the system offers it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
