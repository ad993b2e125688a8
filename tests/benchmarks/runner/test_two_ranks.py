"""What a runner adds to an update over DDP and over FSDP2 driven by hand, in two processes.

As in `test_engines`: MLP 64-128-10, batches of 32, AdamW, one CPU thread, loss meter and default metrics, a log every 50 updates,
in pairs with a twin that is trained without danling and that sums its losses. What is limited is the CPU time of the training
thread: how long ranks wait for each other is up to the machine, so elapsed time only stands beside it. The same is measured over
the engine and one gather of a few numbers per update, the least that ranks need to agree on anything: what is left is danling's
own code. `DANLING_BENCH_DIR` keeps the JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.paired import REFERENCE, UPDATES, Paired, plain
from support.ranks import run_ranks

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]
LIMIT = 60.0


def test_overhead_on_two_ranks(tmp_path, capsys):
    tests = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    run_ranks(Path(__file__).with_name("two_ranks.py"), 2, [str(tmp_path)], env=env, timeout=600)
    rows = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    alone, twin = Paired(), plain()
    for batch in alone:
        twin([batch])
    loop = alone.figures[0]
    with capsys.disabled():
        print(f"\n{'plain loop':30s} {loop:9.1f} µs per update")
        for name in rows[0]:
            for rank, (raw, added, elapsed, longer) in enumerate(row[name] for row in rows):
                print(
                    f"{name + f', rank {rank} of 2':30s} {raw:9.1f} µs by hand, danling {added:+7.1f} µs  ({added / raw:+.0%}); "
                    f"elapsed {elapsed:9.1f} µs, {longer:+7.1f} µs"
                )
    if target := os.environ.get("DANLING_BENCH_DIR"):
        path = Path(target) / "runner-ranks.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"plain": loop, "ranks": rows, "updates": UPDATES}, indent=1))
    scale = max(1.0, loop / REFERENCE)
    assert all(row[name][1] <= 2 * LIMIT * scale for row in rows for name in ("DDP", "FSDP2"))
