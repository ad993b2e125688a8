"""How long a save of 200 MB keeps training waiting: asynchronous against synchronous, in pairs.

Also a script: `python tests/benchmarks/runner/test_async_save.py [--rounds N] [--megabytes N] [--directory DIR]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from danling.backends.torch.payload import MODEL, OPTIMIZER, rank_file
from danling.backends.torch.snapshot import HostBuffers, TorchSnapshot
from danling.runners.store import CheckpointStore

LIMIT = 0.10


def make_state(megabytes: int) -> dict[str, Any]:
    """Weights and two Adam moments, a third each, in tensors of about a megabyte."""
    count = max(1, megabytes * 1_000_000 // (3 * 4 * 262_144))
    weights = {f"layers.{index}.weight": torch.randn(512, 512) for index in range(count)}
    moments = {
        name: {"step": torch.tensor(1.0), "exp_avg": torch.randn(512, 512), "exp_avg_sq": torch.rand(512, 512)}
        for name in weights
    }
    return {MODEL: weights, OPTIMIZER: {"optimizer": {"state": moments}}, rank_file(0): {"rng": torch.get_rng_state()}}


def bytes_of(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(bytes_of, tree.values())) if isinstance(tree, dict) else 0


def train(weights: torch.Tensor, batch: torch.Tensor) -> None:
    """A stand-in for one update: it computes for some milliseconds."""
    for _ in range(4):
        batch @ weights


def measure(rounds: int = 7, megabytes: int = 200, directory: str | None = None) -> dict[str, Any]:
    """Time both kinds of save in turn.

    Returns:
        Medians in seconds: `sync` (the whole save), `async_first` and `async` (how long `save` keeps its caller),
        `write` (how long the writer needs), `step_idle` and `step_writing` (one update without and beside the writer).
    """
    torch.set_num_threads(1)
    state = make_state(megabytes)
    weights, batch = torch.randn(512, 512), torch.randn(256, 512)
    times: dict[str, list[float]] = {key: [] for key in ("sync", "async", "write", "step_idle", "step_writing")}
    first = 0.0
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        sync = CheckpointStore(Path(folder) / "sync", asynchronous=False, keep_latest_k=1)
        background = CheckpointStore(Path(folder) / "async", asynchronous=True, keep_latest_k=1)
        buffers = HostBuffers()
        for number in range(rounds + 1):
            meta = {"kind": "full", "global_step": number}
            start = time.perf_counter()
            sync.save(f"step-{number}", TorchSnapshot(state), meta, final=True)
            synchronous = time.perf_counter() - start

            start = time.perf_counter()
            background.save(f"step-{number}", TorchSnapshot(state, buffers), meta)
            stall = time.perf_counter() - start
            steps = []
            while background.busy:
                begin = time.perf_counter()
                train(weights, batch)
                steps.append(time.perf_counter() - begin)
            write = time.perf_counter() - start - stall
            assert background.drain() and background.health["failures"] == 0
            idle = []
            for _ in range(20):
                begin = time.perf_counter()
                train(weights, batch)
                idle.append(time.perf_counter() - begin)
            if number == 0:  # allocates the host buffers
                first = stall
                continue
            for key, value in (("sync", synchronous), ("async", stall), ("write", write)):
                times[key].append(value)
            times["step_idle"].append(statistics.mean(idle))
            times["step_writing"].append(statistics.mean(steps or idle))
    ratios = [a / s for a, s in zip(times["async"], times["sync"], strict=True)]
    return {
        "megabytes": bytes_of(state) / 1e6,
        "rounds": rounds,
        **{key: statistics.median(values) for key, values in times.items()},
        "async_first": first,
        "ratio": statistics.median(ratios),
        "ratio_worst": max(ratios),
        "limit": LIMIT,
    }


def report(result: dict[str, Any]) -> str:
    rows = [
        ("synchronous save", f"{result['sync'] * 1e3:9.1f} ms"),
        ("asynchronous save: training waits", f"{result['async'] * 1e3:9.1f} ms"),
        ("the first one, which allocates the buffers", f"{result['async_first'] * 1e3:9.1f} ms"),
        ("the writer beside training", f"{result['write'] * 1e3:9.1f} ms"),
        ("one update, idle writer", f"{result['step_idle'] * 1e3:9.1f} ms"),
        ("one update, busy writer", f"{result['step_writing'] * 1e3:9.1f} ms"),
        ("ratio of the waits, median (worst)", f"{result['ratio']:9.1%} ({result['ratio_worst']:.1%})"),
        ("limit", f"{result['limit']:9.1%}"),
    ]
    title = f"save of {result['megabytes']:.0f} MB, medians of {result['rounds']} pairs"
    return "\n".join([title, *(f"  {name:44} {value}" for name, value in rows)])


def write_report(result: dict[str, Any]) -> Path:
    path = Path("build/bench/async_save.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


@pytest.mark.bench
def test_an_asynchronous_save_hardly_keeps_training_waiting() -> None:
    result = measure()
    print("\n" + report(result))
    write_report(result)
    assert result["ratio"] <= 2 * LIMIT


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--directory", help="where to write; default: the system's temporary directory")
    found = measure(**vars(parser.parse_args()))
    print(report(found))
    print(write_report(found))
