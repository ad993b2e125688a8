"""The step of the weights: its order, its norms, its verdicts, and how often it makes the host wait."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from danling.optim import LRScheduler, OptimizerContainer, OptimizerStep


def model_with_gradients(seed=0, dtype=torch.float32, scale=1.0, shapes=((4, 3), (3,), (2, 5), ())):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(dtype)
    return params


def snapshot(params):
    return [param.detach().clone() for param in params]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading an element, or a result of data-dependent size."""

    BLOCKING = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.BLOCKING
        return function(*args, **(kwargs or {}))


# Plain updates


def test_without_options_it_is_the_optimizer():
    mine, theirs = model_with_gradients(), model_with_gradients()
    result = OptimizerStep(torch.optim.AdamW(mine)).step()
    torch.optim.AdamW(theirs).step()
    assert result.stepped is True
    assert result.grad_norm is None
    assert all(map(torch.equal, mine, theirs))
    assert all(param.grad is None for param in mine)


def test_gradients_can_be_kept():
    params = model_with_gradients()
    OptimizerStep(torch.optim.SGD(params, lr=0.1)).step(zero_grad=False)
    assert all(param.grad is not None for param in params)
    update = OptimizerStep(torch.optim.SGD(params, lr=0.1))
    update.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in params)
    update.zero_grad()
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("scale", [0.25, 3, torch.tensor(0.25), torch.tensor(0.125, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_scaled_before_everything(scale, dtype):
    params = model_with_gradients(dtype=dtype)
    grads = [param.grad.clone() for param in params]
    result = OptimizerStep(torch.optim.SGD(params, lr=0.1), clip_norm=math.inf).step(grad_scale=scale, zero_grad=False)
    for param, grad in zip(params, grads, strict=True):
        assert torch.equal(param.grad, grad * float(scale))
    expected = torch.cat([param.grad.flatten().double() for param in params]).norm()
    torch.testing.assert_close(result.grad_norm.double(), expected, rtol=1e-5, atol=0)


def test_a_scale_of_one_touches_nothing():
    params = model_with_gradients()
    versions = [param.grad._version for param in params]
    update = OptimizerStep(torch.optim.SGD(params, lr=0.1))
    for one in (1, 1.0):
        update.step(grad_scale=one, zero_grad=False)
    assert [param.grad._version for param in params] == versions


# Clipping


@pytest.mark.parametrize("norm_type", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
def test_clipping_by_norm_is_torchs(norm_type, limit):
    mine, theirs = model_with_gradients(), model_with_gradients()
    update = OptimizerStep(torch.optim.SGD(mine, lr=0.1), clip_norm=limit, norm_type=norm_type)
    result = update.step(zero_grad=False)
    norm = nn.utils.clip_grad_norm_(theirs, limit, norm_type)
    assert (result.grad_norm.dtype, result.grad_norm.ndim) == (torch.float32, 0)
    torch.testing.assert_close(result.grad_norm, norm)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_by_value_precedes_clipping_by_norm():
    mine, theirs = model_with_gradients(), model_with_gradients()
    result = OptimizerStep(torch.optim.SGD(mine, lr=0.1), clip_value=0.3, clip_norm=0.5).step(zero_grad=False)
    nn.utils.clip_grad_value_(theirs, 0.3)
    norm = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(result.grad_norm, norm)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clip_gradients_alone_does_the_same():
    mine, theirs = model_with_gradients(), model_with_gradients()
    update = OptimizerStep(torch.optim.SGD(mine, lr=0.1), clip_value=0.3, clip_norm=0.5)
    norm = update.clip_gradients()
    nn.utils.clip_grad_value_(theirs, 0.3)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.5))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert OptimizerStep(torch.optim.SGD(mine, lr=0.1)).clip_gradients() is None


def test_an_infinite_limit_measures_and_touches_nothing():
    params = model_with_gradients()
    versions = [param.grad._version for param in params]
    expected = torch.cat([param.grad.flatten() for param in params]).norm()
    result = OptimizerStep(torch.optim.SGD(params, lr=0.0), clip_norm=math.inf).step(zero_grad=False)
    torch.testing.assert_close(result.grad_norm, expected)
    assert [param.grad._version for param in params] == versions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_finite_half_gradients_is_finite(dtype):
    param = nn.Parameter(torch.zeros(1000, dtype=dtype))
    param.grad = torch.full((1000,), 6e4, dtype=dtype)
    update = OptimizerStep(torch.optim.SGD([param], lr=1.0), clip_norm=1.0, skip_nonfinite=True)
    result = update.step(zero_grad=False)
    assert result.stepped
    assert result.grad_norm.item() == pytest.approx(
        float(param.grad.dtype.itemsize and 6e4) * math.sqrt(1000), rel=5e-3
    )
    assert param.grad.double().norm().item() == pytest.approx(1.0, rel=2e-2)


def test_mixed_dtypes_share_one_norm():
    half = model_with_gradients(0, torch.bfloat16)
    single = model_with_gradients(1)
    double = model_with_gradients(2, torch.float64)
    params = half + single + double
    expected = torch.cat([param.grad.double().flatten() for param in params]).norm()
    result = OptimizerStep(torch.optim.SGD(params, lr=0.1), clip_norm=1.0).step(zero_grad=False)
    assert result.grad_norm.dtype == torch.float32
    assert result.grad_norm.item() == pytest.approx(expected.item(), rel=1e-5)
    clipped = torch.cat([param.grad.double().flatten() for param in params]).norm()
    assert clipped.item() == pytest.approx(1.0, rel=1e-2)


def test_shared_missing_complex_empty_and_sparse_gradients():
    table = nn.Embedding(6, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    assert not table.weight.grad.is_coalesced()
    dense = table.weight.grad.to_dense()
    unused = nn.Parameter(torch.ones(3))
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.grad = torch.tensor([3 + 4j, 0])
    empty = nn.Parameter(torch.empty(0))
    empty.grad = torch.empty(0)
    params = [table.weight, unused, wave, empty]
    expected = math.sqrt(dense.square().sum().item() + 25)
    for order, norm in ((2.0, expected), (math.inf, 4.0)):
        update = OptimizerStep(torch.optim.SGD(params, lr=0.1), clip_norm=math.inf, norm_type=order)
        assert update.step(zero_grad=False).grad_norm.item() == pytest.approx(norm)
    update = OptimizerStep(torch.optim.SGD(params, lr=0.0), clip_norm=1.0)
    update.param_groups[0]["params"].append(table.weight)  # the same parameter twice counts once
    assert update.clip_gradients().item() == pytest.approx(expected)
    torch.testing.assert_close(table.weight.grad.to_dense(), dense / expected)
    torch.testing.assert_close(wave.grad, torch.tensor([3 + 4j, 0]) / expected)
    assert not update.has_nan_inf_grad()
    table.weight.grad._values()[0, 0] = math.nan
    assert update.has_nan_inf_grad()


def test_no_gradients_at_all():
    params = [nn.Parameter(torch.ones(2))]
    update = OptimizerStep(torch.optim.SGD(params, lr=0.1), clip_norm=1.0, clip_value=1.0, skip_nonfinite=True)
    result = update.step(grad_scale=0.5)
    assert (result.stepped, result.grad_norm.item()) == (True, 0.0)


def test_parameters_follow_the_groups_by_whichever_way():
    def clipped(update):
        for group in update.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        norm = update.clip_gradients().item()
        return round(norm**2)

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    update = OptimizerStep(optimizer, clip_norm=math.inf)
    assert clipped(update) == 1
    update.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert clipped(update) == 3
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.ones(4)))
    assert clipped(update) == 7
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(8))
    assert clipped(update) == 14
    optimizer.param_groups[:] = optimizer.param_groups[:1]
    assert clipped(update) == 8
    optimizer.load_state_dict(optimizer.state_dict())
    assert clipped(update) == 8


