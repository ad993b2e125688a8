"""The command `danling`: what it says about real run directories, how it fails, and what it does not load."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from danling.runners.atomic import write_yaml
from danling.runners.cli import main
from danling.runners.configfile import dump_yaml
from danling.runners.identity import config_id, identity_view
from danling.runners.keys import ABSENT, KEYS
from danling.runners.problems import Problems
from danling.runners.results import Results
from danling.runners.store import CheckpointStore
from danling.runners.summary import Summary
from danling.runners.trackers import MetricsFile, Trackers
from danling.runners.workspace import Workspace

VERBS = ["stacks", "runs", "show", "plot", "diff", "verify", "export"]


class Weights:
    """A snapshot of one small file."""

    def write(self, directory):
        (directory / "model.pt").write_bytes(b"weights")


def make_run(root, name="digits", *, lr=0.1, epochs=3, status="finished", losses=(0.9, 0.5, 0.7), git=None):
    """A run directory as a run writes it: through the same services."""
    config: dict = {}
    for key, item in KEYS.items():
        if item.default is not ABSENT:
            section = config
            *path, leaf = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[leaf] = item.default
    config |= {"epochs": epochs, "name": name, "workspace_root": str(root)}
    config["optim"] |= {"type": "sgd", "lr": lr}
    view = identity_view(config)
    workspace = Workspace(root, "lin", "exp", config_id=config_id(view), name=name)
    workspace.lock()
    workspace.write_config(config, stack="torch")
    workspace.metadata_dir.mkdir(parents=True)
    write_yaml(workspace.metadata_dir / "identity.yaml", view)
    if git is not None:
        write_yaml(workspace.metadata_dir / "git.yaml", {"revision": git, "branch": "main", "dirty": False})
    summary = Summary(
        workspace.dir / "summary.json",
        timestamp=workspace.timestamp,
        about={"name": name, "id": workspace.id, "config_id": workspace.config_id, "stack": "torch"},
    )
    trackers = Trackers(MetricsFile(workspace.dir / "metrics.jsonl"))
    trackers.start()
    store = CheckpointStore(workspace.checkpoint_dir, asynchronous=False)
    results = Results(score_split="val", score_name="loss")
    for epoch, loss in enumerate(losses, 1):
        for step in range(10 * epoch - 9, 10 * epoch + 1):
            trackers.log("train", {"loss": loss + 1 / step, "lr": lr}, global_step=step, epoch=epoch - 1)
        row = {"train": {"loss": loss / 2}, "val": {"loss": loss, "acc": 1 - loss}}
        results.append(row, epoch)
        trackers.log("val", row["val"], global_step=10 * epoch, epoch=epoch, event="evaluate")
        results.write(workspace.dir, workspace.header(), {"global_step": 10 * epoch, "epoch": epoch})
        aliases = ("latest", "best") if results.is_best else ("latest",)
        meta = {"kind": "full", "global_step": 10 * epoch, "micro_step": 10 * epoch, "epoch": epoch, "score": loss}
        store.save(f"epoch-{epoch}", Weights(), meta, aliases)
    store.close()
    trackers.close()
    summary.write(
        status,
        counters={"updates": 10 * len(losses), "epochs": len(losses)},
        targets={"epochs": epochs, "steps": None},
        latest=results.latest_result,
        best=results.best_result,
    )
    return workspace


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that finished, made once."""
    workspace = make_run(tmp_path_factory.mktemp("finished"), git="aaaa")
    workspace.release()
    return workspace


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it for this test."""
    shutil.copytree(finished.root, tmp_path, symlinks=True, dirs_exist_ok=True)
    return Workspace(tmp_path, "lin", "exp", config_id=finished.config_id, name=finished.name)


@pytest.fixture
def danling(capsys):
    """Call the command; return status, output and error text."""

    def call(*argv):
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


# Nothing heavy, no traceback


@pytest.mark.parametrize("verb", ["--help", "--version", *VERBS])
def test_help_and_version_load_nothing(verb):
    argv = [verb] if verb.startswith("-") else [verb, "--help"]
    assert not heavy(argv, 0)


@pytest.mark.parametrize("verb", ["stacks", "runs", "show", "diff", "verify", "plot"])
def test_no_verb_but_export_loads_torch_or_chanfig(verb, run, tmp_path):
    argv = {
        "stacks": ["stacks"],
        "runs": ["runs", tmp_path],
        "show": ["show", run.dir],
        "diff": ["diff", run.dir, run.dir],
        "verify": ["verify", run.dir],
        "plot": ["plot", run.dir, "-o", tmp_path / "x.png"],
    }[verb]
    assert not heavy(argv, 0)


def heavy(argv, status):
    """Which of torch and chanfig the command has loaded, in a process of its own."""
    code = (
        "import sys\nfrom danling.runners.cli import main\n"
        "try: status = main(sys.argv[1:])\nexcept SystemExit as leave: status = leave.code\n"
        "print('LOADED', *[m for m in ('torch', 'chanfig', 'rich') if m in sys.modules])\nsys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    return result.stdout.rsplit("LOADED", 1)[1].split()


def test_it_is_installed_under_its_name_and_as_a_module():
    by_name = subprocess.run([Path(sys.executable).with_name("danling"), "--help"], capture_output=True, text=True)
    as_module = subprocess.run([sys.executable, "-m", "danling.runners", "--help"], capture_output=True, text=True)
    assert by_name.returncode == as_module.returncode == 0
    assert by_name.stdout == as_module.stdout
    assert all(re.search(rf"^    {verb} ", by_name.stdout, re.M) for verb in VERBS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runs", "/nowhere"], "danling: /nowhere: no such directory"),
        (["show", "/nowhere"], "danling: /nowhere: no such file or directory"),
        (
            ["show", "/"],
            "danling: / is not in a run: a run directory holds summary.json or runner.yaml or results.json",
        ),
        (["diff", "/nowhere", "/"], "danling: /nowhere: no such file or directory"),
        (["plot", "/nowhere"], "danling: /nowhere: no such file or directory"),
        (["verify", "/nowhere"], "danling: no checkpoint at /nowhere"),
        (["export", "/nowhere", "x.safetensors"], "danling: no checkpoint at /nowhere"),
        (["runs", ".", "--sort", "nmae"], "danling: --sort nmae: must be one of name, config_id, status"),
    ],
)
def test_an_unknown_path_is_one_line_and_status_two(danling, argv, message):
    status, out, err = danling(*argv)
    assert status == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_an_unknown_verb_lists_the_verbs(danling):
    status, _, err = danling("shwo")
    assert status == 2 and "choose from" in err and "show" in err
    status, out, _ = danling()
    assert status == 2 and "verbs:" in out


def test_a_reader_that_goes_away_is_no_error(run, tmp_path):
    command = f"{sys.executable} -m danling.runners show --all {run.dir} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == "" and result.stdout.startswith("digits-")


# runs


def test_runs_lists_them_all_with_their_state(danling, tmp_path):
    make_run(tmp_path, "first", losses=(0.9, 0.5)).release()
    make_run(tmp_path, "dead", status="running", losses=(0.8,)).release()
    alive = make_run(tmp_path, "alive", status="running", losses=(0.7, 0.6, 0.65), epochs=4)
    (tmp_path / "no-run").mkdir()
    status, out, _ = danling("runs", tmp_path, "--json")
    assert status == 0
    runs = {entry["name"]: entry for entry in json.loads(out)["runs"]}
    assert {name: entry["status"] for name, entry in runs.items()} == {
        "first": "finished",
        "dead": "killed",
        "alive": "killed",  # the lock is held by this very process and seen by it, see below
    } | {"alive": "running"}
    assert runs["first"]["progress"] == pytest.approx(2 / 3) and runs["alive"]["progress"] == 0.75
    assert (runs["alive"]["latest"], runs["alive"]["best"]) == (0.65, 0.6)
    assert runs["alive"]["dir"] == str(alive.dir)
    alive.release()
    status, out, _ = danling("runs", tmp_path, "--sort", "name")
    header, *rows = out.splitlines()
    assert header.split()[:6] == ["name", "config_id", "status", "progress", "latest", "best"]
    assert [row.split()[0] for row in rows] == ["alive", "dead", "first"]
    assert rows[0].split()[2:6] == ["killed", "75%", "0.6500", "0.6000"]


def test_a_run_of_another_process_is_seen_to_live_and_to_die(danling, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_cli; w = test_cli.make_run(sys.argv[1], status='running');"
        "print('up', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    )
    with process:
        assert process.stdout.readline() == b"up\n"
        assert json.loads(danling("runs", tmp_path, "--json")[1])["runs"][0]["status"] == "running"
        process.kill()
        process.wait()
    assert json.loads(danling("runs", tmp_path, "--json")[1])["runs"][0]["status"] == "killed"


def test_damaged_files_do_not_stop_the_table(danling, run, tmp_path):
    (run.dir / "summary.json").write_text("{")
    status, out, _ = danling("runs", tmp_path)
    assert status == 0 and "unknown" in out and "digits" in out
    status, out, _ = danling("show", run.dir)
    assert status == 0 and "summary.json: " in out


@pytest.mark.parametrize("order", [[], ["--reverse"]])
def test_runs_without_a_number_come_last(danling, tmp_path, order):
    for name, losses in (("good", (0.1,)), ("bad", (0.9,)), ("nan", (float("nan"),)), ("new", ())):
        make_run(tmp_path, name, losses=losses).release()
    found = json.loads(danling("runs", tmp_path, "--sort", "latest", "--json", *order)[1])["runs"]
    names = [entry["name"] for entry in found]
    assert names[:2] == (["bad", "good"] if order else ["good", "bad"])
    assert set(names[2:]) == {"nan", "new"}


def test_no_runs(danling, tmp_path):
    assert danling("runs", tmp_path) == (0, f"no runs below {tmp_path}\n", "")


# show


def test_show_tells_the_whole_story(danling, run):
    status, out, _ = danling("show", run.dir)
    assert status == 0
    assert out.startswith(f"digits-{run.config_id}\n")
    for line in (
        r"  status +finished",
        r"  progress +100%",
        r"  optim\.lr +0\.1",
        r"best: index 2, global_step 20, score 0\.5000",
        r"latest: index 3, global_step 30, score 0\.7000",
        r"epoch-2 +full +20 +2 +0\.5000 +7 B +best",
        r"epoch-3 +full +30 +3 +0\.7000 +7 B +latest",
        r"1 +\d{4}-\d\d-\d\dT.* finished",
        r"problems: none",
        r"  git +aaaa",
    ):
        assert re.search(f"^{line}", out, re.M), line
    assert "checkpoint.keep_latest_k" not in out and "at their defaults" in out
    assert "keep_latest_k: 0" in danling("show", run.dir, "--all")[1]


def test_show_takes_anything_inside_a_run(danling, run):
    expected = danling("show", run.dir, "--json")[1]
    for inside in (run.checkpoint_dir / "epoch-1", run.checkpoint_dir / "latest.pointer", run.dir / "results.json"):
        shown = json.loads(danling("show", inside, "--json")[1])
        assert Path(shown.pop("dir")).samefile(run.dir)
        known = json.loads(expected)
        known.pop("dir")
        assert shown == known


def test_show_names_problems_and_errors(danling, tmp_path):
    workspace = make_run(tmp_path)
    problems = Problems()
    problems.logger.disabled = True
    problems.add("tensorboard", OSError("disk full"))
    problems.logger.disabled = False
    summary = Summary(workspace.dir / "summary.json", timestamp="t", problems=problems)
    summary.write("failed", error=ValueError("no model"), reason="broken")
    workspace.release()
    out = danling("show", workspace.dir)[1]
    assert re.search(r"status +failed \(broken\)", out) and re.search(r"error +ValueError: no model", out)
    assert "tensorboard: 1 times, last OSError: disk full" in out
    assert re.search(r"^2 .* failed +broken", out, re.M)


# diff


def test_diff_separates_what_identifies_from_the_rest(danling, tmp_path):
    a = make_run(tmp_path, lr=0.1, epochs=3, git="aaaa")
    b = make_run(tmp_path, lr=1e-5, epochs=5, losses=(0.8, 0.4), git="bbbb")
    for workspace in (a, b):
        workspace.release()
    status, out, _ = danling("diff", a.dir, b.dir, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["identity"] == {"optim.lr": [0.1, 1e-05]}
    assert found["config"] == {"epochs": [3, 5]}
    assert found["git"] == {"revision": ["aaaa", "bbbb"]}
    assert found["best"]["score"] == [0.5, 0.4] and found["best"]["val/acc"] == [0.5, 0.6]
    out = danling("diff", a.dir, b.dir)[1]
    assert re.search(r"^optim\.lr +0\.1 +1e-05$", out, re.M) and re.search(r"^val/loss +0\.5000 +0\.4000$", out, re.M)


def test_diff_of_a_run_with_itself(danling, run):
    out = danling("diff", run.dir, run.dir)[1]
    assert out.startswith("identity: the same experiment") and "git: the same revision" in out


def test_diff_of_runs_outside_of_git_claims_no_revision(danling, tmp_path):
    a, b = make_run(tmp_path, lr=0.1), make_run(tmp_path, lr=0.2)
    for workspace in (a, b):
        for file in workspace.metadata_dir.glob("git.*"):
            file.unlink()
    assert "git: no revision is recorded of either run" in danling("diff", a.dir, b.dir)[1]


def test_diff_without_metadata_works_from_the_configuration(danling, tmp_path):
    a, b = make_run(tmp_path, lr=0.1), make_run(tmp_path, lr=0.2)
    for workspace in (a, b):
        workspace.release()
        for file in workspace.metadata_dir.iterdir():
            file.unlink()
    assert json.loads(danling("diff", a.dir, b.dir, "--json")[1])["identity"] == {"optim.lr": [0.1, 0.2]}


# plot


def test_plot_writes_every_format(danling, run, tmp_path):
    pytest.importorskip("matplotlib")
    for suffix, magic in ((".png", b"\x89PNG"), (".html", b"<!doctype html>")):
        target = tmp_path / f"curves{suffix}"
        assert danling("plot", run.dir, "-o", target) == (0, f"{target}\n", "")
        assert target.read_bytes().startswith(magic)
    page = (tmp_path / "curves.html").read_text()
    assert "<svg" in page and "<script" not in page and "src=" not in page


def test_the_curves_are_the_effective_series(run, danling):
    from danling.runners.cli.plot import choose_panels, read_curves
    from danling.runners.cli.run_files import RunFiles

    file = MetricsFile(run.dir / "metrics.jsonl", attempt=2)
    file.append("resume", global_step=20, epoch=2)
    file.append("evaluate", global_step=30, epoch=3, split="val", values={"loss": 0.25, "acc": 0.75})
    file.close()
    curves = read_curves(RunFiles(run.dir), "digits")
    by_name = {(c.split, c.metric, c.dense): c for c in curves}
    assert by_name["val", "loss", False].steps == [10, 20, 30]
    assert by_name["val", "loss", False].values == [0.9, 0.5, 0.25]
    assert len(by_name["train", "loss", True].steps) == 20
    assert {name: len(panel) for name, panel in choose_panels(curves, None).items()} == {"loss": 2, "acc": 1}
    assert list(choose_panels(curves, ["val/loss", "lr"])) == ["val/loss", "lr"]


def test_a_legend_of_long_names_fits_the_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(5.2, 3.6), layout="constrained")
    from danling.runners.cli.plot import _add_legend

    axis = figure.subplots()
    _add_legend(figure, {f"docstrings-571435d42caf {index} train": axis.plot([0, 1])[0] for index in range(4)})
    figure.canvas.draw()
    (legend,) = figure.legends
    assert 0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= figure.bbox.width
    assert len(legend.get_texts()) == 4


def test_plot_errors_name_the_way_out(danling, run, tmp_path):
    assert danling("plot", run.dir, "--metric", "los")[2] == (
        "danling: --metric los: never logged; there is train/loss, train/lr, val/acc, val/loss\n"
    )
    assert "must end in .png" in danling("plot", run.dir, "-o", tmp_path / "x.gif")[2]
    assert "no such directory" in danling("plot", run.dir, "-o", tmp_path / "no" / "x.png")[2]
    (run.dir / "metrics.jsonl").unlink()
    assert "nothing was logged yet" in danling("plot", run.dir)[2]


def test_plot_without_matplotlib_names_the_install(danling, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = danling("plot", run.dir, "-o", tmp_path / "x.png")
    assert status == 2 and 'pip install "danling-runner-core[plot]"' in err
    assert not (tmp_path / "x.png").exists()


# verify


def test_verify_a_whole_checkpoint(danling, run):
    for path in ("epoch-2", "best", "best.pointer"):
        status, out, _ = danling("verify", run.checkpoint_dir / path)
        assert (status, out) == (0, f"{run.checkpoint_dir / 'epoch-2'}: whole\n")
    status, out, _ = danling("verify", run.dir)
    assert status == 0 and [Path(line.split(":")[0]).name for line in out.splitlines()] == [
        "epoch-1",
        "epoch-2",
        "epoch-3",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.pt").write_bytes(b"weighty"), "model.pt: its checksum differs"),
        (lambda path: (path / "model.pt").write_bytes(b"wei"), "model.pt: 3 bytes, 7 expected"),
        (lambda path: (path / "model.pt").unlink(), "model.pt: missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ],
)
def test_verify_names_the_bad_file_and_fails(danling, run, damage, message):
    damage(run.checkpoint_dir / "epoch-2")
    status, out, _ = danling("verify", run.checkpoint_dir / "epoch-2")
    assert status == 1 and "epoch-2: damaged" in out and message in out
    status, out, _ = danling("verify", run.dir, "--json")
    found = {Path(item["checkpoint"]).name: item["whole"] for item in json.loads(out)["checkpoints"]}
    assert status == 1 and found == {"epoch-1": True, "epoch-2": False, "epoch-3": True}


def test_a_directory_that_lost_its_manifest_is_not_whole(danling, run):
    (run.checkpoint_dir / "epoch-2" / "manifest.json").unlink()
    assert danling("verify", run.dir)[0] == 1


# export


def test_export_refuses_before_it_loads_anything(danling, run, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    checkpoint = run.checkpoint_dir / "epoch-1"
    assert "--force overwrites it" in danling("export", checkpoint, there)[2]
    assert "must end in .safetensors" in danling("export", checkpoint, tmp_path / "x.bin")[2]
    assert "no such directory" in danling("export", checkpoint, tmp_path / "no" / "x.safetensors")[2]
    (checkpoint / "model.pt").write_bytes(b"bad")
    status, _, err = danling("export", checkpoint, there, "--force")
    assert status == 2 and "model.pt: 3 bytes, 7 expected" in err and there.read_text() == "mine"


# stacks


def test_stacks(danling):
    status, out, _ = danling("stacks", "--json")
    entries = {entry["name"]: entry for entry in json.loads(out)["stacks"]}
    assert status == 0 and list(entries)[:4] == ["torch", "parallel", "deepspeed", "accelerate"]
    assert entries["torch"]["target"] == "danling.backends.torch:TorchRunner" and entries["torch"]["installed"]
    table = danling("stacks")[1].splitlines()
    assert table[0].split() == ["stack", "class", "package", "version", "state"]
    assert table[1].split()[0] == "torch" and table[1].split()[-1] == "installed"


def test_stacks_can_check_that_engines_load(danling, monkeypatch):
    monkeypatch.setattr("danling.runners.cli.stacks.load_engine", fail_for_torch)
    out = danling("stacks", "--check")[1]
    assert "cannot be loaded: no libcudart" in out


def fail_for_torch(name):
    from danling.runners.errors import StackError

    raise StackError(f"stack {name!r} cannot be loaded: no libcudart")


def test_the_yaml_of_a_run_is_read_as_it_was_written(run):
    from danling.runners.cli.run_files import RunFiles

    config = RunFiles(run.dir).config
    assert config["optim"]["lr"] == 0.1 and config["dataloader"]["prefetch_factor"] is None
    assert "type: sgd" in dump_yaml(config)
