"""The resumable sampler against a direct statement of its rule, over sizes, ranks, positions and changes of layout."""

import pickle
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danling.backends.torch.sampler import StatefulSampler, build_sampler
from danling.runners.errors import ConfigError


def make(
    length,
    ranks=1,
    *,
    batch_size=4,
    shuffle=True,
    drop_last=False,
    train=True,
    seed=3,
    split="train",
    epoch=0,
    consumed=0,
):
    """Return one sampler per rank, all at the same position."""
    samplers = [
        StatefulSampler(
            length, split, seed=seed, shuffle=shuffle, drop_last=drop_last, batch_size=batch_size, data_rank=rank,
            data_ranks=ranks, train=train,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for sampler in samplers:
        sampler.load_state_dict({"epoch": epoch, "consumed": consumed})
    return samplers


def real_batches(sampler):
    """The batches of one rank without those that only keep ranks in step."""
    return [batch for number, batch in enumerate(sampler, 1) if not sampler.is_filler(number)]


def consumed_by(samplers):
    return [index for sampler in samplers for batch in real_batches(sampler) for index in batch]


LAYOUT = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 9), "drop_last": st.booleans(), "train": st.booleans(), "shuffle": st.booleans()}
)


@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 3), LAYOUT)
def test_every_sample_once(length, ranks, epoch, layout):
    samplers = make(length, ranks, epoch=epoch, **layout)
    seen = consumed_by(samplers)
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(length))
    block = layout["batch_size"] * ranks
    assert len(seen) == (length - length % block if layout["drop_last"] else length)


@given(st.integers(0, 60), st.integers(1, 5), LAYOUT)
def test_order_and_dealing(length, ranks, layout):
    """Global batch j is the j-th block of the order, rank r has the r-th block of it, the rest is dealt evenly."""
    samplers = make(length, ranks, **layout)
    order = samplers[0].order()
    order = list(range(length)) if order is None else order.tolist()
    assert sorted(order) == list(range(length))
    size = layout["batch_size"]
    rows = [real_batches(sampler) for sampler in samplers]
    blocks = [order[start : start + size * ranks] for start in range(0, length, size * ranks)]
    for number, block in enumerate(blocks):
        shares = [row[number] if number < len(row) else [] for row in rows]
        if len(block) == size * ranks:
            assert shares == [block[rank * size : (rank + 1) * size] for rank in range(ranks)]
        elif layout["drop_last"]:
            assert shares == [[] for _ in shares]
        else:
            assert [index for share in shares for index in share] == block
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(0, 60), st.integers(1, 5), LAYOUT)
def test_lengths_and_fillers(length, ranks, layout):
    samplers = make(length, ranks, **layout)
    for sampler in samplers:
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.pass_length()
        fillers = [number for number in range(1, len(batches) + 1) if sampler.is_filler(number)]
        assert fillers in ([], [len(batches)])
        assert all(len(batches[number - 1]) == 1 for number in fillers)
        assert layout["train"] or not fillers
    counts = [len(sampler) for sampler in samplers]
    assert max(counts) - min(counts) <= (0 if layout["train"] else 1)
    sizes = [sum(map(len, real_batches(sampler))) for sampler in samplers]
    assert max(sizes) - min(sizes) <= 1


@given(st.data())
def test_a_resume_yields_exactly_the_rest_of_the_epoch_whatever_the_layout(data):
    """An epoch cut at any batches, each part with ranks and a batch size of its own, is the epoch, in its order."""
    length = data.draw(st.integers(1, 60))
    epoch = data.draw(st.integers(0, 3))
    consumed, seen = 0, []
    for _ in range(data.draw(st.integers(0, 3))):
        ranks, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
        samplers = make(length, ranks, batch_size=size, epoch=epoch, consumed=consumed)
        batches = data.draw(st.integers(0, len(samplers[0])))
        taken = [real_batches(sampler)[:batches] for sampler in samplers]
        for number in range(batches):
            seen += [index for row in taken for index in (row[number] if number < len(row) else [])]
        consumed = samplers[0].consumed_after(consumed, batches)
        assert consumed == len(seen)
    (rest,) = make(length, epoch=epoch, consumed=consumed)
    seen += consumed_by([rest])
    (whole,) = make(length, epoch=epoch)
    assert seen == consumed_by([whole])


