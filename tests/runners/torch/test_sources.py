"""Every way to name what a run goes on from."""

from __future__ import annotations

import shutil

import pytest

from danling.runners import CheckpointNotFoundError
from support.tiny import Tiny, final_state, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    with Tiny(tiny_config(root, epochs=2)) as runner:
        runner.train()
    return root, runner.dir.relative_to(root), final_state(runner)


SOURCES = {
    "alias": "latest",
    "name": "epoch-2",
    "alias path": "{run}/checkpoints/latest",
    "pointer": "{run}/checkpoints/latest.pointer",
    "checkpoint": "{run}/checkpoints/epoch-2",
    "checkpoints": "{run}/checkpoints",
    "run": "{run}",
}


@pytest.mark.parametrize("source", SOURCES)
def test_resume_in_place(trained, tmp_path, source):
    root, directory, state = trained
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    run = tmp_path / "copy" / directory
    with Tiny(tiny_config(tmp_path / "copy", epochs=3, resume=SOURCES[source].format(run=run))) as runner:
        assert runner.epoch == 2 and final_state(runner)["model"] == state["model"]
        runner.train()
    assert runner.epoch == 3 and runner.checkpoint_manager.newest() == run / "checkpoints" / "epoch-3"
    assert [path.name for path in run.parent.iterdir()] == [run.name]  # nothing was set aside


@pytest.mark.parametrize("source", [name for name in SOURCES if "{run}" in SOURCES[name]])
def test_resume_from_elsewhere(trained, tmp_path, source):
    root, directory, state = trained
    config = tiny_config(tmp_path, epochs=2, resume=SOURCES[source].format(run=root / directory))
    with Tiny(config) as runner:
        assert runner.epoch == 2 and final_state(runner)["model"] == state["model"]
        assert runner.dir.is_relative_to(tmp_path)


@pytest.mark.parametrize("source", ["best-ever", "{run}/checkpoints/epoch-9", "{run}/checkpoints/epoch-9.pointer"])
def test_a_source_that_is_not_there(trained, tmp_path, source):
    root, directory, _ = trained
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
        Tiny(tiny_config(tmp_path, resume=source.format(run=root / directory)))


def test_resume_from_a_mapping(trained, tmp_path):
    root, directory, state = trained
    with Tiny(tiny_config(tmp_path, epochs=2)) as runner:
        payload = runner.read_checkpoint(root / directory)
        runner.load_checkpoint(payload)
        assert runner.epoch == 2 and final_state(runner)["model"] == state["model"]
