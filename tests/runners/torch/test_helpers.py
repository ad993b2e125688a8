"""What a runner offers beside training: batch sizes, files of its state, scores, another store; and schedules that grow."""

import json
import logging

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from danling.runners import CheckpointStore, read_metrics
from danling.runners.atomic import read_json
from support.tiny import Tiny, tiny_config


@pytest.fixture
def messages(caplog):
    """Collects what runners say; their loggers do not propagate."""
    caplog.set_level(logging.INFO)

    def attach(runner):
        runner.logger.addHandler(caplog.handler)
        return caplog.messages

    return attach


def test_batch_sizes_and_the_linear_rule(tmp_path):
    with Tiny(tiny_config(tmp_path, accum_steps=3)) as runner:
        assert (runner.batch_size, runner.batch_size_equivalent) == (8, 24)
        assert runner.scale_lr(0.1, 256) == pytest.approx(0.1 * 24 / 256)
        assert runner.config.optim.lr == 1e-2
        with pytest.raises(AttributeError, match="batch_size_equivalent is read only|no setter|can't set"):
            runner.batch_size_equivalent = 3


def test_a_changed_batch_size_is_warned_about(tmp_path, messages):
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        runner.train()
        source = runner.dir / "checkpoints" / "latest"

    class Loud(Tiny):
        def load_checkpoint(self, src):
            messages(self)
            super().load_checkpoint(src)

    overrides = {"dataloader__batch_size": 8, "accum_steps": 1, "checkpoint__interval": 0, "epochs": 2}
    with Loud(tiny_config(tmp_path, resume=str(source), **overrides)) as runner:
        found = runner.read_checkpoint(source)
        found["manifest"] = {**found["manifest"], "batch_size_equivalent": 16}
        runner.load_checkpoint(found)
        assert "an update now takes 8 samples; the checkpoint was trained with 16" in messages(runner)


def test_the_state_as_files(tmp_path):
    class More(Tiny):
        def state_dict(self):
            return {**super().state_dict(), "mine": torch.tensor([1.0, 2.0])}

    with More(tiny_config(tmp_path / "runs", epochs=1)) as runner:
        runner.train()
        runner.append_result({"val": {"loss": float("nan")}}, 2)
        text = runner.json(tmp_path / "state.json")
        stored = read_json(tmp_path / "state.json")
        assert stored["state"]["train"]["global_step"] == 6 and stored["mine"] == [1.0, 2.0]
        assert json.loads(text, parse_constant=pytest.fail)["state"] == stored["state"]  # no NaN, which is no JSON
        assert runner.dict()["results"] == runner.results.state_dict()
        runner.yaml(tmp_path / "config.yaml")
        config_id, identity = runner.config_id, runner.config.identity()
        runner.save({"a": torch.ones(2)}, tmp_path / "object.pt")
        assert runner.load(tmp_path / "object.pt")["a"].tolist() == [1.0, 1.0]
    with Tiny.from_json(tmp_path / "state.json") as again:
        assert again.config_id == config_id and again.global_step == 0
    with Tiny.from_yaml(tmp_path / "config.yaml") as again:
        assert again.config.identity() == identity


def test_results_are_shown_and_scores_handed_on(tmp_path, capsys):
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        capsys.readouterr()
        runner.print_result()
        shown = capsys.readouterr().out
        assert shown.startswith("epoch 2\n") and "val" in shown
        runner.write_score("chosen")
        runner.write_score("other", 0.25, "train")
        runner.trackers.sync()
        first, second = read_metrics(runner.dir)[-2:]
        assert (first["split"], first["chosen"]) == ("val", runner.latest_score)
        assert (second["split"], second["other"]) == ("train", 0.25)


def test_another_store_takes_the_place_of_the_first(tmp_path):
    with Tiny(tiny_config(tmp_path / "runs", epochs=1)) as runner:
        first = runner.checkpoint_manager
        with pytest.raises(AttributeError):
            runner.checkpoint_manager = first
        runner.set_checkpoint_manager(CheckpointStore(tmp_path / "elsewhere"))
        runner.train()
        assert first.list() == []
    assert [info.name for info in CheckpointStore(tmp_path / "elsewhere").list()] == ["epoch-1"]


def test_an_engine_flushes_before_the_save_of_a_stop(tmp_path):
    order = []

    class Watched(Tiny):
        def prepare_for_shutdown_checkpoint(self):
            order.append("prepare")

        def save_checkpoint(self, *args, **kwargs):
            order.append("save")
            super().save_checkpoint(*args, **kwargs)

    with Watched(tiny_config(tmp_path, epochs=1, checkpoint__interval=0)) as runner:
        runner.on("step", lambda runner, event: runner.request_stop("enough") if event.global_step == 2 else None)
        runner.train()
    assert order == ["prepare", "save"]


def test_a_schedule_follows_a_longer_budget(tmp_path, messages):
    options = {"scheduler__type": "cosine", "auto_resume": True}
    with Tiny(tiny_config(tmp_path, epochs=1, **options)) as runner:
        runner.train()
        assert runner.scheduler.total_steps == 6
    with Tiny(tiny_config(tmp_path, epochs=3, **options)) as runner:
        assert runner.scheduler.total_steps == 18
        runner.train()
        assert runner.global_step == 18


@pytest.mark.parametrize("kind", ["horizon", "none"])
def test_a_schedule_of_torch_keeps_its_horizon(tmp_path, kind):
    class Torch(Tiny):
        def build_scheduler(self):
            if kind == "horizon":
                self.scheduler = OneCycleLR(self.optimizer, max_lr=0.1, total_steps=18)
            else:
                self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
            super().build_scheduler()

    with Torch(tiny_config(tmp_path, epochs=1, auto_resume=True)) as runner:
        runner.train()
    with Torch(tiny_config(tmp_path, epochs=2, auto_resume=True, log=True)) as runner:
        log = runner.log_file.read_text()
        assert ("keeps its horizon of 18 although the budget is now 12" in log) is (kind == "horizon")
        runner.train()


def test_a_rank_that_did_not_exist_is_seeded_by_seed_rank_and_step(tmp_path):
    draws = []
    for step in (0, 0, 5):
        with Tiny(tiny_config(tmp_path / f"{len(draws)}")) as runner:
            runner.train_state.global_step = step
            runner.load_rng({})
            draws.append(torch.rand(3).tolist())
            assert runner.rng_state.seed == 1016
    assert draws[0] == draws[1] != draws[2]
