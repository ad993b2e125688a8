"""The history of a run: rows, scores, best, patience, and their files."""

from __future__ import annotations

import json
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.runners import Results
from danling.runners.atomic import read_json
from danling.runners.scores import choose_score_split, find_score, is_better, score_direction

HEADER = {"name": "run", "id": "ab-12", "uuid": "u", "config_id": "12", "timestamp": "20260101-000000-000000"}


def history(*losses: float | None, **options) -> Results:
    results = Results(score_split="val", **options)
    for index, loss in enumerate(losses, 1):
        results.append({"val": {} if loss is None else {"loss": loss}, "test": {"loss": 0.0}}, index)
    return results


SMALLER = """loss error err mae mse rmse msle mape smape nll bce perplexity ppl wer cer mer ter eer kl brier ece fid
distance cost latency val/loss top5_error Test.MAE binary_cross_entropy soft-err train_loss crossentropy_loss""".split()
LARGER = "accuracy auroc f1 mcc lossless r2 bleu dice terse spearman iou map".split()


@pytest.mark.parametrize("name", SMALLER)
def test_names_of_which_less_is_better(name):
    assert score_direction(name) == "min"


@pytest.mark.parametrize("name", LARGER)
def test_names_of_which_more_is_better(name):
    assert score_direction(name) == "max"


def test_mode_and_metric_go_before_the_name():
    assert score_direction("loss", "max") == score_direction("loss", "MAX") == "max"
    assert score_direction("accuracy", "min", higher_is_better=True) == "min"
    assert score_direction("loss", higher_is_better=True) == "max"
    with pytest.raises(ValueError, match="auto, min or max, got 'best'"):
        score_direction("loss", "best")


def test_split_of_the_score():
    assert choose_score_split(["test", "dev", "validation"]) == "validation"
    assert choose_score_split(["test", "extra"]) == "test"
    results = Results()
    assert results.fix_score_split() is None
    results.append({"train": {"loss": 1.0}, "val": {"loss": 2.0}}, 1)
    results.append({"train": {"loss": 0.5}, "validate": {"loss": 0.1}}, 2)
    assert results.score_split == "val" and results.scores == {1: 2.0}  # fixed on first use
    assert Results(score_split="test").fix_score_split(["val"]) == "test"


@pytest.mark.parametrize("value", [None, "text", [1.0], {"mean": 1.0}])
def test_what_is_not_one_number_is_no_score(value):
    assert find_score({"val": {"loss": value}}, "val", "loss") is None


def test_a_name_with_dots_may_be_a_key_or_a_path():
    assert find_score({"val": {"a.b": 1.0}}, "val", "a.b") == 1.0
    assert find_score({"val": {"a": {"b": 2}}}, "val", "a.b") == 2.0
    assert find_score({"val": {"a": 1.0}}, "val", "a.b") is None
    assert find_score({}, None, "a") is None


def test_rows_are_ordered_and_merged():
    results = Results()
    results.append({"val": {"loss": 2.0}}, 3)
    results.append({"val": {"loss": 1.0}}, 1)
    results.append({"val": {"acc": 0.5}, "train": {"loss": 4.0}}, 3)
    assert results.indices == [1, 3] and len(results) == 2 and 3 in results
    assert results.latest_result == {"index": 3, "val": {"loss": 2.0, "acc": 0.5}, "train": {"loss": 4.0}}
    results.latest_result["val"]["loss"] = -1.0
    results.rows()[1]["val"]["loss"] = -1.0
    assert results[3]["val"]["loss"] == 2.0 and results.best_index == 1  # copies
    with pytest.raises(ValueError, match="-1"):
        results.append({}, -1)


def test_best_is_the_earliest_of_equals_and_never_nan():
    results = history(2.0, 1.0, 1.0, math.nan, 3.0)
    assert results.best_index == 2 and results.best_score == 1.0 and not results.is_best
    assert results.best_result == {"index": 2, "val": {"loss": 1.0}, "test": {"loss": 0.0}}
    assert math.isnan(results.scores[4])
    assert history(1.0, score_mode="max").best_index == 1


def test_is_best():
    assert Results().is_best
    assert history(1.0).is_best and history(2.0, 1.0).is_best
    assert not history(1.0, 1.0).is_best and not history(1.0, math.nan).is_best and not history(math.nan).is_best
    assert history(math.nan, 5.0).is_best
    with pytest.warns(UserWarning, match="no score: 'loss' is not a number among the metrics of split 'val'"):
        assert not history(1.0, None).is_best