# Skipping


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}, {"clip_norm": 1.0, "clip_value": 1.0}]
)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_bad_gradient_changes_nothing_but_the_count(value, options, norm_type):
    params = model_with_gradients()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    schedule = LRScheduler(optimizer, 10)
    update = OptimizerStep(optimizer, schedule, skip_nonfinite=True, norm_type=norm_type, **options)
    assert update.step(zero_grad=False).stepped
    params[2].grad[1, 3] = value
    assert update.has_nan_inf_grad().item() is True
    weights, state = snapshot(params), copy.deepcopy(update.state_dict())
    result = update.step(zero_grad=False)
    assert result.stepped is False
    if "clip_norm" in options:
        assert not result.grad_norm.isfinite()
    else:
        assert result.grad_norm is None
    assert all(map(torch.equal, params, weights))
    assert all(param.grad is None for param in params)
    assert update.skipped == 1
    after = update.state_dict()
    assert after.pop("skipped") == state.pop("skipped") + 1
    assert after["scheduler"] == state["scheduler"]
    torch.testing.assert_close(after["optimizer"], state["optimizer"])
    fresh = model_with_gradients(3)
    for param, other in zip(params, fresh, strict=True):
        param.grad = other.grad
    assert update.step().stepped


def test_without_the_option_nothing_is_looked_at():
    params = model_with_gradients()
    params[0].grad[0, 0] = math.nan
    result = OptimizerStep(torch.optim.SGD(params, lr=0.1)).step()
    assert result.stepped
    assert params[0].isnan().any()


