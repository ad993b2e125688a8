"""Ranks that read together: real gloo processes, every disagreement ends in an error on every rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("rank_scenarios.py")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(SCRIPT, request.param, [str(folder)], timeout=240)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def values(ranks, name):
    for rank in ranks:
        assert "error" not in rank[name], rank[name]["trace"]
    return [rank[name]["value"] for rank in ranks]


def same(a, b, tolerance=1e-9):
    assert list(a) == list(b)
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=tolerance, nan_ok=True), key


def test_uneven_shares(ranks):
    for value in values(ranks, "uneven_shares"):
        for ours, alone in value.values():
            assert ours == alone


def test_counts_only(ranks):
    for value in values(ranks, "counts_only"):
        same(value["ours"], value["alone"])


def test_regression(ranks):
    for value in values(ranks, "regression"):
        for ours, alone in value.values():
            same(ours, alone)


def test_every_rank_holds_the_same_bits(ranks):
    for name in ("uneven_shares", "counts_only", "regression", "stream", "meters"):
        found = values(ranks, name)
        if name in ("uneven_shares", "regression"):
            found = [{mode: pair[0] for mode, pair in value.items()} for value in found]
        elif name == "counts_only":
            found = [value["ours"] for value in found]
        else:
            found = [{k: value[k] for k in ("avg", "bat")} for value in found]
        assert len({json.dumps(f, sort_keys=True) for f in found}) == 1, found


def test_stream(ranks):
    found = values(ranks, "stream")
    weights = [2 * (r + 1) for r in range(len(ranks) - 1)]
    accuracies = [1.0, 0.5][: len(weights)]
    expected = sum(w * a for w, a in zip(weights, accuracies)) / sum(weights)
    for value in found:
        assert value["avg"]["acc"] == pytest.approx(expected)
        assert value["bat"]["acc"] == pytest.approx(expected)
        assert value["avg"]["auroc"] == 1.0
    assert math.isnan(found[-1]["local"]["acc"])


def test_logits_are_decided_by_all_ranks(ranks):
    world = len(ranks)
    for rank, value in enumerate(values(ranks, "one_rank_decides_on_logits")):
        expected = (1 + 2 * (world - 1)) / (2 * world)
        assert value[:3] == pytest.approx([expected] * 3)
        assert value[3] == (0.5 if rank == 0 else 0.0)


def test_meters(ranks):
    for rank, value in enumerate(values(ranks, "meters")):
        assert value["avg"] == {"loss": 3.0, "grad": [1.0, 2.0]}
        assert value["bat"] == value["avg"] == value["again"]
        assert value["count"] == {"loss": (1, 2, 0)[rank], "grad": (1, 0, 0)[rank]}


def test_one_meter(ranks):
    expected = {2: 0.0, 3: 2 / 3}[len(ranks)]
    for value in values(ranks, "one_meter"):
        assert value[:2] == pytest.approx([expected, expected])
        assert value[3] == {2: 1, 3: 3}[len(ranks)]


def test_ten_scalars_take_one_header_and_one_buffer(ranks):
    for value in values(ranks, "ten_scalars_in_two_collectives"):
        assert value["first"] == ["all_gather", "all_gather"]
        assert value["cached"] == ["all_gather"]
        assert value["m3"] == 3 + (len(ranks) - 1) / 2


def test_multi_task_takes_one_exchange(ranks):
    for value in values(ranks, "multi_task_in_one_exchange"):
        same(value["result"]["cls"], value["alone"])
        assert value["result"]["one"]["acc"] > 0
        assert "silent" not in value["result"]
        assert value["collectives"] == ["all_gather", "all_reduce", "all_gather"]
        assert value["bat"] == ["aggregate", "cls", "on", "one"]


def test_repeated_reads(ranks):
    for value in values(ranks, "read_again_and_again"):
        for ours, alone, again in value:
            assert ours == alone == again


def test_only_new_rows_travel(ranks):
    for sizes in values(ranks, "only_new_rows_travel"):
        assert len(sizes) == 2 and sizes[1] < 1000


def test_change_on_one_rank_only(ranks):
    world = len(ranks)
    total = world * (world - 1) / 2
    for first, second, third, again in values(ranks, "change_on_one_rank_only"):
        assert first == pytest.approx(total / world)
        assert second == pytest.approx((total + 100) / (world + 1))
        assert third == again == pytest.approx((total + 100 - 1) / world)


def test_reset_on_one_rank_only(ranks):
    for value in values(ranks, "reset_on_one_rank_only"):
        for ours, expected in value:
            assert ours == expected


def test_sub_group(ranks):
    found = values(ranks, "sub_group")
    assert found[:2] == [[0.75, 0.5], [0.75, 0.5]] and all(v is None for v in found[2:])


def test_mixed_dtypes_and_masks(ranks):
    for ours, alone in values(ranks, "mixed_dtypes"):
        assert ours == pytest.approx(alone)
    assert values(ranks, "masks_on_one_rank_only") == [10 + 30 * (len(ranks) - 1)] * len(ranks)


def test_nobody_has_data(ranks):
    for metrics, meter, meters in values(ranks, "nobody_has_data"):
        assert all(math.isnan(v) for v in metrics.values()) and math.isnan(meter) and meters == {}


@pytest.mark.parametrize(
    "name, words",
    [
        ("other_names", ["meters.loss", "meters.lose", "rank 0", "rank 1"]),
        ("other_metrics", ["metrics.f1", "rank 0"]),
        ("other_options", ["threshold", "0.4", "0.5"]),
        ("other_shapes", ["'x'", "(3,)", "(2,)"]),
        ("labels_and_scores", ["labels of shape (N,)", "scores of shape (N, 4)"]),
        ("other_container", ["class", "AverageMeters", "GlobalMetrics"]),
        ("other_read", ["batch or average"]),
        ("bad_target", []),
        ("bad_target_online", []),
        ("bad_target_stream", []),
        ("negative_weight", []),
    ],
)
def test_disagreement_raises_on_every_rank(ranks, name, words):
    for rank, results in enumerate(ranks):
        result = results[f"fails_{name}"]
        assert "error" in result, (name, rank, result)
        if words:
            assert result["error"] == "MetricSyncError", result["trace"]
            assert all(word in result["message"] for word in words), result["message"]
        elif rank == 1:
            assert result["error"] == "ValueError", result["trace"]
        else:
            assert result["error"] == "MetricSyncError" and "rank 1" in result["message"], result["trace"]


def test_reading_goes_on_after_failures(ranks):
    world = len(ranks)
    for value in values(ranks, "still_works_after_failures"):
        assert value == [pytest.approx((world // 2) / world), 1.0, 0.0]
