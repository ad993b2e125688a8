"""Files replaced whole or not at all, and JSON that survives a loss that is not a number."""

from __future__ import annotations

import enum
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.runners import atomic

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
LEAVES = st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5)
KEYS = st.text(max_size=6).filter(lambda key: key not in (atomic.NONFINITE, atomic.NONFINITE_VALUES))
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def same(left, right) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right) or left != left and right != right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_json_round_trip_is_exact(tree):
    text = atomic.dump_json(tree)
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(atomic.restore_nonfinite(parsed), tree)


def test_nonfinite_numbers_are_null_with_their_paths(tmp_path):
    row = {"val": {"loss": math.nan, "a/b": [1.0, -math.inf], "t~u": math.inf, "acc": 0.1 + 0.2}}
    atomic.write_json(tmp_path / "r.json", row)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "val": {"loss": None, "a/b": [1.0, None], "t~u": None, "acc": 0.30000000000000004},
        "nonfinite": ["/val/loss", "/val/a~1b/1", "/val/t~0u"],
        "nonfinite_values": ["nan", "-inf", "inf"],
    }
    back = atomic.read_json(tmp_path / "r.json")
    assert same(back, row)
    atomic.write_yaml(tmp_path / "r.yaml", row)
    assert ".nan" not in (tmp_path / "r.yaml").read_text()
    assert same(atomic.read_yaml(tmp_path / "r.yaml"), row)


def test_what_is_not_a_mapping_has_no_room_for_the_list():
    with pytest.raises(ValueError, match="nan at /1: only a mapping"):
        atomic.dump_json([1.0, math.nan])


class Colour(enum.Enum):
    RED = "red"


class Size(enum.StrEnum):
    BIG = "big"


def test_python_objects_become_plain():
    tree = {
        1: (Path("a/b"), Colour.RED, Size.BIG, {3, 1}),
        Size.BIG: np.float32(0.5),
        "array": np.arange(2),
        "int": np.int64(7),
        "bool": np.bool_(True),
    }
    assert atomic.plain(tree) == {
        "1": ["a/b", "red", "big", [1, 3]],
        "big": 0.5,
        "array": [0, 1],
        "int": 7,
        "bool": True,
    }


@pytest.mark.parametrize("value", [object(), b"bytes", 1j])
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises(TypeError, match="/a/1: cannot store"):
        atomic.dump_json({"a": [0, value]})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, name, fail)
            with pytest.raises(OSError, match="No space"):
                atomic.write_json(path, {"a": 2})
        assert atomic.read_json(path) == {"a": 1}
        assert os.listdir(tmp_path) == ["file.json"]
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert atomic.read_json(path) == {"a": 1}


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        atomic.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
        atomic.read_yaml(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError):
        atomic.read_json(tmp_path / "b.json")


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file.json"
    atomic.write_json(path, {"n": 0, "pad": "x" * 50_000})
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from danling.runners.atomic import write_json\n"
            "for n in range(300): write_json(sys.argv[1], {'n': n, 'pad': 'x' * 50_000}, durable=False)",
            str(path),
        ]
    )
    last = reads = 0
    while writer.poll() is None:
        n = atomic.read_json(path)["n"]
        assert n >= last
        last, reads = n, reads + 1
    assert writer.returncode == 0 and reads > 0 and os.listdir(tmp_path) == ["file.json"]
