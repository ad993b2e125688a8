"""Saving and loading: every format gives back what it got, failures leave the old file, names are exact."""

import datetime
import io
import os
import pathlib
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from danling.utils import load, load_pandas, save

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
DTYPES = hnp.scalar_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


@given(PLAIN, st.sampled_from(["json", "yaml", "yml", "pkl", "pickle", "pt", "pth"]))
def test_plain_values(folder, obj, extension):
    file = folder / f"plain.{extension}"
    assert save(obj, file) is file
    assert same(load(file), obj)


@given(ARRAYS, st.sampled_from(["npy", "numpy", "npz", "pkl"]))
def test_arrays(folder, array, extension):
    found = load(save(array, folder / f"array.{extension}"))
    # NumPy's own pickles give an empty array another byte order.
    assert same(found, pickle.loads(pickle.dumps(array)) if extension == "pkl" else array)


@given(st.dictionaries(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5), ARRAYS))
def test_mappings_of_arrays(folder, arrays):
    found = load(save(arrays, folder / "arrays.npz"))
    assert list(found) == list(arrays)
    assert all(same(found[name], arrays[name]) for name in arrays)


def test_npz_is_numpys(tmp_path):
    arrays = {"a": np.arange(3), "file": np.ones((2, 2)), "arr_0": np.zeros(1), "x/y": np.array("s")}
    save(arrays, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as archive:
        assert set(archive.files) == set(arrays)
        assert all(np.array_equal(archive[name], arrays[name]) for name in arrays)
    np.savez(tmp_path / "y.npz", a=np.arange(3), b=np.ones(2))
    assert list(load(tmp_path / "y.npz")) == ["a", "b"]
    # A mapping of one array stays a mapping; one array stays an array.
    assert list(load(save({"arr_0": np.ones(2)}, tmp_path / "z.npz"))) == ["arr_0"]
    assert same(load(save(np.ones(2), tmp_path / "z.npz")), np.ones(2))
    small = os.path.getsize(save(np.zeros(10_000), tmp_path / "small.npz", compressed=True))
    assert small < os.path.getsize(save(np.zeros(10_000), tmp_path / "large.npz")) / 10
    assert same(load(tmp_path / "small.npz"), np.zeros(10_000))


@pytest.mark.parametrize("extension", ["pt", "pth", "pkl", "pickle"])
def test_tensors(tmp_path, extension):
    shared = torch.arange(6.0)
    state = {
        "weights": shared.view(2, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "bool": torch.tensor([True]),
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.empty(0, 4),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "step": 3,
    }
    found = load(save(state, tmp_path / f"state.{extension}"))
    assert list(found) == list(state)
    for name, value in state.items():
        other = found[name]
        assert type(other) is type(value)
        if isinstance(value, torch.Tensor):
            assert (other.dtype, other.layout) == (value.dtype, value.layout)
            assert torch.equal(other.to_dense(), value.to_dense())
        else:
            assert other == value


def frame():
    return pd.DataFrame(
        {
            "count": [1, 2, 3],
            "loss": [0.5, float("nan"), 1e-300],
            "name": ["a", "b,c", 'd"e'],
            "flag": [True, False, True],
        }
    )


@pytest.mark.parametrize("extension", ["csv", "tsv", "parquet", "pq", "pandas", "pd", "pkl"])
def test_data_frames(tmp_path, extension):
    file = save(frame(), str(tmp_path / f"table.{extension}"))
    pd.testing.assert_frame_equal(load(file), frame())
    pd.testing.assert_frame_equal(load_pandas(file), frame())


@given(
    st.integers(0, 5).flatmap(
        lambda n: st.fixed_dictionaries(
            {
                "i": st.lists(st.integers(-(2**40), 2**40), min_size=n, max_size=n),
                "f": st.lists(st.floats(allow_nan=False, width=64), min_size=n, max_size=n),
                "s": st.lists(st.text(st.characters(codec="utf-8")), min_size=n, max_size=n),
            }
        )
    ),
    st.sampled_from(["parquet", "pd", "pickle"]),
)
def test_any_data_frame(folder, columns, extension):
    table = pd.DataFrame({"i": np.array(columns["i"], dtype="int64"), "f": np.array(columns["f"]), "s": columns["s"]})
    table["s"] = table["s"].astype("str")
    pd.testing.assert_frame_equal(load(save(table, folder / f"any.{extension}")), table)


def test_labels_of_rows_are_written_unless_they_only_number_them(tmp_path):
    named = frame().set_index("name")
    pd.testing.assert_frame_equal(load(save(named, tmp_path / "named.csv"), index_col=0), named)
    assert (tmp_path / "named.csv").read_text().startswith("name,count")
    assert save(frame(), tmp_path / "plain.csv").read_text().startswith("count,")


def test_arrow_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": [1, 2], "b": ["x", None]})
    pd.testing.assert_frame_equal(load(save(table, tmp_path / "table.parquet")), table.to_pandas())


def test_load_pandas_reads_further_formats(tmp_path):
    table = frame()
    table.to_json(tmp_path / "t.json")
    table.to_excel(tmp_path / "t.xlsx", index=False)
    table.to_xml(tmp_path / "t.xml", index=False, parser="etree")
    for name in ("t.json", "t.xlsx", "t.xml"):
        found = load_pandas(tmp_path / name)
        assert list(found.columns) == list(table.columns)
        assert found["count"].tolist() == [1, 2, 3]
    connection = sqlite3.connect(":memory:")
    try:
        table.to_sql("runs", connection, index=False)
        (tmp_path / "t.sql").write_text("SELECT count FROM runs WHERE count > 1")
        assert load_pandas(tmp_path / "t.sql", con=connection)["count"].tolist() == [2, 3]
    finally:
        connection.close()
    with pytest.raises(TypeError, match="con="):
        load_pandas(tmp_path / "t.sql")
    save([1], tmp_path / "list.pkl")
    with pytest.raises(TypeError, match="holds a list, not a data frame"):
        load_pandas(tmp_path / "list.pkl")


# Names and files


def test_any_kind_of_path(tmp_path):
    for path in (tmp_path / "a.json", str(tmp_path / "b.json"), os.fsencode(tmp_path / "c.JSON")):
        assert save([1], path) is path
        assert load(path) == [1]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json", "c.JSON"]  # exactly these, and nothing left over


def test_open_files():
    stream = io.BytesIO()
    assert save({"a": 1}, stream, format="yaml") is stream
    stream.seek(0)
    assert load(stream, format=".YAML") == {"a": 1}
    for call in (lambda: save(1, io.BytesIO()), lambda: load(io.BytesIO(b"1"))):
        with pytest.raises(ValueError, match="format="):
            call()


def test_open_files_know_their_names(tmp_path):
    with open(tmp_path / "x.json", "wb") as stream:
        save([2], stream)
    with open(tmp_path / "x.json", "rb") as stream:
        assert load(stream) == [2]


def test_format_wins_over_the_extension(tmp_path):
    save([1], tmp_path / "state.tmp", format="json")
    assert (tmp_path / "state.tmp").read_text() == "[1]"
    assert load(tmp_path / "state.tmp", format="yaml") == [1]


def test_arguments_reach_the_writer_and_reader(tmp_path):
    save({"b": 1, "a": 2}, tmp_path / "x.json", indent=2, sort_keys=True)
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}'
    save(frame(), tmp_path / "x.csv", columns=["loss"])
    assert list(load(tmp_path / "x.csv", nrows=1).columns) == ["loss"]
    save(np.arange(4), tmp_path / "x.npy")
    assert isinstance(load(tmp_path / "x.npy", mmap_mode="r"), np.memmap)
    save({"w": torch.ones(2)}, tmp_path / "x.pt")
    assert torch.equal(load(tmp_path / "x.pt", mmap=True, map_location="cpu")["w"], torch.ones(2))


def test_parents_are_created_and_links_followed(tmp_path):
    save(1, tmp_path / "a" / "b" / "c.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "a" / "b" / "c.json")
    save(2, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert load(tmp_path / "a" / "b" / "c.json") == 2


def test_permissions_are_those_of_open(tmp_path):
    with open(tmp_path / "plain", "w"):
        pass
    save(1, tmp_path / "x.json")
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "x.json").chmod(0o600)
    save(2, tmp_path / "x.json")
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o600


def test_devices_are_written_to_and_directories_refused(tmp_path):
    save([1], os.devnull, format="json")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError):
        save([1], tmp_path / "x.json")


def test_unknown_extensions_list_the_known():
    for call in (lambda: save(1, "x.unknown"), lambda: load("x.unknown"), lambda: load_pandas("x.unknown")):
        with pytest.raises(ValueError, match=r"unknown extension 'unknown' of 'x.unknown'; known are .*json"):
            call()
    with pytest.raises(ValueError, match="unknown extension ''"):
        save(1, "x")
    with pytest.raises(FileNotFoundError):
        load("no-such-file.json")


@pytest.mark.parametrize(
    ("obj", "extension"),
    [
        ({1, 2}, "json"),
        (object(), "json"),
        ({"a": object()}, "yaml"),
        ([1, 2], "npy"),
        (np.array([object()]), "npy"),
        (np.ma.masked_array([1], [True]), "npy"),
        ({"a": [1]}, "npz"),
        ({1: np.ones(1)}, "npz"),
        ({"a": 1}, "csv"),
        (np.ones((2, 2)), "tsv"),
        ({"a": 1}, "parquet"),
        ([1], "pd"),
        (pd.Series([1]), "pandas"),
    ],
)
def test_objects_of_the_wrong_kind_are_refused_before_anything_is_written(tmp_path, obj, extension):
    file = tmp_path / "new" / f"x.{extension}"
    with pytest.raises(TypeError, match=extension if extension not in ("pd", "tsv") else "data frame"):
        save(obj, file)
    assert not file.parent.exists()
    stream = io.BytesIO()
    with pytest.raises(TypeError):
        save(obj, stream, format=extension)
    assert stream.getvalue() == b""


def test_cycles_are_of_the_wrong_kind(tmp_path):
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(TypeError, match="json"):
        save(cycle, tmp_path / "x.json")


# Failures


class Fails:
    def __reduce__(self):
        raise RuntimeError("half-way")


@pytest.mark.parametrize("extension", ["pkl", "pt"])
def test_a_failure_leaves_the_old_file(tmp_path, extension):
    file = tmp_path / f"x.{extension}"
    save([1], file)
    before = file.read_bytes()
    with pytest.raises(RuntimeError, match="half-way"):
        save([list(range(100_000)), Fails()], file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


CRASH = """
import os, sys
import danling.utils as utils
def crash(*args):
    os._exit(137)
setattr(os, sys.argv[2], crash)
utils.save({"new": list(range(1000))}, sys.argv[1])
"""


@pytest.mark.parametrize("point", ["replace", "fsync"])
def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path, point):
    file = tmp_path / "x.json"
    save({"old": 1}, file)
    result = subprocess.run([sys.executable, "-c", CRASH, file, point])
    assert result.returncode == 137
    assert load(file) == {"old": 1}
    save({"newer": 2}, file)
    assert load(file) == {"newer": 2}


def test_killed_writers_never_leave_half_a_file(tmp_path):
    file = tmp_path / "x.json"
    save([0] * 50_000, file)
    code = (
        "import sys; from danling.utils import save\n"
        "for i in range(10**9): save([i] * 50_000, sys.argv[1]); i or print('started', flush=True)"
    )
    for delay in (0.0, 0.013, 0.029):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            writer.wait(delay)
        except subprocess.TimeoutExpired:
            pass
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = load(file)
        assert len(found) == 50_000
        assert len(set(found)) == 1


# Untrusted files


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pd", "pandas", "pt", "pth", "npy", "npz"])
def test_no_code_from_the_file_runs(tmp_path, extension):
    marker, file = tmp_path / "marker", tmp_path / f"x.{extension}"
    evil = Evil(str(marker))
    if extension == "npy":
        np.save(file, np.array([evil], dtype=object), allow_pickle=True)
    elif extension == "npz":
        np.savez(file, x=np.array([evil], dtype=object))
    elif extension.startswith("pt"):
        torch.save({"x": evil}, file)
    else:
        file.write_bytes(pickle.dumps({"x": evil}))
    for reader in (load, load_pandas) if extension in ("pkl", "pd", "pandas") else (load,):
        with pytest.raises(pickle.UnpicklingError, match="trusted=True"):
            reader(file)
    assert not marker.exists()
    if extension not in ("pd", "pandas"):
        load(file, trusted=True)
        assert marker.exists()


def attacks(marker):
    """Pickles that reach for code by way of what is allowed."""
    command = f"touch {marker}"
    inner = pickle.dumps(Evil(marker), protocol=2)

    def call(module, name, *args):
        out = b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"("
        for arg in args:
            out += arg if isinstance(arg, bytes) else b"V" + arg.encode("raw_unicode_escape") + b"\n"
        return out + b"tR."

    def frames(data):
        return b"B" + len(data).to_bytes(4, "little") + data

    yield call("os", "system", command)
    yield call("posix", "system", command)
    yield call("builtins", "eval", "1")
    yield call("builtins", "exec", "1")
    yield call("builtins", "__import__", "os")
    yield call("builtins", "getattr", b"cbuiltins\nlist\n", "__class__")
    yield call("builtins", "getattr", b"czoneinfo\nZoneInfo\n", "__init_subclass__")
    yield call("torch.storage", "_load_from_bytes", frames(inner))
    yield call("torch", "load", command)
    yield call("torch.serialization", "load", command)
    yield call("numpy", "load", command)
    yield call("pandas", "read_pickle", command)
    yield call("pandas", "eval", "1")
    yield call("subprocess", "getoutput", command)
    yield call("functools", "partial", b"cbuiltins\nint\n")
    yield call("operator", "attrgetter", "x")
    # A dotted name reaches an attribute of something that is allowed.
    for module, name in (("pandas", "DataFrame.eval"), ("pathlib", "Path.unlink"), ("builtins", "str.format")):
        yield (
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
            + b"\x93."
        )


def test_attacks_by_way_of_what_is_allowed(tmp_path):
    marker = tmp_path / "marker"
    for i, attack in enumerate(attacks(marker)):
        (tmp_path / "x.pkl").write_bytes(attack)
        with pytest.raises(pickle.UnpicklingError):
            print(i, load(tmp_path / "x.pkl"))
        assert not marker.exists()


class Own:
    pass


def test_own_types_need_trust(tmp_path):
    file = save(Own(), tmp_path / "x.pkl")
    with pytest.raises(pickle.UnpicklingError, match=r"Own, which .* trusted=True"):
        load(file)
    assert type(load(file, trusted=True)) is Own


def test_hdf5_needs_trust(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(pickle.UnpicklingError, match="trusted=True"):
        load_pandas(tmp_path / "x.h5")


def test_yaml_builds_plain_values_only(tmp_path):
    (tmp_path / "x.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load(tmp_path / "x.yaml")


# Everything that a pickle may hold


CONTENTS = {
    "containers": [[1], (2,), {3}, frozenset([4]), {"a": b"b"}, bytearray(b"c"), range(5), slice(1, 2), 1j, ..., None],
    "types": [int, list, str],
    "dates": [
        datetime.date(2020, 1, 2),
        datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC),
        datetime.timedelta(1, 2, 3),
        datetime.time(4),
        datetime.timezone(datetime.timedelta(hours=2)),
    ],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d")],
    "scalars": [np.float32(1.5), np.int64(2), np.bool_(True), np.datetime64("2020-01-01"), np.str_("x")],
    "dtypes": [np.dtype("f4"), np.dtype([("a", "i4"), ("b", "U3")])],
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", CONTENTS)
def test_allowed_contents(tmp_path, name, protocol):
    found = load(save(CONTENTS[name], tmp_path / "x.pkl", protocol=protocol))
    assert found == CONTENTS[name]
    assert list(map(type, found)) == list(map(type, CONTENTS[name]))


def test_allowed_collections(tmp_path):
    import collections

    objects = [
        collections.OrderedDict(a=1),
        collections.deque([1], 3),
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
        collections.ChainMap({"a": 1}),
        collections.UserDict(a=1),
        collections.UserList([1]),
        collections.UserString("a"),
    ]
    found = load(save(objects, tmp_path / "x.pkl"))
    assert found == objects
    assert list(map(type, found)) == list(map(type, objects))
    assert found[2].default_factory is list


@pytest.mark.parametrize("protocol", [4, 5])
def test_allowed_arrays(tmp_path, protocol):
    arrays = [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.array(["a", "bc"]),
        np.array(["2020"], dtype="M8[D]"),
        np.zeros(2, dtype=[("a", "i4")]),
        np.array([1, None, "x"], dtype=object),
        np.ones(3)[::2],
    ]
    for array, found in zip(arrays, load(save(arrays, tmp_path / "x.pkl", protocol=protocol)), strict=True):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert (found == array).all()


def rich_frame():
    dates = pd.to_datetime(["2020-01-01", "2021-06-01"])
    return pd.DataFrame(
        {
            "number": [1, 2],
            "float": [0.5, float("nan")],
            "small": np.array([1, 2], dtype="int8"),
            "complex": [1j, 2],
            "flag": [True, False],
            "string": ["a", "b"],
            "python": pd.array(["a", None], dtype="string[python]"),
            "arrow": pd.array(["a", None], dtype="string"),
            "date": dates,
            "utc": dates.tz_localize("UTC"),
            "berlin": dates.tz_localize("Europe/Berlin"),
            "delta": pd.to_timedelta([1, 2], unit="D"),
            "period": pd.period_range("2020", periods=2, freq="M"),
            "category": pd.Categorical(["x", "y"]),
            "ordered": pd.Categorical([1, 2], ordered=True),
            "dated": pd.Categorical(dates),
            "nullable": pd.array([1, None], dtype="Int64"),
            "unsigned": pd.array([1, None], dtype="UInt8"),
            "boolean": pd.array([True, None], dtype="boolean"),
            "floating": pd.array([1.0, None], dtype="Float32"),
            "object": pd.Series([1, "a"], dtype=object),
            "stamp": pd.Series([pd.Timestamp("2020"), pd.NaT], dtype=object),
            "span": pd.Series([pd.Timedelta("1D"), pd.NA], dtype=object),
        }
    )


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    "index", [None, "date", "berlin", "string", "category", "period", "delta", ["number", "string"]]
)
def test_allowed_data_frames(tmp_path, index, protocol):
    table = rich_frame()
    if index is not None:
        table = table.set_index(index)
    for extension in ("pkl", "pd"):
        pd.testing.assert_frame_equal(load(save(table, tmp_path / f"x.{extension}", protocol=protocol)), table)


@pytest.mark.parametrize(
    "index", [pd.date_range("2020", periods=3), pd.date_range("2020", periods=3, freq="h"), pd.interval_range(0, 3)]
)
def test_allowed_indices(tmp_path, index):
    table = pd.DataFrame({"a": [1, 2, 3]}, index=index)
    pd.testing.assert_frame_equal(load(save(table, tmp_path / "x.pkl")), table)
    pd.testing.assert_series_equal(load(save(table["a"], tmp_path / "x.pkl")), table["a"])


# Missing libraries


@pytest.mark.parametrize(
    ("library", "extension"),
    [("torch", "pt"), ("numpy", "npy"), ("numpy", "npz"), ("yaml", "yaml"), ("pandas", "csv"), ("pandas", "parquet")],
)
def test_a_missing_library_is_named(tmp_path, library, extension):
    file = tmp_path / f"x.{extension}"
    file.write_bytes(b"x")
    code = f"""
import sys
sys.modules[{library!r}] = None
from danling.utils import load, save
for call in (lambda: save({{}}, {str(file)!r}), lambda: load({str(file)!r})):
    try:
        call()
    except ImportError as error:
        assert "needs {library}" in str(error) and "pip install {library}" in str(error), error
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert file.read_bytes() == b"x"
