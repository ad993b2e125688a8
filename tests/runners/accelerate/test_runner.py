"""One process on Accelerate trains as the torch stack does, resumes exactly, and leaves nothing behind."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from danling.backends.accelerate import AccelerateRunner
from danling.backends.torch import TorchRunner
from danling.runners import ConfigError
from support.shortcut import both_ways
from support.tiny import Tiny, final_state, tiny_config


class Accelerated(Tiny, AccelerateRunner):
    pass


class Plain(Tiny, TorchRunner):
    pass


def double(cls):
    class Double(cls):
        def __init__(self, config):
            super().__init__(config)
            self.model.double()
            for dataset in self.datasets.values():
                dataset.inputs = dataset.inputs.double()

    return Double


def flat(value):
    if isinstance(value, dict):
        return [x for item in value.values() for x in flat(item)]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


def run(cls, root, **overrides):
    with cls(tiny_config(root, **overrides)) as runner:
        runner.train()
    return final_state(runner), runner.losses, runner.seen


VARIANTS = {
    "epochs": {},
    "accumulated": {"accum_steps": 3},
    "scheduled": {"scheduler__type": "cosine", "ema__enabled": True},
    "steps": {"steps": 17, "accum_steps": 2, "checkpoint__interval": 5},
    "plateau": {"scheduler__type": "reduce_on_plateau", "scheduler__patience": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise_equal_to_the_torch_stack(tmp_path, variant):
    ours = run(Accelerated, tmp_path / "ours", **VARIANTS[variant])
    assert ours == run(Plain, tmp_path / "theirs", **VARIANTS[variant])


@pytest.mark.parametrize(
    "clipping", [{"max_grad_norm": 0.3}, {"max_grad_value": 0.02}, {"max_grad_norm": 0.3, "max_grad_value": 0.1}]
)
@pytest.mark.parametrize("optimizer", [{}, {"optim__type": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9}])
def test_clipped_as_by_the_torch_stack(tmp_path, clipping, optimizer):
    ours, losses, _ = run(double(Accelerated), tmp_path / "ours", **clipping, **optimizer)
    theirs, expected, _ = run(double(Plain), tmp_path / "theirs", **clipping, **optimizer)
    unclipped, _, _ = run(double(Plain), tmp_path / "unclipped", **optimizer)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert flat(ours["model"]) == pytest.approx(flat(theirs["model"]), rel=1e-9)
    assert flat(ours["model"]) != pytest.approx(flat(unclipped["model"]), rel=1e-3)


def test_bf16(tmp_path):
    _, losses, _ = run(Accelerated, tmp_path / "ours", precision="bf16", tiny__dropout=0.0)
    _, expected, _ = run(Plain, tmp_path / "theirs", precision="bf16", tiny__dropout=0.0)
    _, full, _ = run(Plain, tmp_path / "full", tiny__dropout=0.0)
    assert losses == pytest.approx(expected, rel=2e-2) and losses != full


@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.1, "max_grad_norm": 1.0}])
def test_nonfinite_gradients_are_skipped(tmp_path, clipping):
    def with_poison(cls):
        class Poisoned(cls):
            def train_step(self, data):
                if self.train_state.micro_step == 2:
                    data = (data[0] * torch.nan, *data[1:])
                return super().train_step(data)

        return Poisoned

    states = []
    for cls in (Accelerated, Plain):
        options = {"skip_nonfinite_grad": True, "epochs": 1, "tiny__val": 0, **clipping}
        state, _, _ = run(with_poison(double(cls)), tmp_path / cls.__name__, **options)
        states.append(state)
    assert states[0]["train"] == states[1]["train"] and states[0]["train"]["skipped"] == 1
    assert flat(states[0]["model"]) == pytest.approx(flat(states[1]["model"]), rel=1e-9)


def test_an_optimizer_and_a_scheduler_of_the_user(tmp_path):
    def with_own(cls):
        class Own(cls):
            def __init__(self, config):
                super().__init__(config)
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
                self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3)

        return Own

    options = {"optim__type": None}
    ours = run(with_own(Accelerated), tmp_path / "ours", **options)
    assert ours == run(with_own(Plain), tmp_path / "theirs", **options)


def test_a_model_with_nothing_to_train_is_evaluated(tmp_path):
    class Frozen(Accelerated):
        def __init__(self, config):
            super().__init__(config)
            self.model.requires_grad_(False)

    with Frozen(tiny_config(tmp_path, optim__type=None)) as runner:
        assert runner.evaluate_epoch("val")["loss"] > 0


# Resuming


def interrupted(cls, config, update, then=None):
    """Losses of a run that is stopped after an update and goes on as another class."""
    losses = []
    with cls(config) as runner:
        runner.on("step", lambda runner, event: event.global_step == update and runner.request_stop("test"))
        runner.train()
        losses += runner.losses
    with (then or cls)(config) as runner:
        assert runner.global_step == update
        runner.train()
    return final_state(runner), losses + runner.losses


RESUMED = {"scheduler__type": "cosine", "ema__enabled": True, "accum_steps": 2, "tiny__augment": True}


@pytest.mark.parametrize("update", [1, 4, 6])
@pytest.mark.parametrize("pair", ["ours", "torch to ours", "ours to torch"])
def test_stopped_and_resumed_equals_straight(tmp_path, pair, update):
    expected, losses, _ = run(Plain, tmp_path / "straight", **RESUMED)
    first, second = {
        "ours": (Accelerated, Accelerated),
        "torch to ours": (Plain, Accelerated),
        "ours to torch": (Accelerated, Plain),
    }[pair]
    config = tiny_config(tmp_path / "stopped", auto_resume=True, **RESUMED)
    assert interrupted(first, config, update, second) == (expected, losses)


@pytest.mark.parametrize(
    "how", [{"compile__enable": True, "compile__backend": "eager"}, {"accelerate": {"dynamo_backend": "eager"}}]
)
def test_compiled(tmp_path, how):
    how = {**how, "tiny__dropout": 0.0, "epochs": 1, "stack": "accelerate"}
    state, losses, _ = run(Tiny, tmp_path / "compiled", **how)
    plain, expected, _ = run(Plain, tmp_path / "plain", tiny__dropout=0.0, epochs=1)
    assert losses == pytest.approx(expected, rel=1e-6) and list(state["model"]) == list(plain["model"])
    config = {**how, "epochs": 2, "resume": "latest"}
    with Tiny(tiny_config(tmp_path / "compiled", **config)) as runner:
        assert runner.global_step == 6 and set(runner.export_state()) == set(plain["model"])


def test_names_are_those_of_the_module(tmp_path):
    with Accelerated(tiny_config(tmp_path, epochs=1, precision="bf16")) as runner:
        names = set(runner.export_state())
        assert names == {"0.weight", "0.bias", "3.weight", "3.bias"}
        runner.train()
        runner.export(tmp_path / "weights.safetensors")
    with Plain(tiny_config(tmp_path / "next", pretrained=str(tmp_path / "weights.safetensors"))) as other:
        assert final_state(other)["model"] == final_state(runner)["model"]


# What is left behind


def test_two_runners_in_a_row(tmp_path):
    before = dict(os.environ)
    for index, precision in enumerate(("bf16", "fp32")):
        with Accelerated(tiny_config(tmp_path / f"{index}", epochs=1, precision=precision)) as runner:
            assert runner.accelerator.mixed_precision == {"bf16": "bf16", "fp32": "no"}[precision]
            runner.train()
        assert not AcceleratorState._shared_state and not PartialState._shared_state and not GradientState._shared_state
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(runner.model))
        runner.infer("val")
    assert dict(os.environ) == before


def test_a_failed_construction_leaves_nothing(tmp_path):
    class Headless(Accelerated):
        def __init__(self, config):
            super().__init__(config)
            self.model = None

    with pytest.raises(ValueError, match="has no model"):
        Headless(tiny_config(tmp_path))
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_an_accelerator_made_earlier(tmp_path):
    Accelerator(cpu=True)
    try:
        with pytest.raises(RuntimeError, match="exists already"):
            Accelerated(tiny_config(tmp_path))
        assert AcceleratorState._shared_state  # somebody else's, left alone
        assert not any(tmp_path.iterdir())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mixed_precision'"):
        Accelerated(tiny_config(tmp_path, accelerate={"mixed_precison": "bf16"}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"precision": "fp16"}, "precision 'fp16' needs an accelerator"),
        ({"ft__enabled": True}, "ft.enabled.*stack 'torch' or 'parallel'"),
        ({"parallel__axes__shard": 2}, "parallel.axes.shard: 2.*stack 'parallel'"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(tmp_path, config, words):
    with pytest.raises(ConfigError, match=words):
        Accelerated(tiny_config(tmp_path, **config))
    assert not any(tmp_path.iterdir())


def test_the_configuration_chooses_it(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1, accelerate={"cpu": True})) as runner:
        assert isinstance(runner, AccelerateRunner) and runner.stack == "accelerate"
        assert runner.device.type == "cpu" == runner.accelerator.device.type
        runner.train()


@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.1, "skip_nonfinite_grad": True, "infinite": True}], ids=str
)
def test_the_short_way_through_an_update_gives_the_bits_of_the_long_one(tmp_path, settings):
    short, long = both_ways(tmp_path, stack="accelerate", **settings)
    assert (short[0], long[0]) == (True, False)
    assert short[1:] == long[1:]
    assert short[-1] == 2 + 2 * bool(settings)
