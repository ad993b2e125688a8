"""Guarantee 8: an axis that nothing synchronises is refused at the start, and what is replicated is equal everywhere."""

import json

import pytest

from danling.runners import ConfigError, StackError
from support.ranks import run_ranks
from support.tiny import Tiny, tiny_config

AXES = ["replicate", "shard", "context", "pipeline", "tensor", "expert", "expert_tensor"]


@pytest.mark.parametrize("stack", ["auto", "torch", "accelerate", "deepspeed"])
@pytest.mark.parametrize("axis", AXES)
def test_an_axis_that_the_stack_does_not_synchronise(tmp_path, axis, stack):
    if stack == "deepspeed":
        pytest.importorskip("deepspeed")
    for degree in (2, -1):
        with pytest.raises((ConfigError, StackError), match=rf"parallel\.axes\.{axis}.*parallel"):
            Tiny(tiny_config(tmp_path / "runs", stack=stack, **{f"parallel__axes__{axis}": degree}))
    assert not (tmp_path / "runs").exists()


SCRIPT = """
import json, os, sys, torch
sys.path.insert(0, {tests!r})
from support.tiny import Tiny, tiny_config

class Own(Tiny):
    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(100 + self.rank)  # every rank draws weights and buffers of its own
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
        self.set_seed()

def tensors(runner):
    found = {{}}
    for part, module in {{"model": runner.unwrap(runner.model), "ema": runner.ema}}.items():
        found |= {{f"{{part}}.{{name}}": value.tolist() for name, value in module.state_dict().items()}}
    return found

found = {{}}
for options in ({{}}, {{"accum_steps": 2}}):
    config = tiny_config(f"{{sys.argv[1]}}/{{len(found)}}", tiny__norm=True, ema__enabled=True, ema__decay=0.5, **options)
    with Own(config) as runner:
        start = tensors(runner)
        runner.train()
        found[str(options)] = [start, tensors(runner)]
json.dump(found, open(f"{{sys.argv[1]}}/rank{{runner.rank}}.json", "w"))
"""


def test_replicas_are_equal_at_the_start_and_after_training(request, tmp_path):
    script = SCRIPT.format(tests=str(request.config.rootpath / "tests"))
    run_ranks(script, 2, [str(tmp_path)], timeout=200)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for options, (start, end) in first.items():
        differing = [
            [name for name, value in mine.items() if value != theirs[name]]
            for mine, theirs in zip((start, end), second[options], strict=True)
        ]
        assert differing == [[], []], (options, differing)
        assert start["model.0.weight"] != end["model.0.weight"] and len(start) > 12