@given(st.integers(0, 3), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.booleans())
def test_the_fused_check_sees_every_element_and_keeps_the_others(position, dtype, bad):
    params = model_with_gradients(position, dtype)
    before = [param.grad.clone() for param in params]
    if bad:
        params[position].grad.view(-1)[-1] = math.inf
    update = OptimizerStep(torch.optim.SGD(params, lr=0.1))
    flag = update.has_nan_inf_grad()
    assert (flag.dtype, flag.ndim, bool(flag)) == (torch.bool, 0, bad)
    for param, grad in zip(params, before, strict=True):
        assert torch.equal(param.grad[param.grad.isfinite()], grad[param.grad.isfinite()])


# Schedulers


def test_the_scheduler_follows_steps_or_epochs():
    for interval, moved in ((None, 1), ("step", 1), ("epoch", 0)):
        optimizer = torch.optim.SGD(model_with_gradients(), lr=1.0)
        schedule = LRScheduler(optimizer, 10)
        update = OptimizerStep(optimizer, schedule, interval=interval)
        update.step()
        assert schedule.last_epoch == moved
        update.step_scheduler()
        assert schedule.last_epoch == moved + 1


def test_a_plateau_scheduler_wants_its_metric():
    params = model_with_gradients()
    optimizer = torch.optim.SGD(params, lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    update = OptimizerStep(optimizer, plateau)
    assert update.interval == "epoch"
    update.step()
    with pytest.raises(ValueError, match="metric"):
        update.step_scheduler()
    for metric in (1.0, 2.0):
        update.step_scheduler(metric)
    assert optimizer.param_groups[0]["lr"] == 0.5
    each = OptimizerStep(optimizer, plateau, interval="step")
    weights = snapshot(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="metric"):
        each.step()
    assert all(map(torch.equal, params, weights))  # told before anything moved
    each.step(metric=3.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    OptimizerStep(optimizer).step_scheduler()  # no scheduler, nothing to do


# Gradient scaler


def scaled_model(value=None):
    params = model_with_gradients(scale=64.0)
    if value is not None:
        params[1].grad[0] = value
    return params


def test_the_scaler_is_used_as_torch_uses_it():
    mine, theirs = scaled_model(), scaled_model()
    a = OptimizerStep(torch.optim.SGD(mine, lr=0.1), clip_norm=0.5, scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(theirs, lr=0.1)
    for value in (None, math.inf, None):
        for params in (mine, theirs):
            for param, other in zip(params, scaled_model(value), strict=True):
                param.grad = other.grad
        a.scaler.scale(torch.ones(()))  # makes the scale, as backward would
        scaler.scale(torch.ones(()))
        result = a.step()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert result.stepped == (value is None)
        assert all(map(torch.equal, mine, theirs))
        assert a.scaler.state_dict() == scaler.state_dict()
        if value is None:
            torch.testing.assert_close(result.grad_norm, norm)
        else:
            assert not result.grad_norm.isfinite()
    assert a.skipped == 1


def test_order_with_a_scaler():
    calls = []

    class Scaler(torch.amp.GradScaler):
        def unscale_(self, optimizer):
            calls.append("unscale")
            super().unscale_(optimizer)

        def update(self, new_scale=None):
            calls.append("update")
            super().update(new_scale)

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

        def zero_grad(self, set_to_none=True):
            calls.append("zero")
            super().zero_grad(set_to_none)

    class Schedule(LRScheduler):
        def step(self, epoch=None):
            calls.append("schedule")
            super().step(epoch)

    params = scaled_model()
    optimizer = Optimizer(params, lr=0.1)
    schedule = Schedule(optimizer, 10)
    update = OptimizerStep(optimizer, schedule, scaler=Scaler("cpu", init_scale=64.0), skip_nonfinite=True)
    update.scaler.scale(torch.ones(()))
    calls.clear()
    update.step()
    assert calls == ["unscale", "step", "schedule", "zero", "update"]
    for param, other in zip(params, scaled_model(math.nan), strict=True):
        param.grad = other.grad
    calls.clear()
    update.step()
    assert calls == ["unscale", "zero", "update"]


def test_a_scaler_without_gradients_and_a_disabled_one():
    param = nn.Parameter(torch.ones(2))
    update = OptimizerStep(torch.optim.SGD([param], lr=0.1), scaler=torch.amp.GradScaler("cpu"))
    update.scaler.scale(torch.ones(()))
    for _ in range(2):
        assert update.step().stepped
    update = OptimizerStep(torch.optim.SGD([param], lr=0.1), scaler=torch.amp.GradScaler("cpu", enabled=False))
    param.grad = torch.full((2,), math.inf)
    assert update.step().stepped


def test_the_common_verdict_reaches_the_scaler():
    params = scaled_model()
    update = OptimizerStep(
        torch.optim.SGD(params, lr=0.1),
        scaler=torch.amp.GradScaler("cpu", init_scale=64.0),
        reduce_flag=lambda flag: torch.ones_like(flag),  # another rank has a bad gradient
    )
    update.scaler.scale(torch.ones(()))
    assert update.step().stepped is False
    assert update.scaler.get_scale() == 32.0


# Host reads


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 1.0}, {"clip_value": 0.5}, {"clip_norm": 1.0, "clip_value": 0.5}]
)
def test_host_reads_per_update(scaler, skip, options):
    params = scaled_model()
    # The capturable implementation keeps its own counters on the device, so every read counted here is ours.
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=True)
    update = OptimizerStep(
        optimizer,
        LRScheduler(optimizer, 10),
        skip_nonfinite=skip,
        scaler=torch.amp.GradScaler("cpu", init_scale=64.0) if scaler else None,
        **options,
    )
    if scaler:
        update.scaler.scale(torch.ones(()))
    for expected in (True, False) if skip or scaler else (True,):
        if not expected:
            for param in params:
                param.grad = torch.full_like(param, math.nan)
        with HostReads() as reads:
            result = update.step(grad_scale=torch.tensor(0.5))
        assert result.stepped is expected
        assert reads.count == (1 if skip or scaler else 0)


