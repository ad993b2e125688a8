"""What the torch stack cannot do is refused while the runner is built, by name, and before anything is written."""

import pytest

from danling.runners import CheckpointNotFoundError, ConfigError, StackError
from support.tiny import Tiny, tiny_config

BEFORE_ANY_FILE = [
    ({"parallel__axes__shard": 2, "stack": "torch"}, ConfigError, ["parallel.axes.shard: 2", "'torch'", "'parallel'"]),
    ({"parallel__axes__tensor": -1, "stack": "torch"}, ConfigError, ["parallel.axes.tensor: -1", "'parallel'"]),
    ({"parallel__axes__shard": 2}, StackError, ["parallel.axes.shard", "parallel"]),
    ({"stack": "nope"}, StackError, ["'nope'", "torch", "parallel"]),
    ({"fsdp__enabled": True, "stack": "torch"}, ConfigError, ["fsdp.enabled: True", "'torch'"]),
    ({"ft__enabled": True, "stack": "accelerate"}, ConfigError, ["ft.enabled: True", "'accelerate'"]),
    ({"deepspeed": {"a": 1}, "stack": "torch"}, ConfigError, ["deepspeed", "'torch'"]),
    ({"epochs": 0}, ConfigError, ["epochs: 0"]),
    ({"optin": {"lr": 1}}, ConfigError, ["optin", "'optim'"]),
    ({"precision": "fp16"}, ConfigError, ["fp16", "accelerator"]),
]
LATER = [
    ({"dataloader__tset__batch_size": 2}, ConfigError, ["dataloader.tset", "train, val"]),
    ({"dataloader__batch_size": 64}, ConfigError, ["'train'", "50 samples", "64", "drop_last"]),
    ({"train_splits": ["zzz"]}, ConfigError, ["train_splits", "'zzz'", "train, val"]),
    ({"evaluate_splits": ["zzz"]}, ConfigError, ["evaluate_splits", "'zzz'", "train, val"]),
    ({"optim__lrr": 3}, ConfigError, ["'lrr'", "weight_decay"]),
    ({"optim__type": "adamv"}, ConfigError, ["'adamv'", "adamw"]),
    ({"optim__param_groups": [{"pattern": "zzz"}]}, ConfigError, ["'zzz'", "matches no parameter"]),
    ({"scheduler__type": "cosine", "scheduler__foo": 1}, ConfigError, ["'foo'", "total_steps"]),
    ({"scheduler__type": "reduce_on_plateau", "scheduler__interval": "step"}, ConfigError, ["scheduler.interval"]),
    (
        {"activation_checkpoint__enabled": True, "activation_checkpoint__module_classes": ["Foo"]},
        ConfigError,
        ["'Foo'", "Linear"],
    ),
    ({"resume": "/nowhere"}, CheckpointNotFoundError, ["/nowhere"]),
]


@pytest.mark.parametrize(("overrides", "error", "words"), BEFORE_ANY_FILE, ids=lambda case: str(case)[:40])
def test_refused_before_any_file(tmp_path, overrides, error, words):
    with pytest.raises(error) as caught:
        Tiny(tiny_config(tmp_path / "runs", **overrides))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("overrides", "error", "words"), LATER, ids=lambda case: str(case)[:40])
def test_refused_with_a_summary(tmp_path, overrides, error, words):
    with pytest.raises(error) as caught:
        Tiny(tiny_config(tmp_path, **overrides))
    assert all(word in str(caught.value) for word in words), caught.value
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"summary.json", ".lock"}


def test_no_budget_is_refused_by_train_alone(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=None)) as runner:
        assert runner.evaluate()["val"]["loss"] > 0
        with pytest.raises(ValueError, match="no budget: set `epochs` or `steps`"):
            runner.train()
