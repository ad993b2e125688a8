"""The heartbeat: what it says, when it says it, and that losing it costs nothing."""

from __future__ import annotations

import json
import logging
import os
import socket
import time

import pytest

from danling.runners.heartbeat import Heartbeat
from danling.runners.problems import Problems


def read(file):
    return json.loads(file.read_text())


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_a_beat_says_who_where_and_how_far(tmp_path):
    state = {"mode": "train", "split": "train", "counters": {"global_step": 3}, "failed_saves": 1}
    heart = Heartbeat(tmp_path / "heartbeats", lambda: state, rank=2, world_size=4, restarts=1)
    heart.start()
    beat = read(tmp_path / "heartbeats" / "rank-00002.json")
    now = beat.pop("time")
    assert abs(now - time.time()) < 60 and beat.pop("last_progress") <= now
    assert beat == {
        "status": "running",
        "event": "start",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": 2,
        "world_size": 4,
        "restarts": 1,
        **state,
    }
    heart.close("failed")
    assert (read(heart.file)["event"], read(heart.file)["status"]) == ("end", "failed")
    heart.close()
    assert read(heart.file)["status"] == "failed"


def test_a_process_that_hangs_is_visible(tmp_path):
    counters = {"global_step": 1}
    heart = Heartbeat(tmp_path, lambda: {"counters": dict(counters)}, interval=0.01)
    heart.start()
    try:
        progress = read(heart.file)["last_progress"]
        before = read(heart.file)["time"]
        wait_for(lambda: read(heart.file)["time"] > before + 0.05)
        assert read(heart.file)["last_progress"] == progress  # lives, but does not move
        counters["global_step"] = 2
        wait_for(lambda: read(heart.file)["last_progress"] > progress)
    finally:
        heart.close()


def test_an_event_is_written_at_once(tmp_path):
    heart = Heartbeat(tmp_path, dict, interval=1000)
    heart.start()
    heart.beat("save")
    assert read(heart.file)["event"] == "save"
    heart.close()


def test_a_beat_that_cannot_be_written_is_a_problem(tmp_path):
    blocked = tmp_path / "heartbeats"
    blocked.write_text("in the way")
    problems = Problems(logging.getLogger("test.heartbeat"))
    heart = Heartbeat(blocked, dict, problems=problems, interval=1000)
    heart.start()
    heart.close()
    (entry,) = problems.as_list()
    assert entry["service"] == "heartbeat" and entry["count"] == 2


def test_a_wrong_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"heartbeat.interval_seconds must be > 0, got 0"):
        Heartbeat(tmp_path, dict, interval=0)
