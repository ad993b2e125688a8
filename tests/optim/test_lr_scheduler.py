"""Schedules against an independent implementation of their formulas, and everything around them."""

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danling.optim import SCHEDULERS, LRScheduler

STRATEGIES = ("linear", "cosine", "constant", "polynomial", "exponential", "inverse_sqrt", "wsd")


def make(*lrs, tensor=False):
    lrs = lrs or (1.0,)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": torch.tensor(lr) if tensor else lr} for lr in lrs]
    return torch.optim.SGD(groups, lr=1.0)


def oracle(steps, base, total, strategy, *, ratio=None, final=None, low=1e-9, warm=None, cool=None, method=None, **opt):
    """The rates at an array of steps, written as array formulas and one case distinction per rule."""
    if method is None:
        geometric = final is None and strategy not in ("polynomial", "wsd") or strategy == "exponential"
    else:
        geometric = method == "percentile"
    end = final if final is not None else base * (1e-3 if ratio is None else ratio)
    floor = min(low, end)
    if warm is None:
        warm = total // 20 if cool is None else min(total // 20, total - cool)
        if cool is None:
            cool = total // 5
    if cool is None:
        cool = min(total // 5, total - warm)
    s = np.minimum(np.asarray(steps, dtype=np.float64), total)
    p = s / total
    if strategy == "inverse_sqrt":
        scale = opt.get("timescale") or warm or max(1, total // 20)
        y = np.maximum(end, base * np.sqrt(scale / np.maximum(s, scale)))
    else:
        if strategy == "wsd":
            q = np.clip((s - (total - cool)) / max(cool, 1), 0, 1)
            r = {"linear": q, "cosine": 0.5 - 0.5 * np.cos(np.pi * q), "sqrt": q**0.5}[opt.get("decay", "linear")]
        else:
            r = {
                "linear": p,
                "exponential": p,
                "cosine": 0.5 - 0.5 * np.cos(np.pi * p),
                "constant": 0 * p,
                "polynomial": 1 - (1 - p) ** opt.get("power", 2.0),
            }[strategy]
        y = np.exp(np.log(base) + r * (np.log(end) - np.log(base))) if geometric else r * end + (1 - r) * base
    if warm:
        y = np.where(s < warm, floor + s / warm * (y - floor), y)
    if cool and strategy != "wsd":
        y = np.where(s > total - cool, floor + np.clip((total - s) / cool, 0, None) * (y - floor), y)
    return np.maximum(floor, y)


def walk(scheduler, count):
    """The rates that an optimizer would use at steps 1 to `count`."""
    rates = []
    for _ in range(count):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.step()
    return rates


# The table of rates that the documentation gives, computed by hand from the formulas.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"final_lr": 0.2, "min_lr": 0, "warmup_steps": 2, "cooldown_steps": 2},
            [0.45, 0.8, 0.7, 0.6, 0.5, 0.4, 0.15, 0],
        ),
        (
            {"final_lr": 0.2, "min_lr": 0, "warmup_steps": 2, "cooldown_steps": 0},
            [0.45, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
        ),
        ({"final_lr_ratio": 1 / 256, "warmup_steps": 0, "cooldown_steps": 0}, [2.0**-k for k in range(1, 9)]),
    ],
)
def test_eight_steps_of_a_linear_schedule(arguments, expected):
    rates = walk(LRScheduler(make(), 8, strategy="linear", **arguments), 8)
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-15)


def test_ten_default_steps():
    expected = [0.844471, 0.517042, 0.240812, 0.0919444, 0.0316228, 0.0108761, 0.00415262, 0.00193408, 0.000592087]
    rates = [rate for (rate,) in walk(LRScheduler(make(), 10), 10)]
    assert rates[:9] == pytest.approx(expected, rel=5e-6)
    assert rates[9] == 1e-9


