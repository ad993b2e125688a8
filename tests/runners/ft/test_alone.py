"""One replica group alone, in this process; what is refused; position files."""

import importlib.util

import pytest
import torch

from danling.backends.torch.positions import Positions
from danling.runners import CheckpointError, ConfigError
from support.tiny import Tiny, final_state, tiny_config

torchft = pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")


@pytest.fixture(scope="module")
def lighthouse():
    """A lighthouse in this process."""
    from torchft._torchft import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=2000, quorum_tick_ms=20)
    yield server.address()
    server.shutdown()


def config(root, **overrides):
    options = {"ft__enabled": True, "ft__process_group_timeout_ms": 20000, "auto_resume": True, "stack": "torch"}
    return tiny_config(root, **{**options, **overrides})


@torchft
def test_one_group_alone_trains_as_without_groups(tmp_path, lighthouse, monkeypatch):
    """And goes on from its checkpoint, where its position file says."""
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", lighthouse)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    options = {"steps": 9, "accum_steps": 2, "checkpoint__interval": "2 steps", "tiny__dropout": 0.0}
    with Tiny(tiny_config(tmp_path / "plain", **options)) as runner:
        runner.train()
        plain = final_state(runner)
    options |= {"checkpoint__enable_ft_dataloader_checkpoints": True, "checkpoint__keep_latest_k": 2}
    with Tiny(config(tmp_path / "groups", **options)) as runner:
        assert runner.ft is not None and runner.replica_groups == 1
        runner.on("step", lambda runner, event: event.global_step == 5 and runner.request_stop("test"))
        runner.train()
    names = {path.name for path in (runner.checkpoint_dir / "dataloader-replica-0").iterdir()}
    assert names == {info.name for info in runner.checkpoint_manager.list()} and "step-5" in names
    with Tiny(config(tmp_path / "groups", **options)) as again:
        assert again.global_step == 5
        again.train()
        found = final_state(again)
    for name in ("model", "results", "train", "optimizer"):
        assert found[name] == plain[name], name
    assert runner.seen + again.seen


@torchft
def test_a_position_that_cannot_be_written_fails_the_save(tmp_path, lighthouse, monkeypatch):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", lighthouse)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    options = {"steps": 3, "eval_interval": 0, "checkpoint__interval": "2 steps"}
    options |= {"checkpoint__enable_ft_dataloader_checkpoints": True}
    options |= {"checkpoint__ft_replica_id": "seven", "checkpoint__ft_dataloader_checkpoint_prefix": "where"}
    with pytest.raises(CheckpointError, match="step-3 could not be saved"):
        with Tiny(config(tmp_path, **options)) as runner:
            runner.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            (runner.checkpoint_dir / "where-seven").write_text("in the way")
            runner.train()
    assert runner.checkpoint_manager.health["failures"] == 2
    assert runner.checkpoint_manager.list() == []


def test_what_is_missing_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "torchft" else find(name, *a))
    with pytest.raises(RuntimeError, match="TORCHFT_LIGHTHOUSE.*for every replica group"):
        Tiny(config(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchft" else find(name, *a))
    with pytest.raises(ImportError, match="pip install torchft-nightly"):
        Tiny(config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_not_set_aside(tmp_path, monkeypatch):
    with Tiny(tiny_config(tmp_path, epochs=1, stack="torch")) as runner:
        runner.train()
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://localhost:1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "torchft" else find(name, *a))
    with pytest.raises(ConfigError, match="auto_resume: False, but .* holds checkpoints"):
        Tiny(config(tmp_path, epochs=1, auto_resume=False))
    assert runner.checkpoint_dir.exists()


def test_position_files(tmp_path):
    positions = Positions(tmp_path / "group", 1)
    assert positions.newest() is None and positions.names() == []
    for step in (2, 10, 4):
        positions.write(f"step-{step}", {"global_step": step, "rng": {"torch": torch.arange(step)}})
    assert positions.names() == ["step-2", "step-4", "step-10"]
    assert positions.newest()["rng"]["torch"].equal(torch.arange(10))
    assert positions.read("step-4")["global_step"] == 4 and positions.read("step-5") is None
    assert Positions(tmp_path / "group", 0).names() == []
    positions.retain(1, {"step-2"})
    assert positions.names() == ["step-2", "step-10"]
    positions.retain(0, set())
    assert positions.names() == ["step-2", "step-10"]
    assert sorted(path.name for path in (tmp_path / "group").iterdir()) == ["step-10", "step-2"]
