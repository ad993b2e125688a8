"""The equivalence matrix: every backend and layout trains what one process trains, and goes on from the others' checkpoints.

The table is printed with `-s`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from danling.backends.torch.conformance.forks import Forks
from support.matrix import HALF, MODELS, UPDATES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BATCH = 8  # of all data ranks together
JOB = "support.matrix:main"
TOLERANCE = 1e-5  # of losses, in float32
# name → processes, data ranks, configuration
LAYOUTS: dict[str, tuple[int, int, dict]] = {
    "torch": (1, 1, {"stack": "torch"}),
    "parallel tensor 2": (2, 1, {"stack": "parallel", "parallel.axes.tensor": 2}),
    "parallel pipeline 2": (
        2,
        1,
        {"stack": "parallel", "parallel.axes.pipeline": 2, "parallel.pipeline_microbatch_size": 2},
    ),
    "torch ddp 2": (2, 2, {"stack": "torch"}),
    "accelerate 2": (2, 2, {"stack": "accelerate"}),
    "accelerate FSDP2": (2, 2, {"stack": "accelerate", "accelerate": {"fsdp_plugin": {}}}),
    "deepspeed ZeRO 1": (2, 2, {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 1}}}),
    "deepspeed ZeRO 3": (2, 2, {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}),
    "parallel replicate 2": (2, 2, {"stack": "parallel", "parallel.axes.replicate": 2}),
    "parallel shard 2": (2, 2, {"stack": "parallel", "parallel.axes.shard": 2}),
    "parallel shard 2 × tensor 2": (
        4,
        2,
        {"stack": "parallel", "parallel.axes.shard": 2, "parallel.axes.tensor": 2},
    ),
    "parallel replicate 2 × shard 2": (
        4,
        4,
        {"stack": "parallel", "parallel.axes.replicate": 2, "parallel.axes.shard": 2},
    ),
}
FULL = [
    {"torch ddp 2", "accelerate 2", "accelerate FSDP2"},
    {"parallel replicate 2", "parallel shard 2"},
]  # resume each other in full
ONLY_LANGUAGE = {"parallel tensor 2", "parallel shard 2 × tensor 2"}  # plans are for transformer layers


def models(*layouts):
    return ["language"] if set(layouts) & ONLY_LANGUAGE else list(MODELS)


def resumes_in_full(writer, reader):
    return writer == reader or any({writer, reader} <= group for group in FULL)


def config(layout):
    _, ranks, options = LAYOUTS[layout]
    return {**options, "dataloader.batch_size": BATCH // ranks}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run orders under a layout in processes that start quickly."""
    folder = tmp_path_factory.mktemp("matrix")
    tests = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", tests)
        with Forks("parallel", JOB) as forks, Forks("deepspeed", JOB) as deepspeed:

            def run(layout, name, orders):
                orders = [{"root": str(folder / f"{name}-{i}"), **order} for i, order in enumerate(orders)]
                (folder / f"{name}.json").write_text(json.dumps(orders))
                starter = deepspeed if layout.startswith("deepspeed") else forks
                args = [str(folder / f"{name}.json"), str(folder / f"{name}.pkl")]
                starter.run(LAYOUTS[layout][0], args, timeout=240)
                return pickle.loads((folder / f"{name}.pkl").read_bytes())

            yield run


@pytest.fixture(scope="module")
def trained(run):
    """Layout → model → what training from the start gave."""
    found = {}
    for number, layout in enumerate(LAYOUTS):
        orders = [{"do": "train", "model": model, "config": config(layout)} for model in models(layout)]
        found[layout] = dict(zip(models(layout), run(layout, f"train{number}", orders), strict=True))
    return found


def gap(found, expected, first=1):
    """The largest relative difference between losses from an update on."""
    assert sorted(found) == list(range(first, UPDATES + 1))
    return max(abs(found[step] - expected[step]) / abs(expected[step]) for step in found)


def table(title, columns, rows):
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) for row in [columns, *rows]]
    print(f"\n{title}\n" + "\n".join(lines))


def test_every_layout_trains_what_one_process_trains(trained):
    reference = trained["torch"]
    rows, worst = [], 0.0
    for layout, found in trained.items():
        gaps = {model: gap(found[model]["losses"], reference[model]["losses"]) for model in found}
        worst = max(worst, *gaps.values())
        processes = LAYOUTS[layout][0]
        rows.append([layout, processes, *(f"{gaps[model]:.1e}" if model in gaps else "-" for model in MODELS)])
    table(f"largest relative difference of {UPDATES} losses from one process", ["layout", "processes", *MODELS], rows)
    assert worst <= TOLERANCE


@pytest.mark.faults
def test_every_layout_goes_on_from_the_others(trained, run):
    """In full where the contract allows it, with the same continuation; with the weights, and the same evaluation, elsewhere."""
    rows = []
    for number, reader in enumerate(LAYOUTS):
        writers = [w for w in LAYOUTS if LAYOUTS[w][1] == LAYOUTS[reader][1]]  # others have another batch per rank
        pairs = [
            (writer, model)
            for writer in writers
            for model in (models(writer, reader) if resumes_in_full(writer, reader) else ["language"])
        ]
        orders = [
            {"do": "resume", "model": model, "config": config(reader), "source": trained[writer][model]["half"]}
            for writer, model in pairs
        ]
        cells = {}
        for (writer, model), found in zip(pairs, run(reader, f"resume{number}", orders), strict=True):
            where = f"{writer} → {reader}, {model}: {found}"
            full = resumes_in_full(writer, reader)
            assert found["kind"] == ("resumed" if full else "weights"), where
            if full:
                difference = gap(found["losses"], trained["torch"][model]["losses"], HALF + 1)
                assert difference <= TOLERANCE, where
            else:
                assert "pretrained" in found["message"], where
                difference = abs(found["val"] / trained[writer][model]["val"] - 1)
                assert difference <= TOLERANCE, where
            cells[writer] = max(cells.get(writer, ("", 0.0)), (found["kind"], difference))
        rows += [[writer, reader, kind, f"{difference:.1e}"] for writer, (kind, difference) in cells.items()]
    table("checkpoints across layouts", ["written by", "read by", "as", "difference"], rows)