LENGTHS = [(None, None), (0, 0), (1, 0), (0, 1), (3, 2), (None, 0), (0, None), (5, None)]
FINALS = [{}, {"final_lr_ratio": 0.1}, {"final_lr": 0.02}, {"final_lr": 3.0}, {"final_lr_ratio": 2.0}]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", [None, "percentile", "numerical"])
@pytest.mark.parametrize(("warm", "cool"), LENGTHS)
def test_every_step_follows_the_formulas(strategy, method, warm, cool):
    if method and (strategy == "inverse_sqrt" or (strategy, method) == ("exponential", "numerical")):
        pytest.skip("contradiction, tested below")
    for total in range(1, 101):
        if (warm or 0) + (cool or 0) > total:
            continue
        final = FINALS[total % len(FINALS)]
        scheduler = LRScheduler(
            make(0.5, 1.0), total, strategy=strategy, method=method, warmup_steps=warm, cooldown_steps=cool, **final
        )
        steps = range(1, total + 4)
        found = np.array([scheduler.lr_at(step) for step in steps])
        for column, base in enumerate((0.5, 1.0)):
            ends = {"ratio": final.get("final_lr_ratio"), "final": final.get("final_lr")}
            expected = oracle(steps, base, total, strategy, warm=warm, cool=cool, method=method, **ends)
            np.testing.assert_allclose(found[:, column], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("polynomial", {"power": 1.0}),
        ("polynomial", {"power": 0.5}),
        ("inverse_sqrt", {"timescale": 7}),
        ("wsd", {"decay": "cosine"}),
        ("wsd", {"decay": "sqrt"}),
        ("wsd", {"decay": "linear"}),
    ],
)
def test_options_follow_the_formulas(strategy, options):
    scheduler = LRScheduler(make(), 50, strategy=strategy, final_lr=0.1, **options)
    expected = oracle(range(1, 51), 1.0, 50, strategy, final=0.1, **options)
    np.testing.assert_allclose([rate for (rate,) in walk(scheduler, 50)], expected, rtol=1e-12)


def test_first_and_last_step():
    warm = LRScheduler(make(2.0), 100, warmup_steps=10, cooldown_steps=0, min_lr=0)
    curve = LRScheduler(make(2.0), 100, warmup_steps=0, cooldown_steps=0)
    assert warm.lr_at(1)[0] == pytest.approx(curve.lr_at(1)[0] / 10)
    assert LRScheduler(make(2.0), 100, warmup_steps=1, cooldown_steps=0).lr_at(1) == curve.lr_at(1)
    assert curve.lr_at(100) == [2.0 * 1e-3]
    assert LRScheduler(make(2.0), 100, final_lr=0.3, cooldown_steps=0).lr_at(100) == [0.3]
    assert LRScheduler(make(2.0), 100, cooldown_steps=7, min_lr=1e-5).lr_at(100) == [1e-5]
    assert LRScheduler(make(2.0), 100, final_lr=0.25, strategy="wsd").lr_at(100) == [0.25]


def test_the_last_value_is_held_with_one_warning():
    optimizer = make()
    scheduler = LRScheduler(optimizer, 4, final_lr=0.5, cooldown_steps=0)
    for _ in range(4):  # a loop of exactly total_steps updates is silent
        scheduler.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(caught) == 1
    assert "4 steps" in str(caught[0].message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": -5}, "total_steps=-5"),
        ({"total_steps": 2.5}, "total_steps=2.5"),
        ({"final_lr": 0.1, "final_lr_ratio": 0.1}, "keep one"),
        ({"final_lr": -0.1}, "final_lr=-0.1"),
        ({"final_lr": math.inf}, "final_lr=inf"),
        ({"final_lr_ratio": math.nan}, "final_lr_ratio=nan"),
        ({"min_lr": -1e-9}, "min_lr=-1e-09"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"cooldown_steps": -1}, "cooldown_steps=-1"),
        ({"warmup_steps": 6, "cooldown_steps": 5}, "more than total_steps=10"),
        ({"warmup_steps": 11}, "warmup_steps=11 is more than total_steps=10"),
        ({"strategy": "cosin"}, "nearest names are cosine"),
        ({"strategy": "step"}, "unknown"),
        ({"strategy": "plot"}, "unknown"),
        ({"strategy": "strategies"}, "unknown"),
        ({"method": "percentil"}, "percentile"),
        ({"scaling": "percentil"}, "percentile"),
        ({"final_lr": 0, "method": "percentile"}, 'method="numerical"'),
        ({"final_lr_ratio": 0}, 'method="numerical"'),
        ({"strategy": "exponential", "method": "numerical"}, "geometric"),
        ({"strategy": "inverse_sqrt", "method": "numerical"}, "curve of its own"),
        ({"strategy": "linear", "method": "cosine"}, "two different curves"),
        ({"strategy": "cosine", "method": "linear"}, "two different curves"),
        ({"method": "percentile", "scaling": "numerical"}, "two different values"),
        ({"strategy": "wsd", "decay": "exponential"}, "decay='exponential'"),
        ({"strategy": "polynomial", "power": -1}, "power=-1"),
        ({"strategy": "inverse_sqrt", "timescale": 0}, "timescale=0"),
        ({"last_epoch": -2}, "last_epoch=-2"),
        ({"last_epoch": 3}, "initial_lr"),
    ],
)
def test_contradictions_are_errors(arguments, message):
    with pytest.raises(ValueError) as caught:
        LRScheduler(make(), **{"total_steps": 10, **arguments})
    assert message in str(caught.value)


