"""Guarantee 7: two ranks decide together to stop, skip and save; and they stay in step when their data is uneven.

One pair of processes runs all scenarios one after the other, which also shows that a group can be made again and again.
"""

import json

import pytest

from support.ranks import run_ranks

SCRIPT = """
import json, os, signal, sys, traceback
from contextlib import contextmanager
from itertools import islice
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from danling.metrics import multiclass_metrics
from support.tiny import Tiny, tiny_config, final_state

root, rank = sys.argv[1], int(os.environ["RANK"])
found = {{}}

def scenario(function):
    try:
        found[function.__name__] = function()
    except BaseException as error:
        traceback.print_exc()
        found[function.__name__] = f"{{type(error).__name__}}: {{error}}"

class Measured(Tiny):
    def __init__(self, config):
        super().__init__(config)
        self.metrics = multiclass_metrics(3)

@scenario
def straight():
    with Measured(tiny_config(root + "/straight", tiny__norm=True)) as runner:  # statistics that each rank updates
        runner.train()
        return [runner.losses, final_state(runner)]

def stopped_and_resumed(folder, event, due, victim):
    config = tiny_config(root + folder, auto_resume=True, tiny__norm=True)
    runner = Measured(config)
    runner.on(event, lambda runner, event: rank == victim and due(event) and os.kill(os.getpid(), signal.SIGTERM))
    try:
        runner.train()
        code = None
    except SystemExit as error:
        code = error.code
    where = [runner.global_step, runner.train_state.phase]
    with Measured(config) as again:
        again.train()
    return [code, where, runner.losses + again.losses, final_state(again)]

@scenario
def sigterm_on_one_rank():
    return stopped_and_resumed("/signal", "step", lambda event: event.global_step == 4, 1)

@scenario
def sigterm_in_an_evaluation():
    return stopped_and_resumed("/evaluation", "evaluate_start", lambda event: event.epoch == 2, 0)

@scenario
def nan_on_one_rank():
    class Bad(Tiny):
        def train_step(self, data):
            if self.micro_step == 2 and self.rank == 1:
                data = [data[0] * float("nan"), *data[1:]]
            return super().train_step(data)
    with Bad(tiny_config(root + "/nan", epochs=1, skip_nonfinite_grad=True)) as runner:
        runner.train()
        weights = [p.tolist() for p in runner.model.parameters()]
        return [runner.global_step, runner.train_state.skipped, weights]

@scenario
def save_asked_by_one_rank():
    with Tiny(tiny_config(root + "/save", epochs=1, checkpoint__interval=0, tiny__val=0)) as runner:
        runner.on("step", lambda r, e: r.request_save() if e.global_step == 1 and rank == 1 else None)
        runner.train()
        runner.barrier()
        return sorted(os.listdir(runner.checkpoint_dir))

def uneven(counts):
    class Uneven(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.datasets.clear()
            count = counts[self.rank]
            batch = lambda i: [torch.ones(2, 4) * (i + self.rank), torch.tensor([0, 1]), torch.zeros(2)]
            self.dataloaders.train = [batch(i) for i in range(count)]
    return Uneven

@scenario
def uneven_data():
    with uneven([2, 4])(tiny_config(root + "/uneven", epochs=2, tiny__norm=True)) as runner:
        runner.train()
        return [runner.global_step, runner.train_state.samples, [p.tolist() for p in runner.model.parameters()]]

@scenario
def no_data_on_one_rank():
    with uneven([0, 2])(tiny_config(root + "/empty", epochs=1)) as runner:
        runner.train()

WORKERS = {{"dataloader__num_workers": 1, "tiny__augment": True, "tiny__val": 0, "epochs": 2}}

@scenario
def straight_with_workers():
    with Tiny(tiny_config(root + "/workers", **WORKERS)) as runner:
        runner.train()
        return [runner.losses, final_state(runner)]

@scenario
def workers_lost_with_a_stop_pending():
    class Losing(Tiny):
        @contextmanager
        def open_pass(self, split):
            with super().open_pass(split) as feed:
                if rank == 1 and not self.global_step:
                    feed.iterator = self.lose(feed.iterator)
                yield feed

        def lose(self, batches):
            yield from islice(batches, 2)
            self.request_stop()
            raise ConnectionError("the worker is gone")

    config = tiny_config(root + "/lost", auto_resume=True, **WORKERS)
    with Losing(config) as runner:
        runner.train()
    with Tiny(config) as again:
        again.train()
    return [runner.global_step, runner.losses + again.losses, final_state(again)]

def told(cls, folder):
    class Told(cls):
        def send_header(self, **facts):
            order.append("send")
            super().send_header(**facts)

        def receive_header(self):
            order.append("receive")
            return super().receive_header()

        def forward(self, model, data):
            order.append("forward")
            return super().forward(model, data)

    order = []
    with Told(tiny_config(root + folder, epochs=1, tiny__val=0)) as runner:
        runner.train()
    return " ".join(order)

@scenario
def when_ranks_meet():
    return told(Tiny, "/told")

@scenario
def when_ranks_of_unequal_data_meet():
    return told(uneven([1, 2]), "/told_uneven")

@scenario
def somebody_elses_group():
    dist.init_process_group("gloo", store=dist.FileStore(root + "/store", 2), rank=rank, world_size=2)
    try:
        Tiny(tiny_config(root + "/group"))
    finally:
        dist.destroy_process_group()

json.dump(found, open(f"{{root}}/rank{{rank}}.json", "w"))
"""


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = SCRIPT.format(tests=str(request.config.rootpath / "tests"))
    results = run_ranks(script, 2, [str(folder)], timeout=280)
    for result in results:
        print(result.output)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def both(found, name):
    values = [rank[name] for rank in found]
    assert not any(isinstance(value, str) for value in values), values
    return values


