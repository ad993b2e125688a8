"""What happens at boundaries when something is missing, fails, or is better than before."""

import warnings

from danling.runners.atomic import read_json
from support.tiny import Tiny, tiny_config


def test_a_tracker_that_throws_is_disabled_and_named(tmp_path):
    class Broken:
        name = "broken"

        def log(self, scalars, *, global_step, epoch):
            raise OSError("no network")

        def flush(self):
            pass

        close = flush

    with Tiny(tiny_config(tmp_path, log_interval=1)) as runner:
        runner.trackers.add(Broken())
        runner.train()
    problems = {entry["service"]: entry for entry in read_json(runner.dir / "summary.json")["problems"]}
    assert problems["broken"]["first"] == "OSError: no network"


def test_the_best_is_saved_off_cadence_and_nothing_else(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=3, checkpoint__interval=0, patience=None)) as runner:
        runner.train()
        names = {info.name for info in runner.checkpoint_manager.list()}
        best = runner.checkpoint_manager.resolve("best").name
        assert best == f"epoch-{runner.best_index}" and names >= {best, "epoch-3"}


def test_an_empty_evaluation_does_not_lose_the_final_save(tmp_path):
    class Nothing(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.pop("val")
            self.dataloaders.val = []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no score
        with Nothing(tiny_config(tmp_path, epochs=1)) as runner:
            runner.train()
    assert (runner.checkpoint_dir / "epoch-1" / "manifest.json").exists()


def test_the_order_at_a_boundary(tmp_path):
    order = []

    class Watched(Tiny):
        def train_step(self, data):
            order.append("window")
            return super().train_step(data)

        def optimizer_step(self):
            order.append("update")
            return super().optimizer_step()

        def append_result(self, row, index=None):
            order.append("row")
            super().append_result(row, index)

        def step_schedulers(self, **kwargs):
            order.append("scheduler")
            super().step_schedulers(**kwargs)

        def save_checkpoint(self, *args, **kwargs):
            order.append("checkpoint")
            super().save_checkpoint(*args, **kwargs)

    config = tiny_config(tmp_path, epochs=2, tiny__count=8, log_interval=1, checkpoint__async_enabled=False)
    with Watched(config) as runner:
        for name in (
            "start",
            "epoch_start",
            "step",
            "log",
            "evaluate_start",
            "evaluate_end",
            "epoch_end",
            "save",
            "end",
        ):
            runner.on(name, lambda runner, event: order.append(event.name))
        runner.train()
    one = [
        "epoch_start",
        "window",
        "update",
        "step",
        "log",
        "evaluate_start",
        "evaluate_end",
        "row",
        "scheduler",
        "epoch_end",
    ]
    assert order == ["start", *one, "checkpoint", "save", *one, "checkpoint", "save", "end"]


def test_step_mode_ends_in_the_middle_of_a_pass(tmp_path):
    with Tiny(tiny_config(tmp_path, steps=8, eval_interval=3, checkpoint__interval=4)) as runner:
        runner.train()
        assert runner.steps_seen == list(range(1, 9))
        assert runner.results.unit == "step" and runner.results.indices == [3, 6, 8]
        assert runner.epoch == 1 and runner.train_state.positions["train"]["samples"] == 16
        names = {info.name for info in runner.checkpoint_manager.list()}
        assert {"step-4", "step-8"} <= names


def test_partial_windows_and_several_train_splits(tmp_path):
    class Two(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.more = type(self.datasets.train)(16, seed=3, offset=1000)

    config = tiny_config(
        tmp_path,
        epochs=2,
        accum_steps=4,
        train_splits=["train", "more"],
        evaluate_splits=["val"],
        dataloader__drop_last=False,
    )
    with Two(config) as runner:
        assert runner.steps == 2 * (2 + 1)
        runner.train()
        assert runner.global_step == 6 and runner.micro_step == 2 * (7 + 2)
        assert sorted(runner.seen) == sorted(2 * (list(range(50)) + list(range(1000, 1016))))
        assert set(runner.results[2]) == {"train", "more", "val"}
