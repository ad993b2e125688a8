"""Evaluation and inference: exact, complete, and without a trace in training."""

import pytest
import torch

from danling.metrics import multiclass_metrics
from support.tiny import Tiny, tiny_config


class Measured(Tiny):
    def __init__(self, config):
        super().__init__(config)
        self.metrics = multiclass_metrics(3)


def test_metrics_are_those_of_all_samples(tmp_path):
    with Measured(tiny_config(tmp_path, epochs=2, score_name="acc")) as runner:
        runner.train()
        row = runner.evaluate()["val"]
        data = runner.datasets.val
        runner.model.eval()
        with torch.no_grad():
            scores = runner.model(data.inputs)
    assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, data.targets).item(), rel=1e-6)
    expected = multiclass_metrics(3)
    expected.update(scores, data.targets)
    assert row["acc"] == pytest.approx(expected.average()["acc"], rel=1e-6)
    assert runner.results[2]["val"] == row
    assert runner.score_mode == "max"


def test_how_often_one_evaluates_changes_nothing_in_training(tmp_path):
    losses = []
    for interval in (0, "2 steps", 1):
        with Tiny(tiny_config(tmp_path / str(interval), eval_interval=interval)) as runner:
            runner.train()
            losses.append(runner.losses)
            assert runner.model.training
    assert losses[0] == losses[1] == losses[2]


def test_evaluate_steps_and_short_loaders(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        assert set(runner.evaluate_steps("val", 1)) == {"loss"}
        assert runner.evaluate_steps("val", 1000) == runner.evaluate_epoch("val")
        with pytest.raises(ValueError, match="at least 1"):
            runner.evaluate_steps("val", 0)
        with pytest.raises(ValueError, match="no split 'nope'; there are: train, val"):
            runner.evaluate(["nope"])


def test_inference(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        entries = runner.infer("val")
        assert len(entries) == 21 and all(isinstance(entry, torch.Tensor) and entry.shape == (3,) for entry in entries)
        runner.model.eval()
        with torch.no_grad():
            assert torch.equal(torch.stack(entries), runner.model(runner.datasets.val.inputs))
        runner.mode = "train"
        streamed = list(runner.infer("val", stream=True))
        assert [len(batch) for batch in streamed] == [8, 8, 5]
        assert runner.model.training
        assert len(runner.infer("val", steps=1)) == 8
        assert runner.infer("val", steps=0) == []
        for arguments, message in [
            ({"steps": -1}, "must not be negative"),
            ({"stream": True, "gather": True}, "exclude each other"),
        ]:
            with pytest.raises(ValueError, match=message):
                runner.infer("val", **arguments)


def test_structured_outputs_and_unsized_loaders(tmp_path):
    class Structured(torch.nn.Module):
        def forward(self, x):
            return {"one": x[:, :1], "pair": (x[:, :2], x[:, 0])}

    class Shaped(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.model = Structured()
            self.dataloaders.infer = iter([torch.arange(8.0).view(2, 4)])

    config = tiny_config(tmp_path)
    del config["optim.type"], config["optim.lr"]
    with Shaped(config) as runner:
        with pytest.raises(ValueError, match="has no length: give `steps`, or stream=True"):
            runner.infer(stream=False)
        (batch,) = runner.infer()
        assert batch[1]["one"] == 4.0
        assert batch[1]["pair"][0].tolist() == [4.0, 5.0] and batch[1]["pair"][1] == 4.0


def test_early_stop_and_its_summary(tmp_path):
    from danling.runners.atomic import read_json

    config = tiny_config(tmp_path, epochs=50, patience=2, optim__lr=1e-12, auto_resume=True)
    with Tiny(config) as runner:
        runner.train()
        assert runner.epoch < 50
        assert runner.epoch - runner.best_index == 2
    with Tiny(config) as again:  # as a cluster script does
        assert again.train().rows() == runner.results.rows() and again.epoch == runner.epoch
    summary = read_json(runner.dir / "summary.json")
    assert (summary["status"], summary["reason"]) == ("finished", "patience")
    with Tiny({**config, "patience": 3}) as patient:
        patient.train()
        assert patient.epoch == runner.epoch + 1


def test_the_average_of_the_weights_evaluates(tmp_path):
    with Tiny(tiny_config(tmp_path, ema__enabled=True, ema__decay=0.5)) as runner:
        runner.train()
        own = runner.evaluation_model
        assert own is runner.ema.module and not torch.equal(own[0].weight, runner.model[0].weight)
        runner.export(tmp_path / "weights.safetensors")
    with Tiny(tiny_config(tmp_path / "other", pretrained=str(tmp_path / "weights.safetensors"))) as other:
        assert torch.equal(other.model[0].weight, own[0].weight)


def test_an_object_that_is_no_average_is_refused(tmp_path):
    class Wrong(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.ema = object()

    with pytest.raises(TypeError, match="neither update_parameters"):
        Wrong(tiny_config(tmp_path))


def test_from_checkpoint_and_from_pretrained(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
    with Tiny.from_checkpoint(runner.dir) as again:
        assert (again.global_step, again.results.rows()) == (runner.global_step, runner.results.rows())
        assert torch.equal(again.model[0].weight, runner.model[0].weight)
    with Tiny.from_pretrained(tiny_config(tmp_path / "fresh"), runner.checkpoint_dir / "best") as fresh:
        assert fresh.global_step == 0
        assert torch.equal(fresh.model[0].weight, runner.model[0].weight)


def test_a_run_continued_from_its_checkpoint_is_the_same_run_and_forgets_the_source(tmp_path):
    class Placed(Tiny):
        identity_exclude = ("tiny.root",)

    with Tiny(tiny_config(tmp_path / "before", epochs=1)) as before:
        before.train()
    config = tiny_config(tmp_path, epochs=2, pretrained=str(before.checkpoint_dir / "best"), tiny__root="here")
    with Placed(config) as runner:
        runner.train()
    with Placed.from_checkpoint(runner.checkpoint_dir / "epoch-1", epochs=3) as again:
        assert again.dir == runner.dir and again.global_step == runner.global_step // 2
        assert again.config.resume is None and again.config.pretrained == runner.config.pretrained
        again.train()
    stored = again.read_config(again.dir)
    assert stored.resume is None
    stored.auto_resume = True
    with Tiny(stored) as newest:  # what the class left out of the identity is stored with it
        assert newest.dir == runner.dir and newest.epoch == 3


def test_a_model_that_returns_its_own_loss(tmp_path, capsys):
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * self.weight).pow(2).mean()

    class OwnLoss(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.model, self.criterion = Squares(), None
            self.datasets.train = self.datasets.val = torch.utils.data.TensorDataset(self.datasets.val.inputs)

        def train_step(self, data):
            return super(Tiny, self).train_step(data)

    with OwnLoss(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        inputs, weight = runner.datasets.val.tensors[0], runner.model.weight.detach()
        assert runner.latest_score == pytest.approx((inputs * weight).pow(2).mean().item(), rel=1e-6)
        assert runner.best_index == 2
    with OwnLoss(tiny_config(tmp_path, epochs=2)) as runner:
        runner.evaluate_step = lambda data: (None, None)
        assert runner.evaluate() == {"val": {}}
    assert "the evaluation of 'val' measured nothing" in capsys.readouterr().err
