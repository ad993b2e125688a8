"""Guarantee 6: an asynchronous save holds the state of the step it names, however late it is written."""

from __future__ import annotations

import time

import pytest
import torch

from danling.backends.torch import payload, snapshot
from danling.runners.atomic import read_json
from support.tiny import Tiny, tiny_config


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_slow_writer_writes_what_was_there_when_the_save_was_due(tmp_path, monkeypatch, mode):
    write_file = snapshot.write_file

    def slowly(path, state):
        time.sleep(0.03)  # several updates pass meanwhile
        write_file(path, state)

    monkeypatch.setattr(snapshot, "write_file", slowly)
    config = tiny_config(
        tmp_path,
        steps=12,
        eval_interval=0,
        checkpoint__interval=3,
        checkpoint__async_mode=mode,
        checkpoint__async_enabled=mode != "disabled",
        ema__enabled=True,
        scheduler__type="linear",
    )
    expected = {}
    with Tiny(config) as runner:

        @runner.on("step")
        def remember(runner, event):
            expected[event.global_step] = {
                "model": {name: value.clone() for name, value in runner.model.state_dict().items()},
                "ema": {name: value.clone() for name, value in runner.ema.module.state_dict().items()},
                "moments": [state["exp_avg"].clone() for state in runner.optimizer.state.values()],
                "rng": torch.get_rng_state(),
                "lr": [group["lr"] for group in runner.optimizer.param_groups],
            }

        runner.train()
        checkpoints = runner.checkpoint_dir
    for step in (3, 6, 9, 12):
        path = checkpoints / f"step-{step}"
        saved, truth = payload.read_payload(path), expected[step]
        for part in ("model", "ema"):
            assert saved[part].keys() == truth[part].keys()
            assert all(torch.equal(saved[part][name], value) for name, value in truth[part].items()), (step, part)
        moments = [state["exp_avg"] for state in saved["optimizer"]["state"].values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, truth["moments"], strict=True)), step
        assert torch.equal(saved["rng"]["torch"], truth["rng"])
        assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == truth["lr"]
        assert read_json(path / "runner.json")["state"]["train"]["global_step"] == step
