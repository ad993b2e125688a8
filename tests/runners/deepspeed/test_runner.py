"""One process on DeepSpeed: equal to the torch stack under every stage, what it writes, what it reads, what it gives back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from danling.backends.deepspeed import DeepSpeedRunner
from danling.backends.torch import TorchRunner
from danling.runners import CheckpointError, ConfigError, ResumeError
from danling.runners.cli import main
from support.shortcut import both_ways
from support.tiny import Tiny, tiny_config

# Under the other stages these tests run with the slow ones.
TWO_STAGES = [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]


class Sharded(Tiny, DeepSpeedRunner):
    pass


class Plain(Tiny, TorchRunner):
    pass


def config(root, stage=0, **overrides):
    zero = {"zero_optimization": {"stage": stage}, **overrides.pop("deepspeed", {})}
    return tiny_config(root, **{"deepspeed": zero, "epochs": 1, "log_interval": 0, **overrides})


def train(root, stage=0, cls=Sharded, **overrides):
    with cls(config(root, stage, **overrides)) as runner:
        runner.train()
        return runner, runner.export_state()


def plain(root, **overrides):
    with Plain(tiny_config(root, **{"epochs": 1, "log_interval": 0, **overrides})) as runner:
        runner.train()
        return runner, runner.export_state()


def same(ours, theirs, tolerance=0.0):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def checkpoint(runner, name="epoch-1"):
    return runner.checkpoint_dir / name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run under every stage, with the weights that it ended with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return [train(tmp_path_factory.mktemp(f"zero{stage}"), stage) for stage in range(4)]


# Training


@pytest.mark.parametrize("stage", TWO_STAGES)
def test_the_short_way_through_an_update_gives_the_bits_of_the_long_one(tmp_path, stage):
    zero = {"zero_optimization": {"stage": stage}}
    short, long = both_ways(tmp_path, infinite=True, stack="deepspeed", deepspeed=zero, skip_nonfinite_grad=True)
    assert (short[0], long[0]) == (True, False)
    assert short[1:] == long[1:]
    assert short[-1] == 4


@pytest.mark.parametrize("stage", range(4))
def test_equal_to_the_torch_stack(tmp_path, saved, stage):
    runner, weights = saved[stage]
    other, expected = plain(tmp_path)
    same(weights, expected, 1e-6)
    assert runner.losses == pytest.approx(other.losses, rel=1e-6) and runner.seen == other.seen
    assert runner.results.rows()[1]["val"]["loss"] == pytest.approx(other.results.rows()[1]["val"]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16(tmp_path, stage):
    options = {"precision": "bf16", "tiny__dropout": 0.0}
    runner, weights = train(tmp_path / "ours", stage, **options)
    _, full = plain(tmp_path / "full", **{**options, "precision": "fp32"})
    losses = plain(tmp_path / "theirs", **options)[0].losses
    assert runner.losses == pytest.approx(losses, rel=3e-2) and list(weights) == list(full)
    with Sharded(config(tmp_path / "ours", stage, **options, epochs=2, resume="latest")) as more:
        assert more.global_step == 6
        more.train()


def test_precision_said_to_the_engine_alone(tmp_path):
    with Sharded(config(tmp_path, deepspeed={"bf16": {"enabled": True}})) as runner:
        assert runner.precision.name == "bf16" and runner.model.bfloat16_enabled()
        (entry, *_) = runner.infer("val")
        assert entry.dtype == torch.float32


# While it traces the engine's hooks, Dynamo looks at gradients of tensors that are no leaves.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiles", [False, True])
def test_what_the_torch_stack_can_do_besides(tmp_path, compiles):
    options = {"activation_checkpoint": {"enabled": True, "module_classes": ["Linear"]}, "tiny__dropout": 0.0}
    if compiles:
        options = {"compile__enable": True, "compile__backend": "eager", "tiny__dropout": 0.0}
    _, weights = train(tmp_path / "ours", 2, **options)
    _, expected = plain(tmp_path / "theirs", tiny__dropout=0.0)
    same(weights, expected, 1e-6)


@pytest.mark.slow
def test_the_engine_makes_the_optimizer(tmp_path):
    made = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "weight_decay": 0.01}}
    schedule = {"optim__type": None, "scheduler__type": "cosine"}
    runner, weights = train(tmp_path / "ours", 1, deepspeed={"optimizer": made}, **schedule)
    other, expected = plain(tmp_path / "theirs", scheduler__type="cosine", optim__weight_decay=0.01)
    same(weights, expected, 1e-6)
    assert runner.scheduler.last_epoch == other.scheduler.last_epoch == 6


@pytest.mark.slow
def test_the_engine_steps_its_own_scheduler(tmp_path):
    own = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 10}}
    runner, _ = train(tmp_path, 1, deepspeed={"scheduler": own})
    assert runner.scheduler is None and 0 < runner.optimizer.param_groups[0]["lr"] < 0.01
    with Sharded(config(tmp_path, 1, deepspeed={"scheduler": own}, epochs=2, resume="latest")) as more:
        assert more.engine.lr_scheduler.last_batch_iteration == runner.engine.lr_scheduler.last_batch_iteration


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_a_nonfinite_gradient(tmp_path, stage, skips):
    class Poisoned(Sharded):
        def train_step(self, data):
            if self.train_state.micro_step == 2:
                data = (data[0] * torch.nan, *data[1:])
            return super().train_step(data)

    runner, weights = train(
        tmp_path, stage, Poisoned, skip_nonfinite_grad=skips, scheduler__type="cosine", ema__enabled=stage < 3
    )
    looked_at = skips or stage > 0
    assert runner.train_state.skipped == looked_at and runner.global_step == 6 - looked_at
    assert runner.scheduler.last_epoch == runner.global_step and runner.engine.global_steps == 6 - (
        looked_at and not stage
    )
    assert all(value.isfinite().all() for value in weights.values()) == looked_at
    assert stage == 3 or int(runner.ema.n_averaged) == runner.global_step


@pytest.mark.parametrize("stage", TWO_STAGES)
def test_the_gradient_norm(tmp_path, stage):
    runner, _ = train(tmp_path / "ours", stage, max_grad_norm=0.1)
    other, _ = plain(tmp_path / "theirs", max_grad_norm=0.1)
    assert float(runner.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-4)


@pytest.mark.slow
def test_a_scheduler_that_follows_a_metric(tmp_path):
    options = {"scheduler__type": "reduce_on_plateau", "scheduler__patience": 0, "optim__lr": 0.5, "epochs": 4}
    runner, _ = train(tmp_path / "ours", 2, **options)
    other, _ = plain(tmp_path / "theirs", **options)
    assert runner.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"] < 0.5


def test_evaluation_without_an_optimizer(tmp_path, saved):
    for stage in (2, 3):
        chosen = config(tmp_path / f"{stage}", stage, pretrained=str(checkpoint(saved[stage][0])))
        for key in ("optim.type", "optim.lr", "epochs"):
            del chosen[key]
        with Sharded(chosen) as runner:
            found = runner.evaluate()["val"]["loss"]
        assert found == pytest.approx(saved[stage][0].results.rows()[1]["val"]["loss"], rel=1e-6)


# What is written


@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint(saved, stage, capsys):
    runner, _ = saved[stage]
    names = {str(path.relative_to(checkpoint(runner))) for path in checkpoint(runner).rglob("*") if path.is_file()}
    part = "zero_pp_rank_0_mp_rank_00_" if stage == 3 else "mp_rank_00_"
    engine = {f"engine/{part}model_states.pt"} | (
        {"engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"} if stage else set()
    )
    assert names == {"manifest.json", "runner.yaml", "runner.json", "ranks/rank-00000.pt", *engine}
    manifest = json.loads((checkpoint(runner) / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert (manifest["stack"], manifest["zero_stage"], manifest["world_size"]) == ("deepspeed", stage, 1)
    assert (
        runner.checkpoint_manager.resolve("latest") == runner.checkpoint_manager.resolve("best") == checkpoint(runner)
    )
    assert main(["verify", str(runner.dir)]) == 0 and "whole" in capsys.readouterr().out


def test_the_mapping_of_the_engine_is_kept(saved):
    runner, _ = saved[2]
    (path,) = runner.dir.glob("metadata/*/deepspeed.json")
    assert json.loads(path.read_text()) == runner.get_deepspeed_config() == runner.settings.engine
    assert runner.engine.config == runner.settings.engine


def test_a_check_that_is_turned_off(tmp_path):
    given = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    with Sharded(config(tmp_path, 1, deepspeed=given)) as runner:
        assert "non-finite gradients" not in runner.describe_engine()


def test_a_seed_checkpoint(tmp_path):
    with Sharded(config(tmp_path / "first", 3)) as runner:
        runner.save_seed_checkpoint()
        weights = runner.export_state()
    with Sharded(config(tmp_path / "second", 1, pretrained=str(checkpoint(runner, "seed")))) as other:
        same(other.export_state(), weights)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading(tmp_path, saved, stage):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    runner, weights = train(tmp_path, deepspeed={"zero_optimization": zero})
    same(weights, saved[stage][1], 1e-6)
    with Sharded(config(tmp_path, deepspeed={"zero_optimization": zero}, epochs=2, resume="latest")) as more:
        same(more.export_state(), weights)
        more.train()


def test_the_summary_at_the_start(tmp_path, capsys):
    train(tmp_path, 1, log_interval=None)
    said = capsys.readouterr().out
    assert "ZeRO 1" in said and "synchronous" in said and "skip_nonfinite_grad is off" in said


@pytest.mark.parametrize("stage", range(4))
def test_export(tmp_path, saved, stage, capsys):
    runner, weights = saved[stage]
    target = tmp_path / "weights.safetensors"
    assert main(["export", str(checkpoint(runner)), str(target)]) == 0
    same(dict(sorted(load_file(target).items())), dict(sorted(weights.items())))
    assert main(["export", str(runner.dir), str(target), "--force", "--dtype", "bf16"]) == 0
    assert {value.dtype for value in load_file(target).values()} == {torch.bfloat16}


def test_export_of_weights_that_are_not_in_the_files(tmp_path, saved, capsys):
    from danling.backends.deepspeed.files import read_engine_weights

    folder = tmp_path / "engine"
    folder.mkdir()
    for path in (checkpoint(saved[3][0]) / "engine").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (optimizer,) = folder.glob("*optim_states.pt")
    from danling.backends.deepspeed.files import read_engine_file

    state = read_engine_file(optimizer)
    state["optimizer_state_dict"]["fp32_flat_groups"] = [torch.empty(0)]
    torch.save(state, optimizer)
    with pytest.raises(CheckpointError, match=r"running job: runner\.export"):
        read_engine_weights(folder)
    optimizer.unlink()
    with pytest.raises(CheckpointError, match="split by ZeRO 3"):
        read_engine_weights(folder)


def test_an_average_is_kept_and_preferred(tmp_path):
    with Sharded(config(tmp_path / "first", 2, ema__enabled=True, ema__decay=0.5)) as runner:
        runner.train()
        averaged, raw = runner.export_state(), runner.export_state(ema=False)
    assert not averaged["0.weight"].equal(raw["0.weight"])
    target = tmp_path / "weights.safetensors"
    for option, expected in (([], averaged), (["--no-ema"], raw)):
        assert main(["export", str(runner.dir), str(target), "--force", *option]) == 0
        same(dict(sorted(load_file(target).items())), dict(sorted(expected.items())))
    with Sharded(config(tmp_path / "second", 3, pretrained=str(checkpoint(runner)))) as other:
        same(other.export_state(), averaged)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_last_save_of_weights_alone(tmp_path, stage):
    runner, weights = train(tmp_path / "first", stage, checkpoint__last_save_model_only=True)
    assert not (checkpoint(runner, "final") / "engine").exists()
    with Sharded(config(tmp_path / "second", 2, pretrained=str(checkpoint(runner, "final")))) as other:
        same(other.export_state(), weights)


# Weights from elsewhere


@pytest.mark.parametrize("stage", TWO_STAGES)
def test_weights_go_between_stacks_and_stages(tmp_path, saved, stage):
    runner, weights = saved[stage]
    with Plain(tiny_config(tmp_path / "torch", pretrained=str(checkpoint(runner)))) as other:
        same(other.export_state(), weights)
    with Sharded(config(tmp_path / "own", 3 - stage, pretrained=str(runner.dir))) as other:
        same(other.export_state(), weights)
        other.train()
    source, expected = plain(tmp_path / "plain")
    with Sharded(config(tmp_path / "back", stage, pretrained=str(checkpoint(source)))) as other:
        same(other.export_state(), expected)
        other.load_pretrained({"model": weights})
        same(other.export_state(), weights)
        other.train()  # the engine goes on from the weights it was given
        started = other.losses
    with Plain(tiny_config(tmp_path / "same", pretrained=str(checkpoint(runner)), epochs=1)) as other:
        other.train()
    assert started == pytest.approx(other.losses, rel=1e-5)


@pytest.mark.parametrize("latest", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", TWO_STAGES)
def test_a_directory_that_deepspeed_has_laid_out(tmp_path, saved, stage, latest):
    with Sharded(config(tmp_path / "first", stage)) as runner:
        runner.train()
        runner.engine.save_checkpoint(str(tmp_path / "foreign"), tag="global_step6")
        weights = runner.export_state()
    source = tmp_path / "foreign" if latest else tmp_path / "foreign" / "global_step6"
    with Sharded(config(tmp_path / "second", 3 - stage, pretrained=str(source))) as other:
        same(other.export_state(), weights)
    with pytest.raises(ResumeError, match="weights only.*pretrained"):
        Sharded(config(tmp_path / "third", stage, resume=str(source)))


def test_a_directory_of_deepspeed_with_the_state_of_a_run(tmp_path):
    options = {"scheduler__type": "cosine", "epochs": 2}
    runner, weights = train(tmp_path / "straight", 2, **options)
    with Sharded(config(tmp_path / "first", 2, **options)) as half:
        half.on("step", lambda runner, event: event.global_step == 6 and runner.request_stop())
        half.train()
        extra = {"scheduler": half.scheduler.state_dict(), "rng": half.rank_state()["rng"], "dataloaders": {}}
        half.engine.save_checkpoint(str(tmp_path / "foreign"), client_state={**half.state_dict(), **extra})
    with Sharded(config(tmp_path / "second", 2, **options, resume=str(tmp_path / "foreign"))) as other:
        assert other.global_step == 6
        other.train()
        same(other.export_state(), weights)


# Resuming


def resumed(runner, stage, **overrides):
    return Sharded(config(runner.workspace.root, stage, epochs=2, resume="latest", **overrides))


@pytest.mark.parametrize("stage", TWO_STAGES)
def test_loaded_again_in_the_middle_of_a_run(tmp_path, stage):
    with Sharded(config(tmp_path, stage, steps=9, epochs=None, checkpoint__interval=3, tiny__augment=True)) as runner:
        runner.train()
        weights, losses = runner.export_state(), list(runner.losses)
        runner.load_checkpoint("step-6")
        assert runner.global_step == 6
        runner.train()
        same(runner.export_state(), weights)
        assert runner.losses == losses + losses[6:]


def test_another_stage_is_refused(saved):
    with pytest.raises(ResumeError, match="saved with 2 as its ZeRO stage and this run has 1.*pretrained"):
        resumed(saved[2][0], 1)


def test_another_number_of_ranks_is_refused(tmp_path, saved):
    with Sharded(config(tmp_path, 1)) as runner:
        payload = runner.read_checkpoint(checkpoint(saved[1][0]))
        payload["manifest"] = {**payload["manifest"], "world_size": 4}
        with pytest.raises(ResumeError, match="saved with 4 ranks and this run has 1.*pretrained"):
            runner.load_checkpoint(payload)


def test_checkpoints_of_another_stack_are_refused(tmp_path, saved):
    source, _ = plain(tmp_path / "torch")
    with pytest.raises(ResumeError, match="'torch'.*'deepspeed'.*pretrained"):
        Sharded(config(tmp_path / "ours", 1, resume=str(checkpoint(source))))
    with pytest.raises(ResumeError, match="'deepspeed'.*'torch'.*pretrained"):
        Plain(tiny_config(tmp_path / "theirs", resume=str(checkpoint(saved[1][0]))))


@pytest.mark.parametrize("stage", TWO_STAGES)
def test_an_optimizer_that_starts_afresh(tmp_path, saved, stage):
    runner, weights = saved[stage]
    with Sharded(
        config(tmp_path / "a", stage, resume=str(checkpoint(runner)), checkpoint__exclude_from_loading="optimizer")
    ) as other:
        same(other.export_state(), weights)
        assert other.global_step == 6
        moments = [
            value for state in other.optimizer.state.values() for key, value in state.items() if key == "exp_avg"
        ]
        assert all(not value.any() for value in moments)
    part = {"checkpoint__exclude_from_loading": ["model.3.*", "optimizer"], "resume": str(checkpoint(runner))}
    with Sharded(config(tmp_path / "b", stage, **part)) as other:
        state = other.export_state()
        assert state["0.weight"].equal(weights["0.weight"]) and not state["3.weight"].equal(weights["3.weight"])
    with pytest.raises(ResumeError, match="exclude 'optimizer' as well"):
        Sharded(config(tmp_path / "c", stage, **{**part, "checkpoint__exclude_from_loading": "model.3.*"}))


def test_a_mapping_goes_the_generic_way(tmp_path, saved):
    runner, weights = saved[2]
    with Sharded(config(tmp_path, 2)) as other:
        payload = other.read_checkpoint(checkpoint(runner))
        other.load_checkpoint(payload)
        same(other.export_state(), weights)
        with pytest.raises(ResumeError, match="not saved by a DeepSpeed engine.*exclude_from_loading"):
            other.load_checkpoint({**payload, "model": weights, "optimizer": {"state": {}}})


# Files that are damaged, or attack


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/danling-was-here",))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("which", ["optim", "model"])
@pytest.mark.parametrize("what", ["call", "class"])
def test_a_forbidden_class(tmp_path, saved, stage, which, what):
    runner, _ = train(tmp_path, stage)
    (path,) = (checkpoint(runner) / "engine").glob(f"*{which}_states.pt")
    state = {"call": Attack(), "class": copy.copy(runner.workspace)}[what]
    torch.save({"module": state, "optimizer_state_dict": {"loss_scaler": state}}, path)
    with Sharded(config(tmp_path / "next", stage)) as other:
        with pytest.raises(CheckpointError, match="damaged"):
            other.load_checkpoint(checkpoint(runner))
        with pytest.raises(CheckpointError, match="mkdir" if what == "call" else "Workspace"):
            other.load_checkpoint(
                {**other.read_checkpoint(checkpoint(saved[stage][0])), "model": _files(checkpoint(runner))}
            )
    assert not os.path.exists("/tmp/danling-was-here")


def _files(path):
    from danling.backends.deepspeed.files import TAG, EngineFiles

    return EngineFiles(path, TAG)


def test_a_foreign_file_that_attacks(tmp_path):
    (tmp_path / "tag").mkdir()
    with open(tmp_path / "tag" / "mp_rank_00_model_states.pt", "wb") as file:
        pickle.dump(Attack(), file)
    with Sharded(config(tmp_path / "run")) as runner:
        for source in (tmp_path / "tag", str(tmp_path / "tag")):
            with pytest.raises(CheckpointError):
                runner.load_pretrained(source)
            with pytest.raises(CheckpointError):
                runner.load_checkpoint(source)
    assert not os.path.exists("/tmp/danling-was-here")


def test_directories_that_hold_no_weights(tmp_path):
    from danling.backends.deepspeed.files import read_engine_weights

    with pytest.raises(CheckpointError, match="holds no weights"):
        read_engine_weights(tmp_path)
    for rank in range(2):
        torch.save({}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    with pytest.raises(CheckpointError, match="tensor-parallel"):
        read_engine_weights(tmp_path)


# Refusals and what is left behind


def test_what_is_refused_before_anything_is_written(tmp_path):
    for overrides, words in (
        ({"deepspeed": {"gradient_accumulation_steps": 5}}, "accum_steps"),
        ({"deepspeed": {"zero_optimization": {"stage": 1, "no_such": 1}}}, "deepspeed.zero_optimization"),
        ({"checkpoint__async_mode": "async"}, "synchronous"),
        ({"checkpoint__backend": "dcp"}, "dcp"),
        ({"parallel__axes__tensor": 2}, "parallel.axes.tensor"),
    ):
        with pytest.raises(ConfigError, match=words):
            Sharded(config(tmp_path, **overrides))
    assert not any(tmp_path.iterdir()) and not dist.is_initialized()


def test_models_and_optimizers_that_are_refused(tmp_path):
    from deepspeed.pipe import LayerSpec, PipelineModule

    class Pipeline(Sharded):
        def __init__(self, config):
            super().__init__(config)
            self.model = object.__new__(PipelineModule)
            torch.nn.Module.__init__(self.model)

    class Averaged(Sharded):
        def __init__(self, config):
            super().__init__(config)
            self.ema = torch.optim.swa_utils.AveragedModel(self.model)

    class Own(Sharded):
        def __init__(self, config):
            super().__init__(config)
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    assert LayerSpec  # a public name: the import above is of the real thing
    for cls, stage, overrides, words in (
        (Pipeline, 0, {}, "--stack parallel"),
        (Averaged, 3, {}, "ZeRO 3"),
        (Own, 1, {"deepspeed": {"optimizer": {"type": "SGD"}}, "optim__type": None}, "deepspeed.optimizer"),
    ):
        with pytest.raises(ConfigError, match=words):
            cls(config(tmp_path / cls.__name__, stage, **overrides))
        assert not dist.is_initialized() and "LOCAL_RANK" not in os.environ
    runner, _ = train(tmp_path / "own", 2, Own, optim__type=None)
    assert type(runner.optimizer) is torch.optim.SGD and runner.global_step == 6


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nothing_is_left_behind(
    tmp_path, saved, stage
):  # after runs, because importing torch.compile changes the environment
    environ, filters, functions = dict(os.environ), list(warnings.filters), dict(vars(torch.nn.functional))
    for index in range(2):
        runner, _ = train(tmp_path / f"{index}", stage)
        assert not dist.is_initialized() and dict(os.environ) == environ and list(warnings.filters) == filters
        assert dict(vars(torch.nn.functional)) == functions
        assert type(runner.model).__name__ == "Sequential"
    if stage < 3:  # whole, and plain again
        assert not runner.model._forward_pre_hooks and not runner.model._forward_hooks
        runner.model(torch.ones(2, 4)).sum().backward()
        assert runner.model[0].weight.grad is not None and len(runner.infer("val")) == 21


def test_a_process_group_of_somebody_else(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="exists already"):
            Sharded(config(tmp_path))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_the_configuration_chooses_it(tmp_path):
    with Tiny(config(tmp_path, 1)) as runner:
        assert isinstance(runner, DeepSpeedRunner) and runner.stack == "deepspeed" and runner.device.type == "cpu"
        runner.train()
