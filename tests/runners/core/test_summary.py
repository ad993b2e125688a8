"""summary.json and the list of problems in it."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from danling.runners.problems import Problems, describe_error
from danling.runners.summary import Summary


def make(tmp_path, timestamp="20260101-000000-000000", **kwargs):
    return Summary(tmp_path / "run" / "summary.json", timestamp=timestamp, **kwargs)


def read(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def test_the_file_stands_from_the_start_to_the_end(tmp_path):
    summary = make(tmp_path, about={"name": "digits", "config_id": "abc"})
    assert summary.write("running", counters={"updates": 0})
    begun = read(tmp_path)
    assert (begun["status"], begun["end"], begun["name"]) == ("running", None, "digits")
    assert summary.write("failed", error=ValueError("no\nmodel"), exit_code=1, counters={"updates": 7})
    ended = read(tmp_path)
    assert ended["error"] == {"type": "ValueError", "message": "no\nmodel"}
    assert (ended["status"], ended["exit_code"], ended["counters"]) == ("failed", 1, {"updates": 7})
    assert ended["start"] == begun["start"] <= ended["end"] and ended["duration"] >= 0
    (attempt,) = ended["attempts"]
    assert (attempt["attempt"], attempt["status"], attempt["timestamp"]) == (1, "failed", "20260101-000000-000000")


def test_attempts_add_up_and_a_dead_one_was_killed(tmp_path):
    make(tmp_path).write("stopped", reason="SIGTERM")
    second = make(tmp_path)
    second.write("running")
    third = make(tmp_path)  # whoever is here holds the lock, so the second one is dead
    assert third.attempt == 3
    third.write("finished")
    assert [a["status"] for a in read(tmp_path)["attempts"]] == ["stopped", "killed", "finished"]


def test_a_damaged_file_is_a_problem_and_starts_anew(tmp_path):
    make(tmp_path).write("running")
    (tmp_path / "run" / "summary.json").write_text("{")
    problems = Problems(logging.getLogger("test.summary"))
    summary = make(tmp_path, problems=problems)
    assert summary.attempt == 1 and len(problems) == 1
    summary.write("finished")
    assert read(tmp_path)["problems"][0]["service"] == "summary.json"


def test_what_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "run").write_text("in the way")
    problems = Problems(logging.getLogger("test.summary"))
    summary = make(tmp_path, problems=problems)
    assert summary.write("running") is False
    assert problems.as_list()[0]["service"] == "summary.json"
    (tmp_path / "run").unlink()
    assert summary.write("running") is True


def test_a_status_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="status must be one of running, finished, stopped, interrupted, failed"):
        make(tmp_path).write("done")


def test_problems_are_counted_and_told_once(caplog):
    problems = Problems(logging.getLogger("test.problems"))
    for index in range(3):
        problems.add("wandb", RuntimeError(f"error {index}"))
    problems.add("heartbeat", "late")
    assert problems.as_list() == [
        {"service": "wandb", "count": 3, "first": "RuntimeError: error 0", "last": "RuntimeError: error 2"},
        {"service": "heartbeat", "count": 1, "first": "late", "last": "late"},
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    problems.as_list()[0]["count"] = 0
    assert problems.as_list()[0]["count"] == 3


def test_problems_of_many_threads_are_all_counted():
    problems = Problems(logging.getLogger("test.problems"))
    threads = [threading.Thread(target=lambda: [problems.add("service", "x") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems.as_list()[0]["count"] == 4000


def test_an_error_fits_on_one_line():
    assert describe_error(ValueError("a\n  b")) == "ValueError: a b"
    assert describe_error(KeyboardInterrupt()) == "KeyboardInterrupt"
