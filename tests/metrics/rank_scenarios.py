"""What several ranks do together; `test_sync.py` starts this file once per rank and checks what it prints."""

from __future__ import annotations

import json
import sys
import traceback
import warnings

import torch
from torch import distributed as dist

import danling.metrics.functional as F
from danling.metrics import (
    AverageMeter,
    AverageMeters,
    GlobalMetrics,
    MetricMeter,
    MultiTaskMetrics,
    OnlineMetrics,
    RoundDict,
    StreamMetrics,
    binary_metrics,
    multiclass_metrics,
    regression_metrics,
)

SCENARIOS = {}
COLLECTIVES: list[str] = []


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def counted(name):
    original = getattr(dist, name)

    def wrapper(*args, **kwargs):
        COLLECTIVES.append(name)
        return original(*args, **kwargs)

    setattr(dist, name, wrapper)


def data(n=90, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g) + 2 * torch.nn.functional.one_hot(y, classes), y


# Uneven shares; the last rank has nothing.
def share(rank, world, n=90):
    edges = [0, *[10 + 30 * i for i in range(world - 2)], n, n]
    return slice(edges[rank], edges[rank + 1])


def feed(metrics, x, y, batch=7):
    for i in range(0, len(x), batch):
        metrics.update(x[i : i + batch], y[i : i + batch])


@scenario
def uneven_shares(rank, world):
    x, y = data()
    part = share(rank, world)
    result = {}
    for mode in ("global", "online"):
        metrics, alone = (multiclass_metrics(4, mode=mode, distributed=d) for d in (True, False))
        feed(metrics, x[part], y[part])
        feed(alone, x, y)
        result[mode] = [metrics.average().dict(), alone.average().dict()]
        assert metrics.sync().confmat.equal(alone.confmat)
        assert (metrics.confmat.sum() == part.stop - part.start).item()
    return result


@scenario
def counts_only(rank, world):
    x, y = data()
    part = share(rank, world)
    make = [F.multiclass_accuracy(4, average="micro"), F.multiclass_log_loss(4), F.multiclass_calibration_error(4)]
    metrics, alone = GlobalMetrics(make), GlobalMetrics(make, distributed=False)
    feed(metrics, x[part], y[part])
    feed(alone, x, y)
    return {"ours": metrics.avg.dict(), "alone": alone.avg.dict()}


@scenario
def regression(rank, world):
    g = torch.Generator().manual_seed(1)
    y = torch.randn(90, generator=g).double() + 1e6
    x = y + torch.randn(90, generator=g).double()
    part = share(rank, world)
    result = {}
    for mode in ("global", "online"):
        metrics, alone = (regression_metrics(mode=mode, distributed=d) for d in (True, False))
        feed(metrics, x[part], y[part])
        feed(alone, x, y)
        result[mode] = [metrics.average().dict(), alone.average().dict()]
    return result


@scenario
def stream(rank, world):
    metrics = StreamMetrics(F.binary_accuracy(), F.binary_auroc())
    if rank < world - 1:
        n = rank + 1
        metrics.update(torch.tensor([0.9, 0.1] * n), torch.tensor([1, rank % 2] * n))
    # Batches of 2, 4, … with accuracy 1, ½, 1, ½; AUROC is undefined where only one class occurs.
    return {"avg": metrics.avg.dict(), "bat": metrics.bat.dict(), "local": metrics.average(sync=False).dict()}


@scenario
def one_rank_decides_on_logits(rank, world):
    metrics = binary_metrics(F.binary_accuracy(), F.binary_log_loss())
    online = binary_metrics(F.binary_accuracy(), F.binary_log_loss(), mode="online")
    streamed = binary_metrics(F.binary_accuracy(), mode="stream")
    x = torch.tensor([0.3, 0.4]) if rank else torch.tensor([-3.0, 3.0])
    for m in (metrics, online, streamed):
        m.update(x, torch.tensor([1, 1]))
    return [metrics.avg.acc, online.avg.acc, streamed.avg.acc, metrics.average(sync=False).acc]


@scenario
def meters(rank, world):
    meters = AverageMeters()
    if rank == 0:
        meters.update({"loss": 1.0, "grad": torch.tensor([1.0, 2.0])}, n=1)
    elif rank == 1:
        meters.update(loss=4.0, n=2)
        meters["grad"]
    # Ranks from 2 on hold no meter at all.
    avg, bat = meters.avg, meters.bat
    return {"avg": avg.dict(), "bat": bat.dict(), "count": meters.count.dict(), "again": meters.avg.dict()}


@scenario
def one_meter(rank, world):
    meter = AverageMeter()
    if rank < world - 1:
        meter.update(torch.tensor(float(rank)), n=rank + 1)
    total, count = meter.sync()
    return [meter.avg, meter.bat, total, count]


