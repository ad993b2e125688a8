"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

import pytest
import torch

from danling.runners import ResumeError
from support.tiny import StepCounter, Tiny, final_state, tiny_config

VARIANTS = {
    "epochs": {},
    "patience": {"patience": 2, "epochs": 4, "score_name": "loss"},
    "augmented": {"tiny__augment": True},
    "accumulated": {"accum_steps": 3},
    "scheduled": {"scheduler__type": "cosine", "max_grad_norm": 1.0},
    "ema": {"ema__enabled": True, "ema__decay": 0.9, "ema__interval": 2},
    "steps": {"steps": 17},
    "steps, often": {"steps": 17, "eval_interval": 4, "checkpoint__interval": 5, "accum_steps": 2},
    "bf16": {"precision": "bf16"},
    "plateau": {"scheduler__type": "reduce_on_plateau", "scheduler__patience": 0},
}


def stop_after(runner, update):
    @runner.on("step")
    def stop(runner, event):
        if event.global_step == update:
            runner.request_stop("test")


def straight(root, **overrides):
    with Tiny(tiny_config(root / "straight", **overrides)) as runner:
        runner.train()
        return final_state(runner), runner.losses, runner.seen


@pytest.mark.parametrize(
    ("variant", "updates"),
    [
        *((variant, (3, 4, 12)) for variant in VARIANTS),
        ("epochs", (1,)),
        ("epochs", (6,)),
        ("epochs", (7,)),
        ("steps", (6,)),
    ],
)
def test_stopped_and_resumed_equals_straight(tmp_path, variant, updates):
    overrides = VARIANTS[variant]
    expected, losses, seen = straight(tmp_path, **overrides)
    config = tiny_config(tmp_path / "stopped", auto_resume=True, **overrides)
    got_losses, got_seen = [], []
    for update in (*updates, None):
        with Tiny(config) as runner:
            if update is not None:
                stop_after(runner, update)
            runner.train()
            got_losses += runner.losses
            got_seen += runner.seen
    assert got_losses == losses
    assert got_seen == seen
    assert final_state(runner) == expected


def test_stop_inside_an_evaluation_repeats_no_training(tmp_path):
    expected, losses, seen = straight(tmp_path)
    config = tiny_config(tmp_path / "stopped", auto_resume=True)
    with Tiny(config) as runner:

        @runner.on("evaluate_start")
        def stop(runner, event):
            if event.epoch == 2:
                runner.request_stop("in the middle of an evaluation")

        runner.train()
        assert runner.train_state.phase == "evaluate"
        assert runner.results.indices == [1]
        first = runner.losses
    with Tiny(config) as runner:
        runner.train()
    assert first + runner.losses == losses
    assert final_state(runner) == expected


def test_a_finished_run_can_be_extended(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        first = runner.results.rows()
    with Tiny(tiny_config(tmp_path, epochs=2, auto_resume=True)) as runner:
        runner.train()
        assert runner.losses == []
        assert runner.results.rows() == first
    with Tiny(tiny_config(tmp_path, epochs=4, auto_resume=True)) as runner:
        runner.train()
        rows = runner.results.rows()
    assert list(rows) == [1, 2, 3, 4]
    assert {1: rows[1], 2: rows[2]} == first
    with Tiny(tiny_config(tmp_path / "straight", epochs=4)) as runner:
        runner.train()
        assert runner.results.rows() == rows


def test_without_auto_resume_an_earlier_run_is_set_aside(tmp_path):
    for _ in range(2):
        with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
            runner.train()
            directory = runner.dir
    kept = [path for path in directory.parent.iterdir() if path != directory]
    assert len(kept) == 1 and kept[0].name.startswith(directory.name + ".")
    assert (kept[0] / "checkpoints" / "epoch-1" / "manifest.json").exists()


class WithMore(Tiny):
    """Keeps something of its own in checkpoints, and counts in a callback."""

    def __init__(self, config):
        super().__init__(config)
        self.mine = torch.zeros(2)
        self.counter = StepCounter()
        self.callbacks.append(self.counter)

    def state_dict(self):
        return {**super().state_dict(), "mine": self.mine + self.global_step}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.mine = state["mine"]


def test_what_the_user_adds_travels_along(tmp_path):
    with WithMore(tiny_config(tmp_path, epochs=1)) as runner:
        runner.train()
    with WithMore(tiny_config(tmp_path, epochs=2, auto_resume=True)) as runner:
        assert runner.mine.tolist() == [6.0, 6.0] and runner.counter.steps == 6
        runner.train()
        assert runner.counter.steps == 12


def test_components_can_be_left_out(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        runner.train()
    leave = {"checkpoint__exclude_from_loading": ["optimizer", "model.0.*"]}
    with Tiny(tiny_config(tmp_path, epochs=2, auto_resume=True, **leave)) as again:
        assert not again.optimizer.state and again.global_step == 6
        assert not torch.equal(again.model[0].weight, runner.model[0].weight)
        assert torch.equal(again.model[3].weight, runner.model[3].weight)
    with pytest.raises(ResumeError, match="'modle.\\*' matches no parameter; the components are optimizer"):
        Tiny(tiny_config(tmp_path, epochs=2, auto_resume=True, checkpoint__exclude_from_loading=["modle.*"]))


def test_full_state_from_a_mapping_in_memory(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        payload = runner.read_checkpoint("latest")
    with Tiny(tiny_config(tmp_path / "other", epochs=2)) as other:
        other.load_checkpoint(payload)
        assert other.results.rows() == runner.results.rows()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_iterable_data_resume_in_the_middle(tmp_path, workers):
    options = {"tiny__augment": True, "epochs": 2, "dataloader__num_workers": workers}
    expected, losses, seen = straight(tmp_path, **options)
    config = tiny_config(tmp_path / "stopped", auto_resume=True, **options)
    got = []
    for update in (4, None):
        with Tiny(config) as runner:
            if update:
                stop_after(runner, update)
            runner.train()
            got += runner.losses
    assert got == losses and final_state(runner) == expected


def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path):
    weights = {}
    with Tiny(tiny_config(tmp_path, checkpoint__interval="1 steps")) as runner:

        @runner.on("step")
        def remember(runner, event):
            weights[event.global_step] = runner.model[0].weight.detach().clone()

        runner.train()
        for info in runner.checkpoint_manager.list():
            saved = runner.read_checkpoint(info.path)["model"]["0.weight"]
            assert torch.equal(saved, weights[info.manifest["global_step"]])
