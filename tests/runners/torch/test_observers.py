"""What a real run tells those who watch it: events, trackers, lines, heartbeat, summary."""

from __future__ import annotations

import json
import logging
import math
import re
import time

import pytest
import torch
from torch import nn

from danling.runners import ResumeError, Runner, read_metrics
from danling.runners.events import EVENTS
from support.tiny import StepCounter, Tiny, tiny_config


class Everything:
    """Listens to all fourteen."""

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        if name.startswith("on_") and name[3:] in EVENTS:
            return lambda runner, event: self.heard.append((event.name, event.global_step, event.split))
        raise AttributeError(name)

    def __dir__(self):
        return [f"on_{name}" for name in EVENTS]

    def names(self):
        return [name for name, *_ in self.heard]


def test_the_events_of_a_run_in_their_order(tmp_path):
    everything = Everything()
    with Tiny(tiny_config(tmp_path, epochs=2, log_interval=6, checkpoint__async_enabled=False)) as runner:
        runner.callbacks.append(everything)
        runner.train()
    names = everything.names()
    one_epoch = ["epoch_start", *["step"] * 6, "log", "evaluate_start", "evaluate_end"]
    assert names[0] == "start" and names[-1] == "end"
    first, second = names[1:-1][: len(names[1:-1]) // 2], names[1:-1][len(names[1:-1]) // 2 :]
    for epoch in (first, second):
        assert epoch[: len(one_epoch)] == one_epoch
        assert sorted(epoch[len(one_epoch) :]) == ["epoch_end", "save"]
    steps = [(step, split) for name, step, split in everything.heard if name == "step"]
    assert steps == [(step, "train") for step in range(1, 13)]
    assert [split for name, _, split in everything.heard if name.startswith("evaluate")] == ["val"] * 4


def test_events_carry_what_belongs_to_them(tmp_path):
    payloads = {}
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        for name in ("start", "log", "evaluate_end", "epoch_end", "save"):
            runner.on(name, lambda runner, event: payloads.setdefault(event.name, dict(event.payload)))
        runner.train()
    assert payloads["start"] == {"path": None}
    assert {"loss", "lr"} <= set(payloads["log"]["metrics"])
    assert payloads["evaluate_end"]["metrics"]["loss"] == runner.results[1]["val"]["loss"]
    assert payloads["epoch_end"]["metrics"]["index"] == 1
    assert str(payloads["save"]["path"]).endswith("epoch-1")


def test_a_callback_that_raises_ends_the_run_as_an_error(tmp_path):
    everything = Everything()
    runner = Tiny(tiny_config(tmp_path))
    runner.callbacks.append(everything)

    @runner.on("step")
    def fail(runner, event):
        if event.global_step == 3:
            raise KeyError("broken callback")

    with pytest.raises(KeyError, match="broken callback"):
        runner.train()
    assert everything.names()[-2:] == ["exception", "end"]
    summary = json.loads((runner.dir / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"] == {"type": "KeyError", "message": "'broken callback'"}


def test_what_a_listener_raises_about_an_error_is_chained_to_it(tmp_path):
    runner = Tiny(tiny_config(tmp_path))
    original = ValueError("the real reason")

    @runner.on("step")
    def fail(runner, event):
        raise original

    @runner.on("exception")
    def fail_again(runner, event):
        raise KeyError("while reporting")

    ended = []
    runner.on("end", lambda runner, event: ended.append(event.payload["error"]))
    with pytest.raises(KeyError, match="while reporting") as caught:
        runner.train()
    assert caught.value.__cause__ is original and ended == [original]
    assert json.loads((runner.dir / "summary.json").read_text())["error"]["message"] == "the real reason"


def test_the_state_of_callbacks_goes_with_the_run(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        runner.callbacks.append(StepCounter())
        runner.train()

    class WithCounter(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.callbacks.append(StepCounter())

    with WithCounter(tiny_config(tmp_path, epochs=2, auto_resume=True)) as runner:
        assert runner.callbacks[0].steps == 6
        runner.train()
        assert runner.callbacks[0].steps == 12

    class WithAnother(WithCounter):
        def __init__(self, config):
            super().__init__(config)
            another = StepCounter()
            another.name = "another"
            self.callbacks.append(another)

    with pytest.raises(ResumeError, match="another"):
        WithAnother(tiny_config(tmp_path, epochs=3, auto_resume=True))
    fresh = {"checkpoint__exclude_from_loading": ["callbacks"]}
    with WithAnother(tiny_config(tmp_path, epochs=3, auto_resume=True, **fresh)) as runner:
        assert [callback.steps for callback in runner.callbacks] == [0, 0]


def series(directory, split, metric, event):
    rows = read_metrics(directory)
    return [(r["global_step"], r[metric]) for r in rows if r["event"] == event and r["split"] == split]


def test_metrics_of_a_stopped_and_resumed_run_are_those_of_a_straight_one(tmp_path):
    with Tiny(tiny_config(tmp_path / "straight", log_interval=2)) as straight:
        straight.train()
    runner = Tiny(tiny_config(tmp_path / "cut", log_interval=2, auto_resume=True, checkpoint__interval="5 steps"))

    @runner.on("step")
    def die(runner, event):
        if event.global_step == 13:  # the newest checkpoint is that of step 10
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        runner.train()
    assert series(runner.dir, "train", "loss", "log")[-1][0] == 12
    with Tiny(tiny_config(tmp_path / "cut", log_interval=2, auto_resume=True)) as again:
        again.train()
    for split, metric, event in (("train", "loss", "log"), ("train", "loss", "epoch"), ("val", "loss", "evaluate")):
        assert series(again.dir, split, metric, event) == series(straight.dir, split, metric, event)
    attempts = [row["attempt"] for row in read_metrics(again.dir)]
    assert attempts == sorted(attempts) and set(attempts) == {1, 2}
    summary = json.loads((again.dir / "summary.json").read_text())
    assert [(a["attempt"], a["status"]) for a in summary["attempts"]] == [(1, "failed"), (2, "finished")]


def test_tensorboard_follows_the_restored_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runner = Tiny(tiny_config(tmp_path, tensorboard=True, auto_resume=True, log_interval=1))

    @runner.on("step")
    def die(runner, event):
        if event.global_step == 10:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        runner.train()
    with Tiny(tiny_config(tmp_path, tensorboard=True, auto_resume=True, log_interval=1)) as again:
        again.train()
    events = accumulator.EventAccumulator(str(again.dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss") if event.step] == [
        *range(1, 7),
        6,  # the value of the epoch, at the step of its last update
        *range(7, 13),
        12,
        *range(13, 19),
        18,
    ]
    assert [event.step for event in events.Scalars("val/loss")] == [6, 12, 18]


def test_a_dead_tracker_costs_nothing_but_a_line_in_the_summary(tmp_path, caplog):
    class Dead:
        name = "dead"
        calls = 0

        def log(self, scalars, *, global_step, epoch):
            self.calls += 1
            raise ConnectionError("no route to host")

        def flush(self): ...

        def close(self): ...

    with Tiny(tiny_config(tmp_path, log_interval=1)) as runner:
        runner.trackers.add(dead := Dead())
        runner.train()
    assert dead.calls == 3 and runner.global_step == 18
    summary = json.loads((runner.dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    (problem,) = summary["problems"]
    assert problem["service"] == "dead" and problem["first"] == "ConnectionError: no route to host"


def test_lines_without_a_terminal(tmp_path, capsys):
    with Tiny(tiny_config(tmp_path, epochs=2, log_interval=6, log=True)) as runner:
        runner.train()
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"^run exp-\w{12}$", out, re.M) and re.search(r"^finished$", out, re.M)
    assert re.search(r"^epoch 1/2 train \[6/12\] loss \d", out, re.M)
    assert re.search(r"^epoch 2/2 train \[12/12\] loss \d", out, re.M)
    assert re.search(r"^split +loss", out, re.M) and str(runner.dir) in out
    log = runner.log_file.read_text()
    for line in out.splitlines():
        assert line in log


def beat(runner):
    return json.loads((runner.dir / "heartbeats" / "rank-00000.json").read_text())


def test_the_heartbeat_of_a_run(tmp_path):
    during = []
    with Tiny(tiny_config(tmp_path, heartbeat__enabled=True, heartbeat__interval_seconds=0.01)) as runner:
        runner.on("evaluate_start", lambda runner, event: (time.sleep(0.2), during.append(beat(runner))))
        first = beat(runner)
        runner.train()
    last = beat(runner)
    assert {(b["event"], b["mode"], b["split"]) for b in during} == {("evaluate_start", "evaluate", "val")}
    assert (first["status"], first["counters"]["global_step"]) == ("running", 0)
    assert (first["event"], last["event"]) == ("construction", "end")
    assert (last["status"], last["counters"]["global_step"]) == ("finished", 18)


def test_a_loss_that_is_no_number_is_in_the_files_as_it_is(tmp_path):
    class Broken(Tiny):
        def __init__(self, config):
            super().__init__(config)
            with torch.no_grad():
                self.model[0].weight.fill_(float("nan"))

    logging.getLogger("danling").setLevel(logging.ERROR)
    with Broken(tiny_config(tmp_path, epochs=1, log_interval=1)) as runner:
        runner.train()
    logging.getLogger("danling").setLevel(logging.NOTSET)
    assert all(math.isnan(loss) for _, loss in series(runner.dir, "train", "loss", "log"))
    text = (runner.dir / "metrics.jsonl").read_text() + (runner.dir / "results.json").read_text()
    assert "NaN" not in text and "nonfinite" in text


class Masked(Runner):
    """Batches that tell their tokens: 5 of 8 positions."""

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Linear(3, 2)
        self.criterion = nn.CrossEntropyLoss()
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        batch = {"input": torch.randn(2, 3), "target": torch.tensor([0, 1]), "attention_mask": mask}
        self.dataloaders.train = [batch] * 6


def test_speed_memory_and_flops_of_a_log_line(tmp_path):
    performance = {"model_flops_per_sample": 3e9, "model_flops_per_token": 7e9, "peak_flops": 2e12}
    with Masked(tiny_config(tmp_path, epochs=1, log_interval=3, performance=performance)) as runner:
        runner.train()
        rows = [row for row in read_metrics(runner.dir) if row["event"] == "log"]
        assert runner.train_state.samples == 12 and runner.train_state.tokens == 30
    assert len(rows) == 2
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2.5 * row["samples_per_second"])
        assert row["samples_per_second"] == pytest.approx(2 / row["seconds_per_update"])
        flops = 3e9 * row["samples_per_second"] + 7e9 * row["tokens_per_second"]
        assert row["tflops"] == pytest.approx(flops / 1e12)
        assert row["mfu"] == pytest.approx(flops / 2e12)
        assert 0.05 < row["memory_gib"] < 64


def test_no_flops_without_the_models(tmp_path):
    with Masked(tiny_config(tmp_path, epochs=1, log_interval=3, performance__peak_flops=2e12)) as runner:
        runner.train()
        rows = [row for row in read_metrics(runner.dir) if row["event"] == "log"]
    assert rows and not any({"tflops", "mfu"} & row.keys() for row in rows)