@scenario
def ten_scalars_in_two_collectives(rank, world):
    meters = AverageMeters()
    meters.update({f"m{i}": float(i + rank) for i in range(10)})
    COLLECTIVES.clear()
    first = meters.avg
    after_first = list(COLLECTIVES)
    COLLECTIVES.clear()
    assert meters.avg == first
    return {"first": after_first, "cached": list(COLLECTIVES), "m3": first.m3}


@scenario
def multi_task_in_one_exchange(rank, world):
    x, y = data()
    part = share(rank, world)
    tasks = MultiTaskMetrics(
        cls=multiclass_metrics(4),
        on=multiclass_metrics(4, mode="online"),
        one=F.multiclass_accuracy(4),
        aggregate="micro",
    )
    tasks["silent"] = binary_metrics()
    alone = GlobalMetrics(multiclass_metrics(4).values(), distributed=False)
    feed(alone, x, y)
    for i in range(part.start, part.stop, 7):
        batch = (x[i : min(i + 7, part.stop)], y[i : min(i + 7, part.stop)])
        tasks.update({"cls": batch, "on": {"input": batch[0], "target": batch[1]}, "one": batch})
    COLLECTIVES.clear()
    result = tasks.avg
    used = list(COLLECTIVES)
    assert tasks.avg == result
    return {"result": result.dict(), "alone": alone.avg.dict(), "collectives": used, "bat": sorted(tasks.bat)}


@scenario
def read_again_and_again(rank, world):
    x, y = data(120)
    metrics = multiclass_metrics(4)
    seen = []
    for step in range(3):
        rows = slice(40 * step, 40 * step + 40)
        mine = slice(rows.start + 10 * rank, rows.stop if rank == world - 1 else rows.start + 10 * rank + 10)
        metrics.update(x[mine], y[mine])
        alone = multiclass_metrics(4, distributed=False)
        alone.update(x[: rows.stop], y[: rows.stop])
        seen.append([metrics.avg.dict(), alone.avg.dict(), metrics.avg.dict()])
        batch = multiclass_metrics(4, distributed=False)
        batch.update(x[rows], y[rows])
        assert metrics.bat.dict() == batch.avg.dict(), (metrics.bat, batch.avg)
    local = multiclass_metrics(4, distributed=False)
    for step in range(3):
        start = 40 * step + 10 * rank
        stop = 40 * step + 40 if rank == world - 1 else start + 10
        local.update(x[start:stop], y[start:stop])
    assert metrics.average(sync=False) == local.avg
    assert metrics.val == local.val
    restored = multiclass_metrics(4)
    restored.load_state_dict(metrics.state_dict())
    assert restored.average(sync=False) == local.avg and restored.val == local.val
    assert restored.avg == metrics.avg
    return seen


@scenario
def only_new_rows_travel(rank, world):
    x, y = data(6000)
    metrics = GlobalMetrics(F.multiclass_auroc(4))
    metrics.update(x, y)
    assert metrics.avg
    metrics.update(x[:5], y[:5])
    sizes = []
    original = dist.all_gather

    def spy(outputs, tensor, group=None):
        sizes.append(tensor.numel() * tensor.element_size())
        return original(outputs, tensor, group=group)

    dist.all_gather = spy
    try:
        assert metrics.avg
    finally:
        dist.all_gather = original
    return sizes


@scenario
def change_on_one_rank_only(rank, world):
    meters = AverageMeters()
    meters.update(loss=float(rank))
    first = meters.avg.loss
    if rank == 0:
        meters.update(loss=100.0)
    second = meters.avg.loss
    if rank == 1:
        meters.reset()
    third = meters.avg.loss
    return [first, second, third, meters.avg.loss]


@scenario
def reset_on_one_rank_only(rank, world):
    x, y = data(60)
    part = slice(20 * rank, 20 * rank + 20)
    metrics = multiclass_metrics(4)
    metrics.update(x[part], y[part])
    assert metrics.avg
    if rank == 0:
        metrics.reset()
    without = multiclass_metrics(4, distributed=False)
    without.update(x[20 : 20 * world], y[20 : 20 * world])
    result = [metrics.avg.dict(), without.avg.dict()]
    metrics.update(x[part], y[part])
    again = multiclass_metrics(4, distributed=False)
    again.update(x[: 20 * world], y[: 20 * world])
    again.update(x[20 : 20 * world], y[20 : 20 * world])
    return [result, [metrics.avg.dict(), again.avg.dict()]]