def test_the_counter_counts():
    with HostReads() as reads:
        bool(torch.ones(3).isfinite().all())
        torch.ones(()).item()
    assert reads.count == 2
    update = OptimizerStep(torch.optim.SGD(model_with_gradients(), lr=0.1))
    with HostReads() as reads:
        update.has_nan_inf_grad()
    assert reads.count == 0


# Closures


def test_a_closures_gradients_are_scaled_and_clipped():
    target = torch.tensor([3.0, -2.0])

    def run(use):
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.LBFGS([param], lr=0.5, max_iter=5)

        def closure():
            optimizer.zero_grad()
            loss = ((param - target) ** 2).sum()
            loss.backward()
            return loss

        return use(optimizer, closure), param

    def mine(optimizer, closure):
        return OptimizerStep(optimizer, clip_norm=0.7).step(closure, grad_scale=0.5)

    def theirs(optimizer, closure):
        def clipped():
            loss = closure()
            for param in optimizer.param_groups[0]["params"]:
                param.grad.mul_(0.5)
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.7)
            return loss

        return optimizer.step(clipped)

    (result, a), (_, b) = run(mine), run(theirs)
    assert result.stepped
    assert result.grad_norm > 0
    torch.testing.assert_close(a, b)
    plain, _ = run(lambda optimizer, closure: OptimizerStep(optimizer).step(closure))
    assert plain == (True, None)


