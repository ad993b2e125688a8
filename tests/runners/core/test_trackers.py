"""metrics.jsonl and the trackers beside it: what is written, what a resume voids, what happens when one fails."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling.runners.problems import Problems
from danling.runners.trackers import MetricsFile, Trackers, read_metrics
from danling.runners.trackers.tensorboard import TensorBoardTracker


class Memory:
    name = "memory"

    def __init__(self, fail=()):
        self.rows, self.fail, self.calls, self.closed = [], set(fail), 0, False

    def log(self, scalars, *, global_step, epoch):
        self.calls += 1
        if self.calls in self.fail:
            raise RuntimeError("tracker broke")
        self.rows.append((dict(scalars), global_step, epoch))

    def flush(self): ...

    def close(self):
        self.closed = True


@pytest.fixture
def problems():
    logger = logging.getLogger("test.quiet")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    return Problems(logger)


def test_a_line_has_time_position_and_scalars(tmp_path):
    trackers = Trackers(MetricsFile(tmp_path / "metrics.jsonl", attempt=2))
    trackers.start("start", global_step=0, epoch=0)
    trackers.log("train", {"loss": 0.1 + 0.2, "f1": {"macro": 1}, "confusion": [[1]]}, global_step=5, epoch=0)
    trackers.close()
    start, line = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (start["event"], start["attempt"], start["split"]) == ("start", 2, None)
    assert abs(line.pop("time") - start["time"]) < 60
    assert line == {
        "attempt": 2,
        "event": "log",
        "global_step": 5,
        "epoch": 0,
        "split": "train",
        "loss": 0.30000000000000004,
        "f1.macro": 1,
    }


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append("log", global_step=1, epoch=0, split="train", values={"loss": math.nan, "peak": -math.inf, "acc": 0.5})
    file.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["peak"] is None and line["nonfinite"] == ["/loss", "/peak"]
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["peak"] == -math.inf and row["acc"] == 0.5


def test_a_metric_called_like_a_column_keeps_both(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append("log", global_step=1, epoch=3, values={"epoch": 0.5})
    file.close()
    (row,) = read_metrics(tmp_path)
    assert row["epoch"] == 3 and row["value.epoch"] == 0.5


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("log"), st.integers(1, 20)),
            st.tuples(st.just("resume"), st.integers(0, 20)),
            st.tuples(st.just("start"), st.just(0)),
        )
    )
)
def test_the_effective_series_is_what_a_careful_reader_would_keep(tmp_path_factory, history):
    directory = tmp_path_factory.mktemp("metrics")
    file = MetricsFile(directory / "metrics.jsonl")
    file.append("start", global_step=0, epoch=0)
    kept: list[int] = []
    for event, step in history:
        file.append(event, global_step=step, epoch=0)
        if event == "start":
            kept = []
        elif event == "resume":
            kept = [k for k in kept if k <= step]
        else:
            kept.append(step)
    file.close()
    assert [row["global_step"] for row in read_metrics(directory) if row["event"] == "log"] == kept


@pytest.mark.parametrize("torn", [b'{"event": "log", "global_st', b"\xff\xfe\x00", b'{"event"'])
def test_a_torn_last_line_is_passed_over_and_cut_off_by_the_next_attempt(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.append("log", global_step=1, epoch=0)
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["global_step"] for row in read_metrics(path)] == [1]
    second = MetricsFile(path, attempt=2)
    second.append("log", global_step=2, epoch=0)
    second.close()
    assert path.read_bytes().startswith(whole) and torn not in path.read_bytes()
    assert [row["global_step"] for row in read_metrics(path)] == [1, 2]


def test_a_file_that_is_nothing_but_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 200_000)
    file = MetricsFile(path)
    file.append("log", global_step=1, epoch=0)
    file.close()
    assert [row["global_step"] for row in read_metrics(path)] == [1]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_a_killed_process_loses_no_more_than_a_quarter_of_a_second(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = textwrap.dedent(
        """
        import sys, time
        from danling.runners.trackers import MetricsFile
        file = MetricsFile(sys.argv[1])
        for step in range(10**9):
            if step == 100:
                time.sleep(0.25)
            file.append("log", global_step=step, epoch=0, values={"loss": 0.5})
            if step == 100:
                print("running", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [row["global_step"] for row in read_metrics(path)]
    assert len(steps) > 100 and steps == list(range(len(steps)))


def test_only_log_lines_wait_for_each_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)

    def written():
        return len(path.read_bytes().splitlines())

    for step in range(3):
        file.append("log", global_step=step, epoch=0)
    assert written() == 1
    file.append("evaluate", global_step=3, epoch=0)
    assert written() == 4
    file.append("log", global_step=4, epoch=0)
    assert written() == 4
    file.sync()
    assert written() == 5