def test_ranks_train_different_samples_and_share_the_result(found):
    first, second = both(found, "straight")
    assert first[1] == second[1] and first[0] != second[0]
    assert set(first[1]["results"]["3"]["val"]) == {"loss", "auroc", "auprc", "acc", "f1", "mcc"}


@pytest.mark.parametrize(
    ("name", "places"),
    [("sigterm_on_one_rank", ([4, "train"], [5, "train"])), ("sigterm_in_an_evaluation", ([6, "evaluate"],))],
)
def test_a_signal_on_one_rank_stops_both_and_the_resumed_run_is_bitwise_the_same(found, name, places):
    straight = both(found, "straight")
    for (code, where, losses, state), (all_losses, end) in zip(both(found, name), straight, strict=True):
        assert code == 143
        assert where in places
        assert losses == all_losses
        assert state == end


def test_a_bad_gradient_on_one_rank_is_skipped_by_both(found):
    first, second = both(found, "nan_on_one_rank")
    assert first == second
    assert first[:2] == [2, 1]


def test_a_save_asked_by_one_rank(found):
    for names in both(found, "save_asked_by_one_rank"):
        assert any(name in names for name in ("step-1", "step-2"))


def test_uneven_data_keeps_ranks_in_step_and_counts_each_sample_once(found):
    first, second = both(found, "uneven_data")
    assert first == second
    assert first[:2] == [8, 24]


def test_a_window_that_a_rank_has_lost_its_workers_for_is_trained_to_the_same_bits(found):
    straight = both(found, "straight_with_workers")
    for (step, losses, state), (all_losses, end) in zip(
        both(found, "workers_lost_with_a_stop_pending"), straight, strict=True
    ):
        assert step == 3
        assert losses == all_losses
        assert state == end


def test_what_ranks_tell_each_other_is_on_its_way_during_the_forward_pass(found):
    first, later = " send receive forward", " send forward receive"
    assert [rank["when_ranks_meet"] for rank in found] == [(first + 2 * later).strip()] * 2
    assert [rank["when_ranks_of_unequal_data_meet"] for rank in found] == [(2 * first).strip()] * 2


def test_a_rank_without_data_is_named(found):
    for rank in found:
        assert rank["no_data_on_one_rank"].startswith("RuntimeError: rank 0 has no batch at all in split 'train'")


def test_a_group_of_somebody_else_is_refused(found):
    for rank in found:
        assert rank["somebody_elses_group"].startswith("RuntimeError: a torch.distributed process group exists already")