def test_a_missing_score_is_warned_about_once():
    results = Results(score_name="acc", score_split="val")
    with pytest.warns(UserWarning, match=r"'acc'.*\(loss\)"):
        results.append({"val": {"loss": 1.0}}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.append({"val": {"loss": 1.0}}, 2)
    assert results.best_index is None and results.best_result is None and results.latest_score is None


@given(
    st.lists(st.floats(allow_infinity=True, allow_nan=True) | st.integers(-3, 3).map(float), min_size=1, max_size=12)
)
def test_best_agrees_with_a_plain_search(losses):
    results = history(*losses)
    numbers = [loss for loss in losses if not math.isnan(loss)]
    expected = losses.index(min(numbers)) + 1 if numbers else None
    assert results.best_index == expected
    assert results.is_best == (expected == len(losses))
    best: float | None = None
    for loss in losses:
        best = loss if is_better(loss, best, "min") else best
    assert best == results.best_score or best is None and results.best_index is None


def test_patience_counts_evaluations_in_a_row():
    results = Results(score_split="val", patience=2)
    verdicts = []
    for index, loss in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, math.nan], 1):
        results.append({"val": {"loss": loss}}, index)
        verdicts.append((results.count_evaluation(), results.stale))
    assert verdicts == [(False, 0), (False, 0), (False, 1), (False, 0), (False, 1), (True, 2)]
    assert results.exhausted
    never = history(1.0, 2.0, 3.0)
    assert not any(never.count_evaluation() for _ in range(50))


def test_state_survives_json_bit_for_bit():
    results = history(0.1 + 0.2, 1e-310, -0.0, math.nan, math.inf, patience=7)
    results.count_evaluation()
    state = json.loads(json.dumps(results.state_dict()))
    other = Results(patience=3)
    other.load_state_dict(state)
    assert repr(other.rows()) == repr(results.rows()) and other.stale == results.stale == 1
    assert other.score_split == "val" and other.best_index == results.best_index == 3 and other.patience == 3
    other.append({"val": {"loss": -1.0}}, 6)
    assert len(results) == 5 and other.is_best


def test_rows_of_another_unit_are_refused():
    state = Results("step").state_dict()
    Results("epoch").load_state_dict(state)  # nothing is in it
    state["rows"] = {"10": {"val": {"loss": 1.0}}}
    with pytest.raises(ValueError, match="counted in steps, this run counts epochs"):
        Results("epoch").load_state_dict(state)


def test_files(tmp_path):
    results = history(2.0, math.nan)
    results.write(tmp_path, HEADER, {"global_step": 20, "epoch": 2})
    full = json.loads((tmp_path / "results.json").read_text())
    assert full == {
        **HEADER,
        "unit": "epoch",
        "score": {"split": "val", "name": "loss", "mode": "min"},
        "best_index": 1,
        "results": {
            "1": {"val": {"loss": 2.0}, "test": {"loss": 0.0}},
            "2": {"val": {"loss": None}, "test": {"loss": 0.0}},
        },
        "nonfinite": ["/results/2/val/loss"],
        "nonfinite_values": ["nan"],
    }
    latest = read_json(tmp_path / "latest.json")
    assert latest["index"] == 2 and latest["global_step"] == 20 and latest["epoch"] == 2
    assert latest["name"] == "run" and latest["id"] == "ab-12" and "uuid" not in latest
    assert math.isnan(latest["score"]) and latest["test"] == {"loss": 0.0}
    best = read_json(tmp_path / "best.json")
    assert best["index"] == 1 and best["score"] == 2.0 and best["epoch"] == 1
    results.append({"val": {"loss": 1.0}}, 3)
    results.write(tmp_path, HEADER, {"global_step": 30, "epoch": 3})
    best = read_json(tmp_path / "best.json")
    assert best["index"] == 3 and best["global_step"] == 30
    results.append({"val": {"loss": 4.0}}, 4)
    results.write(tmp_path, HEADER, {"global_step": 40, "epoch": 4})
    assert read_json(tmp_path / "best.json") == best  # what was known when it was best is kept


def test_files_of_an_empty_history(tmp_path):
    Results("step").write(tmp_path, HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert read_json(tmp_path / "results.json")["results"] == {}