@scenario
def sub_group(rank, world):
    group = dist.new_group([0, 1])
    if rank > 1:
        return None
    metrics = binary_metrics(F.binary_accuracy(), group=group)
    metrics.update(torch.tensor([0.9, 0.9]), torch.tensor([1, rank]))
    meter = AverageMeter(group=group)
    meter.update(float(rank))
    return [metrics.avg.acc, meter.avg]


@scenario
def mixed_dtypes(rank, world):
    x, y = data(30)
    dtype = (torch.float32, torch.float16, torch.float64)[rank % 3]
    metrics = GlobalMetrics(F.multiclass_accuracy(4, average="micro"), F.multiclass_auroc(4))
    metrics.update(x.to(dtype), y.to((torch.int64, torch.int32, torch.uint8)[rank % 3]))
    alone = GlobalMetrics(F.multiclass_accuracy(4, average="micro"), distributed=False)
    alone.update(x, y)
    return [metrics.avg.acc, alone.avg.acc]


@scenario
def masks_on_one_rank_only(rank, world):
    x, y = data(30)
    metrics = GlobalMetrics(F.multiclass_accuracy(4, average="micro"), F.multiclass_auroc(4))
    mask = torch.arange(30) < 10
    metrics.update(x, y, **({"mask": mask} if rank == 0 else {}))
    return metrics.sync().n


@scenario
def nobody_has_data(rank, world):
    metrics, meters = multiclass_metrics(4), AverageMeters()
    return [metrics.avg.dict(), AverageMeter().avg, dict(meters.avg)]


# Disagreements: every rank must raise.


@scenario
def fails_other_names(rank, world):
    meters = AverageMeters()
    meters.update({"loss" if rank else "lose": 1.0})
    return meters.avg


@scenario
def fails_other_metrics(rank, world):
    metrics = [F.binary_accuracy()] if rank else [F.binary_accuracy(), F.binary_f1_score()]
    return GlobalMetrics(metrics).avg


@scenario
def fails_other_options(rank, world):
    metrics = GlobalMetrics(F.binary_accuracy(threshold=0.5 if rank else 0.4))
    metrics.update(torch.tensor([0.9]), torch.tensor([1]))
    return metrics.avg


@scenario
def fails_other_shapes(rank, world):
    meters = AverageMeters()
    meters.update(x=torch.ones(2 if rank else 3))
    return meters.avg


@scenario
def fails_labels_and_scores(rank, world):
    metrics = GlobalMetrics(F.multiclass_accuracy(4), own=lambda p, t: (p == t).float().mean())
    metrics.update(torch.zeros(5, 4) if rank else torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long))
    return metrics.avg


@scenario
def fails_other_container(rank, world):
    container = GlobalMetrics(F.binary_accuracy()) if rank else AverageMeters(loss=AverageMeter())
    return container.avg


@scenario
def fails_other_read(rank, world):
    meter = AverageMeter()
    meter.update(1.0)
    return meter.avg if rank else meter.bat


@scenario
def fails_bad_target(rank, world):
    metrics = multiclass_metrics(4)
    metrics.update(torch.zeros(2, 4), torch.tensor([0, 7 if rank == 1 else 1]))
    return metrics.avg


@scenario
def fails_bad_target_online(rank, world):
    metrics = multiclass_metrics(4, mode="online")
    metrics.update(torch.zeros(2, 4), torch.tensor([0, 7 if rank == 1 else 1]))
    return metrics.avg


@scenario
def fails_bad_target_stream(rank, world):
    metrics = multiclass_metrics(4, mode="stream")
    metrics.update(torch.eye(4)[:2], torch.tensor([0, 7 if rank == 1 else 1]))
    return metrics.avg


@scenario
def fails_negative_weight(rank, world):
    meter = AverageMeter()
    meter.update(1.0, torch.tensor(-1.0 if rank == 1 else 1.0))
    return meter.avg


@scenario
def still_works_after_failures(rank, world):
    meter = MetricMeter(F.binary_accuracy())
    meter.update(torch.tensor([0.9]), torch.tensor([rank % 2]))
    online = OnlineMetrics(F.binary_auroc())
    online.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))
    return [meter.avg, online.avg.auroc, online.error_bound().auroc]


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*undefined.*")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    counted("all_gather")
    counted("all_reduce")
    results = {}
    for name, function in SCENARIOS.items():
        try:
            value = function(rank, world)
            results[name] = {"value": value.dict() if isinstance(value, RoundDict) else value}
        except Exception as e:
            results[name] = {"error": type(e).__name__, "message": str(e), "trace": traceback.format_exc()}
    with open(f"{sys.argv[1]}/{rank}.json", "w") as f:
        json.dump(results, f)
    dist.destroy_process_group()


main()
