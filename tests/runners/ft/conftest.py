"""A real lighthouse, and replica groups under torchrun."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.ranks import free_port

JOB = Path(__file__).with_name("job.py")
LIGHTHOUSE = Path(sys.executable).with_name("torchft_lighthouse")


@pytest.fixture
def lighthouse(tmp_path):
    """The address of a lighthouse that sees a lost group after a second."""
    port = free_port()
    options = {"min_replicas": 1, "join_timeout_ms": 4000, "heartbeat_timeout_ms": 1000, "quorum_tick_ms": 50}
    command = [str(LIGHTHOUSE), "--bind", f"[::]:{port}", *(f"--{name}={value}" for name, value in options.items())]
    with open(tmp_path / "lighthouse.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "lighthouse.log").read_text()
            time.sleep(0.05)
    yield f"http://localhost:{port}"
    process.kill()
    process.wait()


class Groups:
    """Starts replica groups and reads what they saw."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.processes: list[tuple[str, subprocess.Popen]] = []

    def start(self, replica: int, nproc: int = 1, name: str = "run", config=None, **order) -> subprocess.Popen:
        """Start a group."""
        ft = {"ft.enabled": True, "ft.replica_id": replica, "ft.group_size": 2, "ft.process_group_timeout_ms": 20000}
        ft |= {"seed": None, "auto_resume": True, "comm.init_timeout_seconds": None}  # each group draws a seed
        order |= {"name": name, "config": {**ft, **(config or {})}}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
        torchrun += ["--master_port", str(free_port()), "--max_restarts", "0"]
        environment = {"TORCHFT_LIGHTHOUSE": self.address, "OMP_NUM_THREADS": "1", "RUST_LOG": "warn"}
        with open(self.folder / f"{name}-{replica}.log", "w") as log:
            process = subprocess.Popen(
                [*torchrun, str(JOB), str(self.folder), json.dumps(order)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.processes.append((f"{name}-{replica}", process))
        return process

    def wait(self, timeout: float = 150.0, check: bool = True) -> list[int]:
        """Wait for all groups."""
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for _, process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a group is still running after {timeout} s\n{self.logs}") from None
        assert not check or not any(codes), f"{codes}\n{self.logs}"
        return codes

    @property
    def logs(self) -> str:
        """What all groups have printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def found(self, replica: int, rank: int = 0, name: str = "run"):
        """What a rank saw."""
        return pickle.loads((self.folder / f"{name}-{replica}-{rank}.pkl").read_bytes())

    def kill(self) -> None:
        """Leave nothing running."""
        for _, process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


@pytest.fixture
def groups(tmp_path, lighthouse):
    """For tests that start replica groups."""
    groups = Groups(tmp_path, lighthouse)
    yield groups
    groups.kill()