def test_the_same_layout_resumes_with_the_same_batches():
    for rank in range(2):
        whole = list(make(37, 2)[rank])
        for done in range(len(whole) + 1):
            sampler = make(37, 2, consumed=make(37, 2)[rank].consumed_after(0, done))[rank]
            assert list(sampler) == whole[done:] and len(sampler) == len(whole) - done
            assert sampler.is_complete(sampler.consumed) == (done == len(whole))
            assert sampler.pass_length() == len(whole)


def test_orders_differ_by_seed_split_and_epoch_and_by_nothing_else():
    orders = {
        tuple(make(50, seed=seed, split=split, epoch=epoch)[0].order().tolist())
        for seed in (0, 1) for split in ("train", "extra") for epoch in (0, 1)
    }  # fmt: skip
    assert len(orders) == 8
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(50)[0].order()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(make(50, 3)[2].order(), first)
    assert make(50, shuffle=False)[0].order() is None


def test_an_order_is_the_same_in_every_process():
    script = (
        "from danling.backends.torch.sampler import StatefulSampler as S\n"
        "print(list(S(20, 'train', seed=3, shuffle=True, drop_last=False, batch_size=4)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{list(make(20)[0])}\n"


def test_set_epoch_starts_over():
    (sampler,) = make(10, epoch=0, consumed=8)
    sampler.set_epoch(1)
    assert sampler.state_dict() == {"epoch": 1, "consumed": 0} and sorted(consumed_by([sampler])) == list(range(10))


def test_drop_last_completes_a_pass_before_the_last_sample():
    (sampler,) = make(10, drop_last=True, consumed=8)
    assert len(sampler) == 0 and list(sampler) == [] and sampler.is_complete(8) and not sampler.is_complete(4)


def test_datasets_that_yield_whole_batches():
    samplers = make(5, 2, batch_size=None, shuffle=False)
    assert [list(sampler) for sampler in samplers] == [[0, 2, 4], [1, 3, 4]]
    assert [sampler.is_filler(3) for sampler in samplers] == [False, True]
    assert samplers[0].consumed_after(0, 2) == 4
    assert list(samplers[1])[1].position == 2


def test_batches_carry_their_place_to_a_worker():
    batches = pickle.loads(pickle.dumps(list(make(20, 2, epoch=3)[1])))
    assert [(batch.epoch, batch.position) for batch in batches] == [(3, 0), (3, 8), (3, 16)]
    assert batches == list(make(20, 2, epoch=3)[1])
    assert pickle.loads(pickle.dumps(next(iter(make(5, batch_size=None, epoch=2)[0])))).epoch == 2


@pytest.mark.parametrize("consumed", [-1, 11])
def test_a_position_outside_of_the_dataset_is_refused(consumed):
    with pytest.raises(ValueError, match=f"position {consumed} of split 'train' is outside of its 10 samples"):
        make(10, consumed=consumed)


@pytest.mark.parametrize(
    ("length", "ranks", "words"), [(0, 1, "is empty"), (7, 2, "has 7 samples.*batch of 4.*2 ranks.*drop_last")]
)
def test_a_split_that_would_train_nothing_is_refused(length, ranks, words):
    options = {"seed": 0, "shuffle": True, "batch_size": 4, "data_ranks": ranks}
    with pytest.raises(ConfigError, match=words):
        build_sampler(range(length), "train", drop_last=True, **options)
    if length:
        assert len(build_sampler(range(length), "train", drop_last=False, **options)) == 1
    assert len(build_sampler(range(length), "val", drop_last=True, train=False, **options)) == 0


def test_seeking_does_not_depend_on_the_position():
    """A position near the end of a million samples is reached without going through what is before it."""
    (sampler,) = make(1_000_000, batch_size=32)
    times = []
    for consumed in (0, 999_968):
        sampler.load_state_dict({"epoch": 1, "consumed": consumed})
        best = min(_first_batch_seconds(sampler) for _ in range(3))
        times.append(best)
    assert times[1] < 5 * times[0] + 0.05


def _first_batch_seconds(sampler):
    start = time.thread_time()
    next(iter(sampler))
    return time.thread_time() - start
