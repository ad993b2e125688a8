"""Which layouts may go on from a checkpoint in full."""

from __future__ import annotations

import logging

import pytest

from danling.backends.parallel import AXES, ParallelTopology
from danling.backends.parallel.checkpoints import Checkpoints
from danling.runners import CheckpointError, ResumeError


class Rest:
    def _check_resumable(self, payload):
        pass


class Reader(Checkpoints, Rest):
    stack = "parallel"
    logger = logging.getLogger("test")

    def __init__(self, **axes):
        world = 1
        for degree in axes.values():
            world *= degree
        self.topology = ParallelTopology(axes, world)


def manifest(kind="full", **axes):
    return {"manifest": {"stack": "parallel", "kind": kind, "axes": {**dict.fromkeys(AXES, 1), **axes}}}


@pytest.mark.parametrize("axis", ["replicate", "shard", "context"])
def test_data_axes_may_change(axis, caplog):
    with caplog.at_level(logging.INFO):
        Reader(shard=2, tensor=2)._check_resumable(manifest(**{axis: 4, "tensor": 2}))
    assert f"{axis}=4 × tensor=2 to shard=2 × tensor=2" in caplog.text


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "expert_tensor"])
def test_axes_that_split_the_model_may_not(axis):
    with pytest.raises(ResumeError, match=rf"{axis}=2.*shard=2.*degrees of {axis}.*pretrained"):
        Reader(shard=2)._check_resumable(manifest(**{axis: 2}))
    Reader(shard=2)._check_resumable(manifest("seed", **{axis: 2}))


@pytest.mark.parametrize("axes", [None, {}, {"shard": 2}, {**dict.fromkeys(AXES, 1), "shard": 0}, [1]], ids=str)
def test_a_checkpoint_without_its_layout(axes):
    payload = {"path": "runs/x", "manifest": {"stack": "parallel", "kind": "full", "axes": axes}}
    with pytest.raises(CheckpointError, match="runs/x does not say over which axes"):
        Reader(shard=2)._check_resumable(payload)


def test_mappings_have_no_layout():
    Reader(shard=2)._check_resumable({"record": {}})
