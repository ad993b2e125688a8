"""An update through an Accelerator is the update of danling.optim, also with the gradient scaler of fp16."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from danling.backends.accelerate.step import AcceleratedStep
from danling.optim import OptimizerStep


@pytest.fixture
def accelerator():
    """An Accelerator in fp16, which does not scale gradients on a CPU by itself."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=64.0), True
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("clip_norm", [None, 0.5, float("inf")])
@pytest.mark.parametrize("clip_value", [None, 0.1])
def test_a_scaler_skips_and_counts_as_in_danling_optim(accelerator, clip_norm, clip_value):
    def parts():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    limits = {"clip_norm": clip_norm, "clip_value": clip_value, "skip_nonfinite": False, "interval": "step"}
    (ours, optimizer), (theirs, plain) = parts(), parts()
    optimizer = accelerator.prepare(optimizer)
    schedules = [torch.optim.lr_scheduler.StepLR(each, step_size=2) for each in (optimizer, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    update = AcceleratedStep(accelerator, optimizer, schedules[0], **limits)
    reference = OptimizerStep(plain, schedules[1], scaler=scaler, **limits)
    for index in range(6):
        x = torch.randn(4, 3, dtype=torch.float64) * (torch.inf if index in (2, 3) else 1.0)
        accelerator.backward(ours(x).square().mean())
        scaler.scale(theirs(x).square().mean()).backward()
        stepped, norm = update.step()
        expected, expected_norm = reference.step()
        assert stepped == expected == (index not in (2, 3))
        assert (norm is None) == (clip_norm is None)
        if stepped and norm is not None:
            assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-6)
        assert ours.weight.grad is None
        assert schedules[0].last_epoch == schedules[1].last_epoch
        assert accelerator.scaler.state_dict() == scaler.state_dict()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=0)
    assert scaler.get_scale() == 16.0 and schedules[0].last_epoch == 4