def test_unknown_options_list_the_accepted_ones():
    with pytest.raises(TypeError, match="no option 'gama'"):
        LRScheduler(make(), 10, gama=0.1)
    with pytest.raises(TypeError, match="accepted are power"):
        LRScheduler(make(), 10, strategy="polynomial", powr=3)
    with pytest.raises(TypeError, match="Optimizer"):
        LRScheduler([torch.zeros(1)], 10)


def test_names_of_older_code_are_understood():
    for old, new in (
        ({"method": "linear"}, {"strategy": "linear"}),
        ({"method": "linear", "scaling": "numerical"}, {"strategy": "linear", "method": "numerical"}),
        ({"strategy": "cosine", "method": "Cosine"}, {"strategy": "cosine"}),
        ({"method": "percentile", "scaling": "percentile"}, {"method": "percentile"}),
        ({"strategy": "Inverse-Sqrt"}, {"strategy": "inverse_sqrt"}),
    ):
        a, b = LRScheduler(make(), 40, **old), LRScheduler(make(), 40, **new)
        assert (a.strategy, a.interpolation) == (b.strategy, b.interpolation)
        assert walk(a, 40) == walk(b, 40)


def test_given_lengths_win_and_defaults_shrink():
    scheduler = LRScheduler(make(), 100, warmup_steps=90)
    assert (scheduler.warmup_steps, scheduler.cooldown_steps) == (90, 10)
    scheduler = LRScheduler(make(), 100, cooldown_steps=98)
    assert (scheduler.warmup_steps, scheduler.cooldown_steps) == (2, 98)
    scheduler = LRScheduler(make(), 100)
    assert (scheduler.warmup_steps, scheduler.cooldown_steps) == (5, 20)


def test_a_group_with_rate_zero_stays_there():
    for arguments in ({}, {"final_lr": 0.1}, {"strategy": "inverse_sqrt"}, {"strategy": "wsd"}):
        rates = walk(LRScheduler(make(0.0, 1.0), 10, **arguments), 10)
        assert all(rate[0] == 0 for rate in rates)
        assert any(rate[1] > 0.1 for rate in rates)


def test_get_lr_and_lr_at_change_nothing():
    optimizer = make(0.1, 0.2)
    scheduler = LRScheduler(optimizer, 20)
    scheduler.step()
    assert scheduler.get_lr() == scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    before = scheduler.state_dict()
    scheduler.lr_at(15)
    assert scheduler.state_dict() == before
    assert scheduler.lr_at(2) == scheduler.get_lr()
    with pytest.raises(ValueError, match="count from 1"):
        scheduler.lr_at(0)


def test_step_to_a_position():
    a, b = LRScheduler(make(), 30), LRScheduler(make(), 30)
    for _ in range(7):
        a.step()
    b.step(7)
    assert a.get_last_lr() == b.get_last_lr()
    b.step(2)
    assert b.get_last_lr() == b.lr_at(3)


def test_tensor_rates_are_written_in_place():
    optimizer = make(0.5, tensor=True)
    rate = optimizer.param_groups[0]["lr"]
    scheduler = LRScheduler(optimizer, 10)
    for step in range(1, 11):
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(scheduler.lr_at(step)[0], rel=1e-6)
        scheduler.step()


def test_writing_a_tensor_rate_reads_nothing_from_the_device():
    optimizer = make(0.5, tensor=True)
    scheduler = LRScheduler(optimizer, 10)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")  # a meta tensor cannot be read at all
    scheduler.step()


def test_groups_that_are_added_later_join():
    optimizer = make(1.0)
    scheduler = LRScheduler(optimizer, 10)
    scheduler.step()
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.5})
    scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(first / 2)


# Strategies of subclasses


