"""Evaluation counts each sample once, inference comes back in order, and neither leaves a trace in training."""

from __future__ import annotations

from typing import Any

import pytest

from .marks import shows
from .settings import Settings
from .worker import Place, scenario


@scenario
def evaluated(place: Place) -> dict[str, Any]:
    """Train a little, evaluate and infer, train on."""
    import torch

    from .task import Task, weights

    with Task(place.config(steps=3, evaluate_splits=[], checkpoint__load_only=True)) as runner:
        runner.train()
        before = weights(runner), torch.get_rng_state(), runner.train_state.state_dict()
        loss = runner.evaluate(["val"])["val"]["loss"]
        entries = [torch.as_tensor(entry).double() for entry in runner.infer("val", gather=True)]
        own = len(runner.infer("val"))
        after = weights(runner), torch.get_rng_state(), runner.train_state.state_dict()
        untouched = before[2] == after[2] and before[1].equal(after[1])
        untouched &= all(before[0][name].equal(value) for name, value in after[0].items())
        return {
            "loss": loss,
            "entries": entries,
            "own": own,
            "data_rank": runner.data_rank,
            "weights": after[0],
            "untouched": untouched,
            "training": runner.model.training,
        }


@scenario
def evaluated_often(place: Place) -> dict[str, Any]:
    """One run that evaluates after every update, and one that evaluates at the end only."""
    from .task import Task, weights

    found = {}
    for name, interval in (("often", "1 steps"), ("once", 0)):
        options = {"steps": 5, "eval_interval": interval, "task__dropout": 0.3, "task__augment": True}
        with Task(place.config(name, checkpoint__load_only=True, **options)) as runner:
            runner.train()
            found[name] = weights(runner)
    return found


@scenario
def running_statistics(place: Place) -> dict[str, Any]:
    """A model whose buffers training changes, on every rank by other batches; it is saved, read back and evaluated."""
    from .task import Task, weights

    config = place.config(steps=4, eval_interval="2 steps", auto_resume=True, task__norm=True)
    with Task(config) as runner:
        start = weights(runner)
        runner.train()
        found = {"start": start, "weights": weights(runner), "rows": runner.results.rows()}
        found["loss"] = runner.evaluate(["val"])["val"]["loss"]
    with Task(config) as again:
        found["again"] = again.evaluate(["val"])["val"]["loss"]
    return found


def expected(found: list[Any], settings: Settings) -> tuple[float, Any]:
    """Loss and outputs of a plain model with the same weights on the whole split."""
    import torch

    from .task import IGNORED, VAL, Sequences, build_model

    norm = any(name.endswith("running_mean") for name in found[0]["weights"])
    model = build_model(torch.float64, norm=norm).eval()
    model.load_state_dict(found[0]["weights"])
    data = Sequences(VAL, getattr(torch, settings.dtype), seed=1)
    with torch.no_grad():
        outputs = model(data.inputs.double())
        return torch.nn.functional.cross_entropy(outputs, data.targets, ignore_index=IGNORED).item(), outputs


@shows(4, "evaluated")
def test_an_evaluation_counts_each_sample_once(found: list[Any], settings: Settings) -> None:
    """The loss of a split that does not divide by the ranks is that of one pass over it."""
    loss, _ = expected(found, settings)
    for rank in found:
        assert rank["loss"] == pytest.approx(loss, rel=max(settings.tolerance, 1e-9))


@shows(4, "evaluated")
def test_inference_gathers_in_order(found: list[Any], settings: Settings) -> None:
    """Every rank gets one entry per sample, in the order of the data set; without gathering, each sample is somebody's."""
    _, outputs = expected(found, settings)
    for rank in found:
        assert len(rank["entries"]) == len(outputs)
        for entry, output in zip(rank["entries"], outputs, strict=True):
            assert (entry - output).abs().max() <= settings.tolerance * output.abs().max()
    shares = {rank["data_rank"]: rank["own"] for rank in found}
    assert sum(shares.values()) == len(outputs)
    assert max(shares.values()) - min(shares.values()) <= 1


@shows(3, "evaluated")
def test_evaluation_and_inference_touch_nothing(found: list[Any]) -> None:
    """Weights, counters and random states are as before, and the model is back in training mode."""
    assert all(rank["untouched"] and rank["training"] for rank in found)


@shows(3, "evaluated_often")
def test_how_often_one_evaluates_does_not_matter(found: list[Any]) -> None:
    """With dropout and augmentation, the same weights to the last bit."""
    for rank in found:
        assert all(value.equal(rank["once"][name]) for name, value in rank["often"].items())


@shows(8, "running_statistics")
def test_running_statistics_are_those_of_one_model(found: list[Any], settings: Settings) -> None:
    """All ranks evaluate one model, which is the one that is exported, and the one that is read back."""
    loss, _ = expected(found, settings)
    for rank in found:
        assert all(value.equal(found[0]["weights"][name]) for name, value in rank["weights"].items())
        assert rank["loss"] == rank["again"] == found[0]["loss"]
        assert rank["rows"] == found[0]["rows"]
        assert rank["loss"] == pytest.approx(loss, rel=max(settings.tolerance, 1e-9))
    moved = [name for name, value in found[0]["start"].items() if not value.equal(found[0]["weights"][name])]
    assert {name.split(".")[-1] for name in moved} >= {"running_mean", "running_var", "num_batches_tracked"}
