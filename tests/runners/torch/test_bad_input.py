"""What cannot work fails at the earliest moment, with the cause and the way out in the message."""

import pytest
import torch
from torch import nn

from danling.runners import CheckpointError, CheckpointNotFoundError, ConfigError, ResumeError, StackError
from danling.runners.manifest import describe_files, read_manifest, walk, write_manifest
from danling.runners.store import CheckpointStore
from support.tiny import Tiny, tiny_config


def test_an_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="epoch.*did you mean 'epochs'"):
        Tiny(tiny_config(tmp_path, epoch=3))
    assert not (tmp_path / "lin").exists()


def test_an_unknown_optimizer_option(tmp_path):
    with pytest.raises(ConfigError, match="no argument 'lrr'"):
        Tiny(tiny_config(tmp_path, optim__lrr=1.0))


def test_both_budgets(tmp_path):
    with pytest.raises(ConfigError, match="steps: 3 and epochs: 3"):
        Tiny({**tiny_config(tmp_path), "steps": 3})


def test_no_budget(tmp_path):
    config = tiny_config(tmp_path)
    del config["epochs"]
    with Tiny(config) as runner, pytest.raises(ValueError, match="no budget: set `epochs` or `steps`"):
        runner.train()


def test_an_unknown_stack_lists_the_known(tmp_path):
    with pytest.raises(StackError, match="torch"):
        Tiny(tiny_config(tmp_path, stack="torchh"))


def test_no_model(tmp_path):
    class NoModel(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.model = None

    with pytest.raises(ValueError, match="has no model: assign `self.model`"):
        NoModel(tiny_config(tmp_path))


def test_no_configuration():
    for given in ("train.yaml", 3, ["epochs", 3]):
        with pytest.raises(TypeError, match="a configuration is a RunnerConfig or a mapping.*from_yaml"):
            Tiny(given)


def test_a_constructor_that_forgets_its_base():
    class Forgetful(Tiny):
        def __init__(self, config):
            self.model = nn.Linear(4, 3)

    with pytest.raises(TypeError, match=r"Forgetful.__init__ has to call super\(\).__init__\(config\)"):
        Forgetful({})


def test_no_train_split(tmp_path):
    class NoTrain(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets["learn"] = self.datasets.pop("train")

    with NoTrain(tiny_config(tmp_path)) as runner, pytest.raises(ValueError, match="no train split among.*learn"):
        runner.train()


def test_an_unwritable_workspace(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workspace_root"):
        Tiny(tiny_config(tmp_path / "file"))


@pytest.fixture
def finished(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        return runner.checkpoint_dir


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "runner.json", "ranks/rank-00000.pt"])
def test_damage_is_named_and_automatic_resume_falls_back(tmp_path, finished, name, damage):
    file = finished / "epoch-2" / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "truncate":
        file.write_bytes(content[:middle])
    elif damage == "flip":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        Tiny(tiny_config(tmp_path, epochs=2, resume=str(finished / "epoch-2")))
    with Tiny(tiny_config(tmp_path, epochs=2, auto_resume=True)) as runner:
        assert runner.epoch == 1


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"runner": 1, "state": {}, "results": {}}'])
def test_a_record_that_is_none_though_its_checksum_fits(tmp_path, finished, content):
    path = finished / "epoch-2"
    (path / "runner.json").write_text(content)
    header = {key: value for key, value in read_manifest(path).items() if key not in ("files", "format_version")}
    write_manifest(path, header, describe_files(path, list(walk(path))))
    with pytest.raises(CheckpointError, match="runner.json does not hold the record of a run"):
        Tiny(tiny_config(tmp_path, epochs=2, resume=str(path)))


def test_files_are_verified_once_per_resume(tmp_path, finished, monkeypatch):
    checked = []
    verify = CheckpointStore.verify
    monkeypatch.setattr(CheckpointStore, "verify", lambda self, path: checked.append(path) or verify(self, path))
    with Tiny(tiny_config(tmp_path, epochs=2, resume=str(finished / "epoch-1"))) as runner:
        assert runner.epoch == 1 and checked == [finished / "epoch-1"]
        runner.load_checkpoint(finished / "epoch-1")  # may have changed since
    assert len(checked) == 2


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        Tiny(tiny_config(tmp_path, resume=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointNotFoundError, match="nowhere.pt"):
        Tiny(tiny_config(tmp_path, pretrained=str(tmp_path / "nowhere.pt")))


def test_a_checkpoint_of_another_experiment_lists_the_keys(tmp_path, finished):
    with pytest.raises(ResumeError, match=r"optim.lr: 0.5 here, 0.01 in the checkpoint"):
        Tiny(tiny_config(tmp_path, optim__lr=0.5, resume=str(finished / "latest")))


def test_a_checkpoint_of_another_model(tmp_path, finished):
    class Wider(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))

    with pytest.raises(ResumeError, match=r"0\.weight \(8, 4\) instead of \(9, 4\)"):
        Wider(tiny_config(tmp_path, epochs=2, auto_resume=True))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        Wider(tiny_config(tmp_path / "other", pretrained=str(finished / "latest")))


def test_a_file_that_would_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="runs no code"):
        Tiny(tiny_config(tmp_path, pretrained=str(tmp_path / "evil.pt")))


