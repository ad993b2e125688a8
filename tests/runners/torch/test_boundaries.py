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


def test_the_best_of_several_evaluations_in_an_epoch_stays_the_best(tmp_path):
    """A later one of the same epoch takes its place in the history, and must not become the best for that."""
    losses = [3.0, 1.0, 2.0, 2.0, 1.5, 0.5]  # at updates 2, 4, 6 of six in an epoch

    class Scripted(Tiny):
        def evaluate_epoch(self, split):
            return {"loss": losses[self.global_step // 2 - 1]}

    config = tiny_config(tmp_path, epochs=2, eval_interval="2 steps", checkpoint__interval=0, patience=4)
    config["auto_resume"] = True
    found = []

    def note(runner, event):
        if event.payload["metrics"]["loss"] != 3.0:  # the row is not settled yet: look at the one before
            found.append((runner.best_score, (runner.best_result or {}).get("val", {}).get("loss")))

    with Scripted(config) as runner:
        runner.on("evaluate_end", note)
        runner.on("step", lambda r, event: r.request_stop() if event.global_step == 7 else None)
        runner.train()
        assert runner.best_score == 1.0 and runner.best_index == 1 and not runner.is_best
        assert runner.results[1]["val"]["loss"] == 2.0 and runner.results.stale == 1
        best = read_json(runner.dir / "best.json")
        assert (best["score"], best["index"], best["global_step"]) == (1.0, 1, 4)
        assert (runner.checkpoint_dir / "best.pointer").read_text().strip() == "step-4"
    with Scripted(config) as again:
        assert again.best_score == 1.0 and again.best_result["val"]["loss"] == 1.0
        again.on("evaluate_end", note)
        again.train()
        assert again.best_score == 0.5 and again.is_best
    assert found == [(3.0, 3.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert read_json(again.dir / "best.json")["score"] == 0.5
