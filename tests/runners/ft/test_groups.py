"""Two replica groups, each under a torchrun of its own, with a real lighthouse between them."""

import re

import pytest

pytest.importorskip("torchft")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]


def assert_equal(one, other):
    for name, value in one.items():
        assert value.equal(other[name]), name


def check_reference(found, optim):
    """Compare with a plain loop in one process on the windows of all groups together."""
    from danling.backends.torch.conformance.task import Reference, difference, windows

    plain = Reference(found[0]["start"], optim)
    together = windows([{**rank, "data_rank": rank["share"]} for rank in found])
    for numbers in together:
        plain.update(numbers)
    assert difference(found[0]["end"], plain.weights()) <= 1e-5
    assert found[0]["counters"][2] == sum(map(len, together))


LAYOUTS = {
    "ddp": (2, {}),
    "sharded": (2, {"stack": "parallel", "parallel.axes.shard": 2}),
    "replicated and sharded": (4, {"stack": "parallel", "parallel.axes.shard": 2, "parallel.axes.replicate": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_groups_train_in_step(groups, layout):
    """Unequal seeds: equal weights and averages, the weights those of one process on the concatenated batch."""
    nproc, axes = LAYOUTS[layout]
    config = {"steps": 8, "accum_steps": 2, "ft.min_replica_size": 2, "optim.momentum": 0.9, "log_interval": 1}
    config |= {"ema.enabled": True, "ema.decay": 0.9, **axes}
    config |= {"dataloader.batch_size": 8 // nproc}
    for replica in range(2):
        groups.start(replica, nproc, config=config)
    groups.wait()
    found = [groups.found(replica, rank) for replica in range(2) for rank in range(nproc)]
    shares = [(i, 2, "Manager") for i in range(2 * nproc)]
    assert [(rank["share"], rank["group"], rank["manager"]) for rank in found] == shares
    assert [rank["leads"] for rank in found] == [True] * nproc + [False] * nproc
    assert not found[0]["drawn"]["0.weight"].equal(found[nproc]["drawn"]["0.weight"])
    assert not found[0]["average"]["0.weight"].equal(found[0]["end"]["0.weight"])
    for rank in found[1:]:
        for name in ("start", "end", "average"):
            assert_equal(found[0][name], rank[name])
        assert rank["counters"] == found[0]["counters"] and rank["results"].keys() == found[0]["results"].keys()
    check_reference(found, {"type": "sgd", "lr": 0.1, "momentum": 0.9})


def test_a_group_that_is_killed_comes_back(groups):
    """Killed in a window and started again, it takes the state of the other and goes on in its own share of the data."""
    config = {
        "epochs": 1,
        "dataloader.batch_size": 2,
        "evaluate_splits": [],
        "checkpoint.interval": "1 steps",
        "checkpoint.enable_ft_dataloader_checkpoints": True,
        "ema.enabled": True,
        "optim.momentum": 0.9,
    }
    groups.start(0, config=config, wait_at=8, wait_for="back")
    killed = groups.start(1, config=config, kill_at=4)
    assert killed.wait(120) != 0, groups.logs
    groups.processes.pop()
    groups.start(1, name="again", config=config, touch="back")
    groups.wait()
    stayed, back = groups.found(0), groups.found(1, name="again")
    for name in ("end", "average"):
        assert_equal(stayed[name], back[name])
    assert stayed["counters"] == back["counters"]
    logs = {path.stem: path.read_text() for path in groups.folder.glob("*.log")}
    assert "was refused (1 in a row) and is run again" in logs["run-0"]
    assert "took the state of another replica group at step" in logs["again-1"]
    assert "goes on in its share of epoch 1 where it was" in logs["again-1"]
    # 61 samples in global batches of 4: 31 are group 0's share, 30 group 1's, of which 4 windows were committed before the kill
    own, others = [[set(window) for window in rank["seen"]] for rank in (stayed, back)]
    assert sum(map(len, own)) == len(set().union(*own)) == 31
    assert sum(map(len, others)) == len(set().union(*others)) == 30 - 4 * 2
    assert not set().union(*own) & set().union(*others)
    assert [len(window) for window in stayed["seen"]].count(4) == 1  # the refused one was run twice


def test_too_few_groups(groups):
    """A step that cannot have its groups waits, then fails with what it lacks."""
    config = {"steps": 2, "ft.min_replica_size": 2, "ft.process_group_timeout_ms": 3000}
    groups.start(0, config=config)
    assert groups.wait(check=False) != [0]
    message = (
        r"no quorum within 9 s: a step needs ft.min_replica_size = 2 healthy replica groups of 2, (1|none) answered"
    )
    assert re.search(message, groups.logs), groups.logs


def test_a_refused_window_is_run_again(groups):
    """An error in one group makes both drop their gradients and run the window again: it counts once."""
    config = {"steps": 5, "accum_steps": 2, "ft.min_replica_size": 2, "ft.process_group_timeout_ms": 6000}
    for replica, order in enumerate(({}, {"error_at": 5})):
        groups.start(replica, config=config, **order)
    groups.wait()
    found = [groups.found(replica) for replica in range(2)]
    assert_equal(found[0]["end"], found[1]["end"])
    assert found[0]["counters"] == found[1]["counters"]
    assert "was refused (1 in a row) and is run again: RuntimeError: injected" in groups.logs
    for rank in found:
        third = rank["seen"][2]
        assert third[: len(third) // 2] == third[len(third) // 2 :]  # the same samples, run twice
        rank["seen"][2] = third[: len(third) // 2]
    check_reference(found, {"type": "sgd", "lr": 0.1})