def loader_of(batches):
    class WithLoader(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.pop("train")
            self.dataloaders.train = batches

        def train_step(self, data):
            return super(Tiny, self).train_step(data)

    return WithLoader


def test_a_batch_mapping_without_input(tmp_path):
    with loader_of([{"x": torch.zeros(2, 4)}])(tiny_config(tmp_path)) as runner:
        with pytest.raises(ValueError, match="needs the key 'input'; it has \\['x'\\]"):
            runner.train()


def test_a_loader_without_length_needs_steps_for_a_schedule(tmp_path):
    class Endless:
        def __iter__(self):
            return iter([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])

    with pytest.raises(ConfigError, match="length of the schedule is unknown.*set `steps`"):
        loader_of(Endless())(tiny_config(tmp_path, scheduler__type="cosine"))
    with loader_of(Endless())(tiny_config(tmp_path, epochs=2)) as runner:
        runner.train()
        assert (runner.epoch, runner.global_step) == (2, 2)


def test_an_empty_loader(tmp_path):
    with loader_of([])(tiny_config(tmp_path)) as runner, pytest.raises(RuntimeError, match="yields no batch"):
        runner.train()


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda self, data: self.advance(self.model(data[0]).sum(1)), ValueError, "must be a scalar, got shape"),
        (lambda self, data: self.advance(1.0), TypeError, "must be a tensor, got float"),
        (lambda self, data: (None, None), RuntimeError, "exactly once; step ran 0 times"),
        (lambda self, data: self.advance(self.model(data[0]).mean()), TypeError, "must return .prediction, loss."),
        (lambda self, data: [self.advance(self.model(data[0]).mean()) for _ in "ab"], RuntimeError, "exactly once"),
    ],
)
def test_a_wrong_train_step(tmp_path, step, error, message):
    with Tiny(tiny_config(tmp_path)) as runner:
        runner.train_step = lambda data: step(runner, data)
        with pytest.raises(error, match=message):
            runner.train()


def test_a_runner_that_is_closed(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=1)) as runner:
        runner.train()
    for call, error in ((runner.train, RuntimeError), (runner.save_checkpoint, CheckpointError)):
        with pytest.raises(error, match="this runner is closed"):
            call()
    assert runner.evaluate()["val"]["loss"] > 0


def test_a_split_that_does_not_exist(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        for call in (runner.train_epoch, lambda split: runner.evaluate([split]), lambda split: runner.train([split])):
            with pytest.raises(ValueError, match="there is no split 'trian'; there are: train, val"):
                call("trian")


def test_a_score_split_that_is_not_evaluated(tmp_path):
    with Tiny(tiny_config(tmp_path, epochs=2, score_split="vla")) as runner:
        with pytest.warns(UserWarning, match=r"no score: no split 'vla' was evaluated \(train, val\)") as caught:
            runner.train()
    assert len(caught) == 1
    with Tiny(tiny_config(tmp_path)) as runner:  # who asks for no evaluation expects no score
        runner.train(evaluate_splits=[])


def test_a_row_that_names_no_split(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        for row in ({"loss": 1.0}, 3):
            with pytest.raises(TypeError, match=r"a row of results is \{split: \{metric: value\}\}, got"):
                runner.append_result(row, 1)
        assert not runner.results


def test_options_for_a_split_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="dataloader.trian: there is no split 'trian'"):
        Tiny(tiny_config(tmp_path, dataloader__trian={"batch_size": 2}))


def test_assigning_what_is_read_only_names_it(tmp_path):
    with Tiny(tiny_config(tmp_path)) as runner:
        with pytest.raises(AttributeError, match="global_step is read only"):
            runner.global_step = 3
        with pytest.raises(AttributeError, match="checkpoint_manager"):
            runner.checkpoint_manager = None


def test_a_hundred_skips_in_a_row(tmp_path):
    class Broken(Tiny):
        def train_step(self, data):
            loss = self.model(data[0]).sum() * float("nan")
            self.advance(loss)
            return None, None

    skips = []
    with Broken(tiny_config(tmp_path, skip_nonfinite_grad=True, steps=1, dataloader__batch_size=1)) as runner:
        runner.on("skip", lambda runner, event: skips.append(event.global_step))
        with pytest.raises(FloatingPointError, match="100 updates in a row were skipped"):
            runner.train()
    assert skips == [0] * 100 and runner.train_state.skipped == 100
