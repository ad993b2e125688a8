"""Guarantee 9: a file that would run code when it is read runs none, wherever it stands."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from danling.runners import CheckpointError
from danling.runners.manifest import MANIFEST, describe_files, read_manifest, walk, write_manifest
from support.tiny import Tiny, tiny_config

OPTIONS = {"epochs": 1, "ema__enabled": True}


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sign(checkpoint: Path) -> None:
    """Write a manifest that vouches for the files as they are now."""
    header = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "format_version")}
    write_manifest(checkpoint, header, describe_files(checkpoint, walk(checkpoint)))


@pytest.fixture
def checkpoint(tmp_path):
    with Tiny(tiny_config(tmp_path / "victim", **OPTIONS)) as runner:
        runner.train()
        return runner.checkpoint_dir / "epoch-1"


@pytest.mark.parametrize("name", ["model.pt", "ema.pt", "optimizer.pt", "ranks/rank-00000.pt"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))], ids=["zip", "pickle"]
)
def test_a_checkpoint(checkpoint, tmp_path, name, write):
    owned = tmp_path / "owned"
    write({"0.weight": Attack(owned)}, checkpoint / name)
    sign(checkpoint)
    for option in ("resume", "pretrained"):
        if option == "pretrained" and name not in ("ema.pt",):
            continue  # weights come from the average alone
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Tiny(tiny_config(tmp_path / option, **{**OPTIONS, option: str(checkpoint)}))
    assert not owned.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_weights(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"0.weight": Attack(tmp_path / "owned")}}, path)
    with pytest.raises(CheckpointError, match=f"weights\\{suffix}"):
        Tiny(tiny_config(tmp_path / "run", pretrained=str(path)))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["runner.yaml", "runner.json", MANIFEST])
def test_text_files(checkpoint, tmp_path, name):
    owned = tmp_path / "owned"
    (checkpoint / name).write_text(f"!!python/object/apply:os.mkdir ['{owned}']\n")
    if name != MANIFEST:
        sign(checkpoint)
    with pytest.raises(ValueError if name == "runner.yaml" else (CheckpointError, ValueError)):
        if name == "runner.yaml":
            Tiny.from_checkpoint(checkpoint)
        else:
            Tiny(tiny_config(tmp_path / "run", **{**OPTIONS, "resume": str(checkpoint)}))
    assert not owned.exists()
