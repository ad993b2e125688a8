"""Model-only, seed and no checkpoints, and loading without some components."""

from __future__ import annotations

import pytest
import torch

from danling.backends.torch.export import read_safetensors
from danling.backends.torch.payload import read_weights
from danling.runners import ResumeError
from danling.runners.manifest import read_manifest
from support.tiny import Tiny, final_state, tiny_config


def names(runner) -> set[str]:
    return {info.name for info in runner.checkpoint_manager.list()}


def test_the_last_save_can_be_weights_alone(tmp_path):
    options = {
        "epochs": 2,
        "ema__enabled": True,
        "tiny__norm": True,
        "checkpoint__last_save_model_only": True,
        "checkpoint__export_dtype": "bf16",
    }
    with Tiny(tiny_config(tmp_path, **options)) as runner:
        runner.train()
        average = runner.ema.module.state_dict()
    final = runner.checkpoint_dir / "final"
    assert names(runner) == {"epoch-1", "final"}  # earlier full saves stay
    assert read_manifest(final)["kind"] == "model" and set(read_manifest(final)["files"]) == {"model.pt", "runner.yaml"}
    assert runner.checkpoint_manager.resolve("latest").name == "epoch-1"
    weights = read_weights(final)
    for name, value in average.items():
        expected = value.to(torch.bfloat16) if value.is_floating_point() else value
        assert weights[name].dtype == expected.dtype and torch.equal(weights[name], expected), name
    with pytest.raises(ResumeError, match="holds weights only; to start from them use `pretrained`"):
        Tiny(tiny_config(tmp_path / "a", **{**options, "resume": str(final)}))
    with Tiny(tiny_config(tmp_path / "b", tiny__norm=True, pretrained=str(final))) as other:
        assert other.global_step == 0
        assert torch.equal(other.model[0].weight, average["0.weight"].to(torch.bfloat16).float())
    # Going on repeats epoch 2 and ends at the same boundary; what is committed there stays as it is.
    with Tiny(tiny_config(tmp_path, **{**options, "auto_resume": True})) as again:
        assert again.epoch == 1
        again.train()
        assert names(again) == {"epoch-1", "final"}
    with Tiny(tiny_config(tmp_path, **{**options, "auto_resume": True, "epochs": 3})) as longer:
        longer.train()
        assert names(longer) == {"epoch-1", "epoch-2", "final", "final.1"}


def test_export_takes_the_average_unless_told_otherwise(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1, ema__enabled=True)) as runner:
        runner.train()
        runner.export(tmp_path / "average.safetensors")
        runner.export(tmp_path / "model.safetensors", ema=False, dtype="fp16")
    for name, value in runner.ema.module.state_dict().items():
        assert torch.equal(read_safetensors(tmp_path / "average.safetensors")[name], value)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(read_safetensors(tmp_path / "model.safetensors")[name], value.half())


def test_a_seed_checkpoint_is_the_untrained_state(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        before = {name: value.clone() for name, value in runner.model.state_dict().items()}
        runner.save_seed_checkpoint()
        assert names(runner) == {"seed"} and not (runner.checkpoint_dir / "latest.pointer").exists()
        runner.train()
        trained = final_state(runner)
    assert names(runner) == {"seed", "epoch-1"}
    weights = read_weights(runner.checkpoint_dir / "seed")
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    with Tiny(tiny_config(tmp_path / "other", epochs=1, resume=str(runner.checkpoint_dir / "seed"))) as other:
        assert other.global_step == 0
        other.train()
        assert final_state(other) == trained


def test_load_only_writes_no_checkpoint(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1, checkpoint__load_only=True)) as runner:
        runner.train()
        runner.save_checkpoint("mine", force=True)
    assert not runner.checkpoint_dir.exists()


def test_components_and_parameters_can_be_left_out(tmp_path):
    with Tiny(tiny_config(tmp_path / "a", epochs=1)) as runner:
        runner.train()
    source = str(runner.checkpoint_dir / "epoch-1")
    exclude = ["optimizer", "model.3.*"]
    config = tiny_config(tmp_path / "b", epochs=3, resume=source, checkpoint__exclude_from_loading=exclude)
    with Tiny(config) as other, Tiny(tiny_config(tmp_path / "c")) as fresh:
        assert other.epoch == 1 and not other.optimizer.state
        assert torch.equal(other.model[0].weight, runner.model[0].weight)
        assert torch.equal(other.model[3].weight, fresh.model[3].weight)
    config = tiny_config(tmp_path / "d", epochs=3, resume=source, checkpoint__exclude_from_loading=["nope.*"])
    with pytest.raises(ResumeError, match=r"'nope\.\*' matches no parameter; the components are optimizer"):
        Tiny(config)