def test_a_closure_comes_too_late_for_a_verdict():
    params = model_with_gradients()
    for options in ({"skip_nonfinite": True}, {"scaler": torch.amp.GradScaler("cpu")}):
        with pytest.raises(ValueError, match="too late"):
            OptimizerStep(torch.optim.SGD(params, lr=0.1), **options).step(lambda: None)


# The object


def test_other_attributes_are_the_optimizers():
    optimizer = torch.optim.SGD(model_with_gradients(), lr=0.1, momentum=0.9)
    update = OptimizerStep(optimizer)
    assert update.param_groups is optimizer.param_groups
    assert update.state is optimizer.state
    assert update.defaults is optimizer.defaults
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = update.no_such_thing
    assert OptimizerContainer is OptimizerStep
    assert "SGD" in repr(update)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"interval": "batch"}, ValueError, "'batch'"),
        ({"clip_norm": 0}, ValueError, "clip_norm is 0"),
        ({"clip_value": -1}, ValueError, "clip_value is -1"),
        ({"clip_norm": math.nan}, ValueError, "clip_norm is nan"),
        ({"norm_type": 0}, ValueError, "norm_type is 0"),
        ({"scaler": object()}, TypeError, "GradScaler"),
    ],
)
def test_wrong_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        OptimizerStep(torch.optim.SGD(model_with_gradients(), lr=0.1), **options)


def build(seed=0):
    params = model_with_gradients(seed)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    scaler.scale(torch.ones(()))
    return OptimizerStep(optimizer, LRScheduler(optimizer, 20), scaler=scaler, clip_norm=1.0), params


def feed(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = 4 * torch.randn(param.shape, generator=generator)
    if step % 4 == 3:
        params[0].grad[0, 0] = math.inf


@given(st.integers(0, 11))
def test_saving_and_loading_continues_bit_by_bit(position):
    whole, expected = build()
    for step in range(12):
        feed(expected, step)
        whole.step()
    first, params = build()
    for step in range(position):
        feed(params, step)
        first.step()
    second, others = build(seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    for step in range(position, 12):
        feed(others, step)
        second.step()
    assert all(map(torch.equal, others, expected))
    assert second.skipped == whole.skipped == 3
    assert second.state_dict()["scheduler"] == whole.state_dict()["scheduler"]
    assert second.state_dict()["scaler"] == whole.state_dict()["scaler"]


def test_a_state_with_other_parts_is_refused():
    full, _ = build()
    bare = OptimizerStep(torch.optim.AdamW(model_with_gradients(), lr=0.3))
    with pytest.raises(ValueError, match="the state has a scheduler, but this OptimizerStep has none"):
        bare.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match="the state has no scheduler, but this OptimizerStep has one"):
        full.load_state_dict(bare.state_dict())
    assert bare.param_groups[0]["lr"] == 0.3


def test_several_containers_are_independent():
    (generator, a), (discriminator, b) = build(0), build(1)
    feed(a, 3)  # bad
    feed(b, 0)
    weights = snapshot(a)
    assert generator.step().stepped is False
    assert all(param.grad is not None for param in b)
    assert discriminator.step().stepped is True
    assert (generator.skipped, discriminator.skipped) == (1, 0)
    assert all(map(torch.equal, a, weights))
    assert generator.scaler.get_scale() == 2.0
    assert discriminator.scaler.get_scale() == 4.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_copies_work(duplicate):
    optimizer = torch.optim.AdamW(model_with_gradients(), lr=0.1)
    update = OptimizerStep(optimizer, LRScheduler(optimizer, 20), clip_norm=1.0)
    update.clip_gradients()
    other = duplicate(update)
    for group in (*update.param_groups, *other.param_groups):
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    update.step()
    other.step()
    for mine, theirs in zip(update.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert mine is not theirs
        assert torch.equal(mine, theirs)