class Stairs(LRScheduler):
    def stairs(self, progress: float, *, n: int = 4) -> float:
        return min(int(progress * n), n - 1) / (n - 1)


class Deeper(Stairs):
    def broken(self, progress: float) -> float:
        return 1.5 if progress > 0.5 else 0.0

    def undefined(self, progress: float) -> float:
        return math.nan

    def linear(self, progress: float) -> float:
        return 0.0


def test_a_subclass_adds_a_strategy_in_one_method():
    arguments = {"final_lr": 0.1, "warmup_steps": 0, "cooldown_steps": 0}
    for kind in (Stairs, Deeper):  # found anywhere in the hierarchy
        scheduler = kind(make(), 8, strategy="STAIRS", n=2, **arguments)
        assert [rate for (rate,) in walk(scheduler, 8)] == [1.0] * 3 + [0.1] * 5
    again = Stairs(make(), 3)
    again.load_state_dict(scheduler.state_dict())
    assert again.lr_at(5) == [0.1]
    with pytest.raises(TypeError, match="'stairs' has no option 'm'; accepted are .*, n,"):
        Stairs(make(), 8, strategy="stairs", m=3)
    with pytest.raises(ValueError, match="stairs"):
        LRScheduler(make(), 8, strategy="stairs")
    assert Deeper(make(), 8, strategy="linear", **arguments).lr_at(8) == [1.0]


def test_a_ratio_outside_its_range_names_the_progress():
    scheduler = Deeper(make(), 8, strategy="broken")
    with pytest.raises(ValueError, match=r"1\.5 at progress p=0\.625"):
        scheduler.lr_at(5)
    with pytest.raises(ValueError, match="nan at progress"):
        Deeper(make(), 8, strategy="undefined")


# State


def arguments_of_a_schedule():
    def build(total, warm, cool, strategy, final, low):
        warm = int(warm * total)
        cool = int(cool * (total - warm))
        return {
            "total_steps": total,
            "warmup_steps": warm,
            "cooldown_steps": cool,
            "strategy": strategy,
            "min_lr": low,
            **final,
        }

    share = st.floats(0, 1)
    final = st.one_of(
        st.just({}),
        st.floats(1e-6, 4).map(lambda value: {"final_lr_ratio": value}),
        st.floats(1e-12, 4).map(lambda value: {"final_lr": value}),
    )
    return st.builds(build, st.integers(1, 200), share, share, st.sampled_from(STRATEGIES), final, st.floats(0, 1e-2))


@given(arguments_of_a_schedule(), st.floats(1e-9, 10))
def test_rates_stay_between_floor_and_the_larger_end(arguments, base):
    scheduler = LRScheduler(make(base), **arguments)
    if "final_lr" in arguments:
        final = arguments["final_lr"]
    else:
        final = base * arguments.get("final_lr_ratio", 1e-3)
    floor = min(arguments["min_lr"], final)
    for step in range(1, arguments["total_steps"] + 3):
        assert floor <= scheduler.lr_at(step)[0] <= max(base, final)


@given(arguments_of_a_schedule(), st.floats(0, 1), st.booleans())
def test_resuming_anywhere_gives_the_same_bits(arguments, share, optimizer_first):
    total = arguments["total_steps"]
    expected = walk(LRScheduler(make(0.3, 0.7), **arguments), total)
    position = int(share * (total - 1))
    first = LRScheduler(make(0.3, 0.7), **arguments)
    found = walk(first, position)
    states = [first.optimizer.state_dict(), first.state_dict()]
    states = torch.load(io.BytesIO(_saved(states)), weights_only=True)
    second = LRScheduler(make(5.0, 9.0), 7)  # everything else is restored, too
    loads = [lambda: second.optimizer.load_state_dict(states[0]), lambda: second.load_state_dict(states[1])]
    for loading in loads if optimizer_first else reversed(loads):
        loading()
    assert found + walk(second, total - position) == expected


def _saved(obj):
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


@given(st.integers(2, 40), st.floats(0, 1))
def test_resuming_inside_a_sequence_gives_the_same_bits(total, share):
    def sequence():
        optimizer = make(0.3, 0.7)
        first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, LRScheduler(optimizer, total)], [3])

    def run(scheduler, count):
        rates = []
        for _ in range(count):
            scheduler.optimizer.step()
            rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
            scheduler.step()
        return rates

    expected = run(sequence(), 3 + total)
    plain = LRScheduler(make(0.3, 0.7), total)
    assert expected[3:] == [plain.lr_at(step) for step in range(1, total + 1)]
    first = sequence()
    position = int(share * (total + 2))
    found = run(first, position)
    second = sequence()
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert found + run(second, 3 + total - position) == expected


