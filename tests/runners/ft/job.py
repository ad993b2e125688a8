"""One rank of a replica group: trains the conformance suite's task, does to itself what it is told, and writes down what it saw.

python job.py FOLDER '{"config": {...}, "kill_at": 5, ...}'
"""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import torch

from danling.backends.torch.conformance.settings import Settings
from danling.backends.torch.conformance.task import Task, task_config, weights


class Job(Task):
    order: dict = {}

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(int.from_bytes(os.urandom(4)))  # groups have to become equal
        self.model[0].reset_parameters()
        self.set_seed()

    def train_step(self, data):
        order, last = self.order, self.rank == self.world_size - 1
        if last and self.micro_step == order.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if last and self.micro_step == order.get("error_at"):
            order.pop("error_at")
            self.ft.manager.report_error(RuntimeError("injected"))
        if self.micro_step == 0:
            self.begun = weights(self)
        return super().train_step(data)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


if __name__ == "__main__":
    folder, order = Path(sys.argv[1]), json.loads(sys.argv[2])
    Job.order = order
    replica = order["config"]["ft.replica_id"]
    config = task_config(Settings("torch", 2), folder / "runs") | order["config"]
    with Job(config) as runner:
        resumed = runner.global_step
        if (stop := order.get("wait_at")) is not None:  # until another group is about to join
            runner.on("step", lambda r, event: event.global_step == stop and wait_for(folder / order["wait_for"]))
        start = weights(runner)
        runner.begun = start
        if "touch" in order:
            (folder / order["touch"]).touch()
        runner.train()
        found = {
            "drawn": start,
            "start": runner.begun,
            "end": weights(runner),
            "average": weights(runner, ema=True),
            "resumed": resumed,
            "seen": runner.seen,
            "logged": runner.logged,
            "share": runner.data_share(True)[0],
            "counters": (runner.global_step, runner.epoch, runner.train_state.samples),
            "results": runner.results.rows(),
            "leads": runner.ft.leads,
            "manager": type(runner.ft.manager).__name__,
            "group": runner.ft.group.size(),
        }
        runner.checkpoint_manager.drain()
    (folder / f"{order['name']}-{replica}-{runner.rank}.pkl").write_bytes(pickle.dumps(found))