def test_lines_wait_until_they_can_be_written(tmp_path, problems):
    blocked = tmp_path / "run"
    blocked.write_text("in the way")
    file = MetricsFile(blocked / "metrics.jsonl", problems=problems)
    file.append("log", global_step=1, epoch=0)
    file.append("log", global_step=2, epoch=0)
    assert problems.as_list()[0]["service"] == "metrics.jsonl" and problems.as_list()[0]["count"] == 2
    blocked.unlink()
    file.append("log", global_step=3, epoch=0)
    file.close()
    assert [row["global_step"] for row in read_metrics(blocked)] == [1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_problem_and_no_error(tmp_path, problems):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile(path, problems=problems)
    file.append("log", global_step=1, epoch=0)
    file.close()
    assert "No space left" in problems.as_list()[0]["first"]


def test_a_line_that_was_written_in_part_is_written_again_whole(tmp_path):
    code = textwrap.dedent(
        """
        import resource, signal, sys
        from danling.runners.trackers import MetricsFile
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        file = MetricsFile(sys.argv[1])
        for step in range(20):
            file.append("evaluate", global_step=step, epoch=0)
        assert len(file.problems) == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        file.append("evaluate", global_step=20, epoch=0)
        file.close()
        """
    )
    path = tmp_path / "metrics.jsonl"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == list(range(21))


def test_trackers_share_names_and_axis(tmp_path):
    trackers, memory = Trackers(), Memory()
    trackers.add(memory)
    trackers.log("train", {"loss": 1.0}, global_step=10, epoch=0)
    trackers.log("val", {"f1": {"macro": 0.5}}, global_step=10, epoch=1, event="evaluate")
    trackers.log(None, {"lr": 0.1}, global_step=8, epoch=1)  # late: a tracker would drop a step that goes backwards
    assert memory.rows == [({"train/loss": 1.0}, 10, 0), ({"val/f1.macro": 0.5}, 10, 1), ({"lr": 0.1}, 10, 1)]


def test_three_errors_in_a_row_disable_a_tracker(problems):
    trackers, broken, healthy = Trackers(problems=problems), Memory(fail={2, 3, 5, 6, 7}), Memory()
    healthy.name = "healthy"
    trackers.add(broken)
    trackers.add(healthy)
    for step in range(10):
        trackers.log("train", {"loss": 1.0}, global_step=step, epoch=0)
    assert broken.calls == 7  # two, then a success in between, then three
    assert len(healthy.rows) == 10
    (entry,) = problems.as_list()
    assert entry["service"] == "memory" and entry["count"] == 6 and entry["first"] == "RuntimeError: tracker broke"
    assert entry["last"] == "disabled after 3 errors in a row"
    assert [tracker.name for tracker in trackers] == ["healthy"]


def test_closing_reports_what_fails_and_goes_on(problems):
    class Stubborn(Memory):
        name = "stubborn"

        def close(self):
            raise OSError("will not")

    trackers, memory = Trackers(problems=problems), Memory()
    trackers.add(memory)
    trackers.add(Stubborn())
    trackers.close()
    trackers.close()
    assert memory.closed and problems.as_list()[0]["first"] == "OSError: will not"


def _scalars(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), purge_orphaned_data=True)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_holds_the_scalars_and_a_resume_purges(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3, 4):
        first.log({"train/loss": float(step)}, global_step=step, epoch=step // 2)
    first.close()
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert _scalars(tmp_path, "epoch") == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    trackers, second = Trackers(), TensorBoardTracker(tmp_path)
    trackers.add(second)
    trackers.start("resume", global_step=2, epoch=1)
    trackers.log("train", {"loss": 30.0}, global_step=3, epoch=1)
    trackers.close()
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_needs_no_torch(tmp_path):
    pytest.importorskip("tensorboard")
    code = (
        "import sys; from danling.runners.trackers.tensorboard import TensorBoardTracker as T; t = T(sys.argv[1]);"
        "t.log({'a': 1.0}, global_step=1, epoch=0); t.close(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_tensorboard_takes_another_writer(tmp_path):
    class Writer:
        def __init__(self, directory, purge_step=None):
            self.made = (directory, purge_step)
            self.values = []

        def add_scalar(self, *args):
            self.values.append(args)

        def flush(self): ...

        def close(self): ...

    tracker = TensorBoardTracker(tmp_path, Writer)
    tracker.start("resume", 4)
    tracker.log({"val/loss": 0.5}, global_step=5, epoch=1)
    assert tracker.writer.made == (str(tmp_path), 5)
    assert tracker.writer.values == [("val/loss", 0.5, 5), ("epoch", 1, 5)]


@pytest.mark.parametrize("module", ["tensorboard", "wandb"])
def test_a_missing_package_names_the_install(module, tmp_path, monkeypatch):
    import importlib.util

    name = f"danling.runners.trackers.{module}"
    tracker_module = importlib.import_module(name)
    find = importlib.util.find_spec
    monkeypatch.setattr(tracker_module, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    with pytest.raises(ImportError, match=rf"pip install .*danling-runner-core\[{module}\]"):
        if module == "tensorboard":
            TensorBoardTracker(tmp_path)
        else:
            tracker_module.WandbTracker(None, name="x", directory=tmp_path)


def test_wandb_continues_the_run_of_the_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from danling.runners.config import RunnerConfig
    from danling.runners.trackers.wandb import WandbTracker

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = RunnerConfig.of({"lineage": "line", "wandb": {"enabled": True, "mode": "offline", "tags": ["a"]}})
    first = Trackers()
    first.add(WandbTracker(config, name="digits", directory=tmp_path))
    assert not (tmp_path / "wandb").exists()  # nothing is opened before the first value
    first.log("val", {"loss": 0.5}, global_step=30, epoch=1, event="evaluate")
    run = first["wandb"].run
    assert (run.project, run.group, run.name, run.tags) == ("line", "exp", "digits", ("a",))
    assert run.config["lineage"] == "line"
    state = first.state_dict()
    first.close()
    second = Trackers()
    second.add(WandbTracker(config, name="digits", directory=tmp_path))
    second.load_state_dict(state)
    second.log("val", {"loss": 0.4}, global_step=40, epoch=2, event="evaluate")
    assert second["wandb"].run.id == state["wandb"]["id"]
    second.close()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{state['wandb']['id']}"))) == 2
