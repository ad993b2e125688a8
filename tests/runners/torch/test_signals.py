"""Signals and requests: finish what is in hand, save, close, and say so."""

import json
import os
import signal

import pytest

from danling.runners.atomic import read_json
from support.tiny import Tiny, final_state, tiny_config


def send(runner, event_name, number, when):
    @runner.on(event_name)
    def deliver(runner, event):
        if when(event):
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)]
)
def test_a_signal_saves_closes_and_ends(tmp_path, number, error, code):
    before = signal.getsignal(number)
    runner = Tiny(tiny_config(tmp_path, auto_resume=True))
    send(runner, "step", number, lambda event: event.global_step == 8)
    with pytest.raises(error) as raised:
        runner.train()
    if code is not None:
        assert raised.value.code == code
    assert signal.getsignal(number) == before
    summary = read_json(runner.dir / "summary.json")
    assert summary["status"] == "interrupted" and summary["reason"] == signal.Signals(number).name
    assert summary["exit_code"] == (130 if code is None else code)
    assert (runner.checkpoint_dir / "step-8" / "manifest.json").exists()
    with Tiny(tiny_config(tmp_path / "straight")) as straight:
        straight.train()
    with Tiny(tiny_config(tmp_path, auto_resume=True)) as again:
        again.train()
    assert runner.losses + again.losses == straight.losses
    assert final_state(again) == final_state(straight)
    attempts = read_json(again.dir / "summary.json")["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["interrupted", "finished"]


def test_sigusr1_saves_and_goes_on(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        send(runner, "step", signal.SIGUSR1, lambda event: event.global_step == 3)
        runner.train()
        assert (runner.checkpoint_dir / "step-3").exists()
        assert runner.global_step == 18


def test_a_signal_during_an_evaluation_is_not_lost(tmp_path):
    runner = Tiny(tiny_config(tmp_path, auto_resume=True))
    send(runner, "evaluate_start", signal.SIGTERM, lambda event: event.epoch == 1)
    with pytest.raises(SystemExit):
        runner.train()
    with Tiny(tiny_config(tmp_path, auto_resume=True)) as again:
        assert again.train_state.phase == "evaluate"
        again.train()
        assert again.results.indices == [1, 2, 3]
        assert len(runner.losses) + len(again.losses) == 18


def test_a_signal_before_the_first_window_trains_nothing(tmp_path):
    runner = Tiny(tiny_config(tmp_path, auto_resume=True, tiny__augment=True))
    send(runner, "epoch_start", signal.SIGTERM, lambda event: True)
    with pytest.raises(SystemExit):
        runner.train()
    assert runner.losses == []
    with Tiny(tiny_config(tmp_path, auto_resume=True, tiny__augment=True)) as again:
        again.train()
    with Tiny(tiny_config(tmp_path / "straight", tiny__augment=True)) as straight:
        straight.train()
    assert again.losses == straight.losses


def test_a_request_to_stop_returns_and_a_second_train_goes_on(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:

        @runner.on("step")
        def stop(runner, event):
            if event.global_step == 4:
                runner.request_stop("enough")

        runner.train()
        assert runner.global_step == 4
        runner.train()
        assert runner.global_step == 18
    assert read_json(runner.dir / "summary.json")["status"] == "finished"


def test_an_error_is_told_and_closes(tmp_path):
    told = []
    runner = Tiny(tiny_config(tmp_path))
    runner.on("exception", lambda runner, event: told.append(event.payload["error"]))

    @runner.on("step")
    def fail(runner, event):
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        runner.train()
    assert [str(error) for error in told] == ["on purpose"]
    summary = json.loads((runner.dir / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"] == {"type": "ArithmeticError", "message": "on purpose"}
    assert runner.close()
