"""AverageMeter, AverageMeters, RoundDict."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danling.metrics import AverageMeter, AverageMeters, RoundDict

T = torch.tensor


def test_empty():
    meter = AverageMeter()
    assert all(math.isnan(v) for v in (meter.val, meter.bat, meter.avg))
    assert (meter.sum, meter.count, meter.n) == (0.0, 0, 0) and isinstance(meter.count, int)


@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, np.float32(2), np.int64(2), T(2), T([2.0]), T([[2]]), T(2.0).bfloat16()]
)
def test_scalars_of_every_kind(value):
    meter = AverageMeter()
    meter.update(value)
    meter.update(5.0, n=2)
    meter.update(value)
    assert meter.val == 2.0 and meter.avg == 3.5 and meter.count == 4 and meter.sum == 14.0
    assert isinstance(meter.val, float) and isinstance(meter.count, int)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 5), st.sampled_from("ntwN")), max_size=20))
def test_equals_the_weighted_mean(items):
    meter = AverageMeter()
    for value, n, kind in items:
        weight = {"n": n, "t": n, "w": T(n), "N": np.int64(n)}[kind]
        meter.update(T(value, dtype=torch.float64) if kind in "tw" else value, weight)
    total, count = math.fsum(v * n for v, n, _ in items), sum(n for _, n, _ in items)
    assert meter.count == count and isinstance(meter.count, int)
    if count:
        assert meter.avg == pytest.approx(total / count, rel=1e-9, abs=1e-6)
    else:
        assert math.isnan(meter.avg)


def test_counts_do_not_stall():
    meter = AverageMeter()
    meter.update(T(1.0), n=2**24)
    meter.update(T(0.0))
    assert meter.count == 2**24 + 1 and meter.sum == 2**24


def test_weights():
    meter = AverageMeter()
    meter.update(math.nan, n=0)
    meter.update(T(math.nan), n=0)
    meter.update(T(math.nan), n=T(0))
    assert math.isnan(meter.val) and meter.count == 0 and meter.sum == 0.0
    meter.update(1.0, n=0.5)
    assert meter.count == 0.5 and meter.avg == 1.0
    meter.update(math.nan)
    assert math.isnan(meter.avg)
    for n in (-1, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="at least 0"):
            meter.update(1.0, n=n)
    with pytest.raises(TypeError):
        meter.update(1.0, n="2")
    with pytest.raises(TypeError):
        meter.update("1.0")
    late = AverageMeter()
    late.update(1.0, n=T(-1))  # on an accelerator looking at it would wait
    with pytest.raises(ValueError, match="at least 0"):
        late.avg  # noqa: B018


def test_tensors():
    meter = AverageMeter()
    meter.update(T([1.0, 2.0]))
    meter.update(T([3, 5]), n=3)
    assert meter.avg.tolist() == [2.5, 4.25] and meter.val.tolist() == [3.0, 5.0] and meter.avg.dtype == torch.float64
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        meter.update(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(\).*\(2,\)"):
        meter.update(1.0)
    scalar = AverageMeter()
    scalar.update(1.0)
    with pytest.raises(ValueError, match=r"\(2,\).*\(\)"):
        scalar.update(torch.ones(2))


def test_updates_do_not_read_tensors(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("read on the host")

    meter, meters = AverageMeter(), AverageMeters()
    value = T(2.0, requires_grad=True)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        meter.update(value)
        meter.update(value * 2, n=T(3))
        meters.update(loss=value, n=2)
    assert meter.avg == 3.5 and meters.avg.loss == 2.0


def test_snapshots():
    value = T([1.0, 2.0])
    meter = AverageMeter()
    meter.update(value)
    value.zero_()
    assert meter.val.tolist() == meter.avg.tolist() == [1.0, 2.0]


def test_inference_mode():
    meter = AverageMeter()
    with torch.inference_mode():
        meter.update(T(1.0))
    meter.update(T(3.0))
    assert meter.avg == 2.0


def test_formats():
    meter = AverageMeter()
    meter.update(1.0)
    meter.update(2.0)
    assert f"{meter:.1f}" == "2.0 (1.5)" and str(meter) == "2.0000 (1.5000)"
    meters = AverageMeters()
    meters.update(loss=1.0, acc=0.5)
    assert f"{meters:.2f}" == "loss: 1.00 (1.00)  acc: 0.50 (0.50)"


def test_weight_is_no_meter():
    meters = AverageMeters()
    meters.update(loss=1.0, n=4)
    meters.update({"loss": 3.0, "n": 7.0}, n={"loss": 2})
    assert meters.count.dict() == {"loss": 6, "n": 1} and meters.avg.n == 7.0
    with pytest.raises(ValueError, match="weights for"):
        meters.update({"loss": 1.0}, n={"acc": 2})


def test_mapping():
    meters = AverageMeters({"a": AverageMeter()}, b=AverageMeter(), default_factory=AverageMeter)
    assert list(meters) == ["a", "b"] and meters.a is meters["a"] and "c" not in meters
    assert meters["c"].count == 0 and "c" in meters and len(meters) == 3
    with pytest.raises(AttributeError, match="no meter 'd'"):
        meters.d  # noqa: B018
    with pytest.raises(TypeError, match="AverageMeter"):
        meters["d"] = 1.0
    meters.update(a=1.0)
    meters.reset()
    assert list(meters) == ["a", "b", "c"] and meters.count.a == 0
    assert bool(AverageMeters())


def test_cached_values_follow_updates():
    meters = AverageMeters()
    meters.update(loss=1.0)
    assert meters.avg.loss == 1.0
    meters["loss"].update(3.0)
    assert meters.avg.loss == 2.0 and meters.val.loss == 3.0
    result = meters.avg
    result["loss"] = 0.0
    assert meters.avg.loss == 2.0


def roundtrip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_saving():
    meters = AverageMeters()
    meters.update({"a": 0.1, "b": T([0.1, 0.2]), "c": T(0.3)}, n=3)
    meters.update({"a": 0.7, "c": T(0.9)}, n=T(2))
    other = AverageMeters()
    other.load_state_dict(roundtrip(meters.state_dict()))
    for read in ("val", "avg", "count", "sum"):
        assert getattr(other, read).dict() == getattr(meters, read).dict()
    for copied in (copy.deepcopy(meters), pickle.loads(pickle.dumps(meters))):
        assert copied.avg.dict() == meters.avg.dict()
        copied.update(a=100.0)
        assert meters.count.a == 5
    with pytest.raises(ValueError, match="newer version|not the state"):
        other.load_state_dict({"version": 9})


def test_merging():
    parts = [AverageMeters() for _ in range(3)]
    whole = AverageMeters()
    for i in range(9):
        for target in (parts[i % 3], whole):
            target.update({"a": float(i), "b": T([float(i), 1.0])}, n=i)
    merged = parts[2].merge(parts[0]).merge(parts[1])
    assert merged.avg.a == pytest.approx(whole.avg.a) and merged.avg.b.tolist() == pytest.approx(whole.avg.b.tolist())
    assert merged.count.dict() == whole.count.dict()
    assert parts[0].count.a == 9 and merged.val.a == 8.0
    assert AverageMeters().merge(merged).val.a == 8.0
    wrong = AverageMeter()
    wrong.update(1.0)
    with pytest.raises(ValueError, match="shape"):
        wrong.merge(parts[0]["b"])


def test_round_dict():
    result = RoundDict({"a": 0.123456, "b": {"c": T([0.123456, 1.0])}}, d=3)
    assert result.b.c is result["b"]["c"] and round(result, 2).a == 0.12
    assert result.round().b.c.tolist() == pytest.approx([0.1235, 1.0])
    assert f"{result:.2f}" == "a: 0.12, b.c: [0.12, 1.00], d: 3.00"
    assert str(result.round(1)).splitlines()[0] == "a   : 0.1"
    assert json.loads(json.dumps(result.dict()))["b"]["c"][1] == 1.0
    assert type(result.dict()["b"]) is dict
    result.e = {"f": 1}
    assert result.e.f == 1 and isinstance(result.e, RoundDict)
    del result.e
    with pytest.raises(AttributeError, match="no key 'e'"):
        result.e  # noqa: B018
    assert pickle.loads(pickle.dumps(result)).a == result.a and copy.deepcopy(result).b.c.equal(result.b.c)