def test_a_schedule_that_follows_in_a_sequence_starts_at_its_first_step():
    optimizer = make()
    schedules = [LRScheduler(optimizer, 4, strategy="linear"), LRScheduler(optimizer, 6)]
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [4])
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        sequence.step()
    alone = LRScheduler(make(), 4, strategy="linear"), LRScheduler(make(), 6)
    assert rates == [alone[0].lr_at(s)[0] for s in range(1, 5)] + [alone[1].lr_at(s)[0] for s in range(1, 7)]


def test_last_epoch_continues_from_the_optimizer():
    first = LRScheduler(make(), 20)
    expected = walk(first, 20)
    second = LRScheduler(make(), 20)
    walk(second, 7)
    third = LRScheduler(second.optimizer, 20, last_epoch=second.last_epoch - 1)
    assert walk(third, 13) == expected[7:]


def test_state_is_plain_and_complete():
    scheduler = LRScheduler(make(), 10, strategy="polynomial", power=3.0)
    state = scheduler.state_dict()
    assert eval(repr(state), {}) == state
    with pytest.raises(ValueError, match="no state"):
        scheduler.load_state_dict({"last_epoch": 3})
    with pytest.raises(ValueError, match="1 parameter groups, but the optimizer has 2"):
        LRScheduler(make(1.0, 2.0), 10).load_state_dict(state)
    other = Stairs(make(), 12, strategy="stairs").state_dict()
    with pytest.raises(ValueError, match="stairs"):
        scheduler.load_state_dict(other)
    assert scheduler.state_dict() == state


def test_a_longer_budget_keeps_the_position():
    optimizer = make()
    scheduler = LRScheduler(optimizer, 100)
    walk(scheduler, 100)
    scheduler.set_total_steps(200)
    longer = LRScheduler(make(), 200)
    assert [optimizer.param_groups[0]["lr"]] == longer.lr_at(101)
    assert (scheduler.warmup_steps, scheduler.cooldown_steps) == (10, 40)
    scheduler.step()
    assert scheduler.get_last_lr() == longer.lr_at(102)
    given_lengths = LRScheduler(make(), 100, warmup_steps=30, cooldown_steps=30)
    before = given_lengths.state_dict()
    with pytest.raises(ValueError, match="more than total_steps=50"):
        given_lengths.set_total_steps(50)
    with pytest.raises(ValueError, match="total_steps=0"):
        given_lengths.set_total_steps(0)
    assert given_lengths.state_dict() == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_copies_are_independent(duplicate):
    scheduler = LRScheduler(make(), 30, strategy="wsd")
    walk(scheduler, 5)
    other = duplicate(scheduler)
    assert other.optimizer is not scheduler.optimizer
    assert walk(other, 10) == walk(scheduler, 10)


# Drawing


def test_plot_draws_all_groups_without_pyplot():
    pytest.importorskip("matplotlib")
    scheduler = LRScheduler(make(0.1, 0.2), 12)
    figure = scheduler.plot()
    lines = figure.axes[0].lines
    assert len(lines) == 2
    assert list(lines[0].get_xdata()) == list(range(1, 13))
    assert list(lines[1].get_ydata()) == [scheduler.lr_at(step)[1] for step in range(1, 13)]
    assert scheduler.plot(figure.axes[0]) is figure
    figure.savefig(io.BytesIO())
    long = LRScheduler(make(), 1_000_000).plot().axes[0].lines[0].get_xdata()
    assert (long[0], long[-1], len(long)) == (1, 1_000_000, 4096)


def test_pyplot_is_not_imported():
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch; from danling.optim import LRScheduler;"
        "LRScheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 5).plot();"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_a_scheduler_by_name(strategy):
    by_name = SCHEDULERS.build(make(), type=strategy, total_steps=25, final_lr=0.1)
    assert type(by_name) is LRScheduler
    assert by_name.strategy == strategy
    assert walk(by_name, 25) == walk(LRScheduler(make(), 25, strategy=strategy, final_lr=0.1), 25)
