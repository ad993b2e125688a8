"""The command line of a training script: words into typed keys, files, help, errors that end the script."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from danling.runners import ConfigError, RunnerConfig
from danling.runners.commandline import split_arguments
from danling.runners.errors import UsageError


class Config(RunnerConfig):
    epochs: int = 3
    width: int = 64
    sizes: list[int] = [1]
    tags: list[str] = []
    title: str | None = None
    fast: bool = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.hidden = 32


OWN = ["width", "sizes", "tags", "title", "fast", "model.hidden"]


def parse(text: str, cls=Config):
    return cls().parse(text.split())


def refused(arguments, capsys, cls=Config) -> str:
    with pytest.raises(UsageError) as caught:
        cls().parse(arguments.split() if isinstance(arguments, str) else arguments)
    assert isinstance(caught.value, ConfigError) and isinstance(caught.value, SystemExit) and caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == "" and str(caught.value) in written.err and "--help" in written.err
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["--optim.lr 3e-4", "--optim.lr=3e-4", "--optimizer.lr 0.0003", "--optim.lr 1 --optim.lr 3e-4"]
)
def test_ways_to_give_a_number(text):
    assert parse(text).optim.lr == 3e-4


def test_a_negative_number_is_a_value():
    assert parse("--optim.lr -1").optim.lr == -1.0
    assert parse("--optim.lr -1e-3 --epochs 2").optim.lr == -1e-3
    assert parse("--data.shift -2 -3").data.shift == [-2, -3]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("--log", "log", True),
        ("--no-log", "log", False),
        ("--no_log", "log", False),
        ("--log off", "log", False),
        ("--log=No", "log", False),
        ("--no-ema.enabled", "ema.enabled", False),
        ("--fast", "fast", True),
        ("--no-fast", "fast", False),
        ("--optim.no_decay", "optim.no_decay", True),
        ("--optim.no-decay=0", "optim.no_decay", False),
        ("--progress none", "progress", None),
        ("--seed null", "seed", None),
        ("--seed 0", "seed", 0),
        ("--epochs 1e3", "epochs", 1000),
        ("--name 3", "name", "3"),
        ("--name none", "name", None),
        ("--lineage 1e3", "lineage", "1e3"),
        ("--train-splits a b", "train_splits", ["a", "b"]),
        ("--train_splits 1", "train_splits", ["1"]),
        ("--train_splits none", "train_splits", None),
        ("--train_splits [a,b]", "train_splits", ["a", "b"]),
        ("--optim.betas 0.9 0.95", "optim.betas", [0.9, 0.95]),
        ("--optim.betas=[0.9,0.95]", "optim.betas", [0.9, 0.95]),
        ("--optim.eps 1e-8", "optim.eps", 1e-8),
        ("--optim.nesterov", "optim.nesterov", True),
        ("--optim.foreach none", "optim.foreach", None),
        ("--scheduler.milestones 10 20", "scheduler.milestones", [10, 20]),
        ("--checkpoint.interval 500steps", "checkpoint.interval", "500 steps"),
        ("--eval_interval 2", "eval_interval", 2),
        ("--checkpoint.exclude_from_loading ema", "checkpoint.exclude_from_loading", "ema"),
        ("--checkpoint.exclude_from_loading ema rng", "checkpoint.exclude_from_loading", ["ema", "rng"]),
        ("--dataloader.val.batch_size 8", "dataloader.val.batch_size", 8),
        ("--dataloader.shuffle no", "dataloader.shuffle", False),
        ("--deepspeed.zero_optimization.stage 2", "deepspeed.zero_optimization.stage", 2),
        ("--precision BF16", "precision", "bf16"),
        ("--parallel.axes.shard -1", "parallel.axes.shard", -1),
        ("--fsdp.reshard_after_forward 4", "fsdp.reshard_after_forward", 4),
        ("--width 1e2", "width", 100),
        ("--sizes 3 4", "sizes", [3, 4]),
        ("--sizes 3", "sizes", [3]),
        ("--checkpoint.interval 500 steps", "checkpoint.interval", "500 steps"),
        ("--tags 3 x", "tags", ["3", "x"]),
        ("--title none", "title", None),
        ("--title 5", "title", "5"),
        ("--model.hidden 8", "model.hidden", 8),
        ("--model.act gelu", "model.act", "gelu"),
        ("--model.deep", "model.deep", True),
        ("--no-model.deep", "model.deep", False),
        ("--model.sizes 1 2 x", "model.sizes", [1, 2, "x"]),
        ("--model.rate 1e-3", "model.rate", 1e-3),
        ("--model.at 12:30", "model.at", "12:30"),
        ("--data.root none", "data.root", None),
        ("--data.flag true", "data.flag", True),
        ("--data.x.y.z 1", "data.x.y.z", 1),
    ],
)
def test_values(text, key, value):
    found = parse(text)[key]
    assert found == value and type(found) is type(value)


class Open(RunnerConfig):
    """Annotations that leave open what the items are."""

    listed: list = [1]
    perhaps: list | None = None
    pair: tuple = (1, 2)
    anything: Any = None
    words: list[str] = []
    either: str | list = ""


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("--listed 3 4.5 a true", "listed", [3, 4.5, "a", True]),
        ("--listed 3", "listed", [3]),
        ("--perhaps 1e-3", "perhaps", [0.001]),
        ("--perhaps none", "perhaps", None),
        ("--pair 3 4", "pair", (3, 4)),
        ("--anything 7", "anything", 7),
        ("--words 3 4", "words", ["3", "4"]),
        ("--either 7", "either", "7"),
    ],
)
def test_items_without_a_type_are_what_they_look_like(text, key, value):
    found = parse(text, Open)[key]
    assert found == value and type(found) is type(value)


def test_mappings_and_values_with_spaces():
    config = Config().parse(
        [
            "--compile.options",
            "{a: 1, b: x}",
            "--checkpoint.interval",
            "500 steps",
            "--model.kw",
            "{a: 1}",
            "--title",
            "a b",
        ]
    )
    assert config.compile.options.dict() == {"a": 1, "b": "x"} and config.checkpoint.interval == "500 steps"
    assert config.model.kw.a == 1 and config.title == "a b"
    config = Config().parse(["--title=--odd", "--model.text="])
    assert config.title == "--odd" and config.model.text is None


def test_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "9"])
    assert Config().parse().epochs == 9
    assert Config().parse([]).epochs == 3


def test_files_come_first_and_later_ones_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("epochs: 5\nwidth: 1\noptim: {lr: 1e-3, type: sgd}\nmodel: {hidden: 1, depth: 2}\n")
    second.write_text('{"width": 2, "optim": {"lr": 0.01}, "model.hidden": 4}')
    config = Config().parse(["--optim.lr", "0.5", "--config", str(first), "--config", str(second), "--epochs", "6"])
    assert (config.epochs, config.width, config.optim.lr, config.optim.type) == (6, 2, 0.5, "sgd")
    assert config.model.dict() == {"hidden": 4, "depth": 2}
    assert Config().parse(["--config", str(first), str(second)]).width == 2
    assert Config().parse([f"--config={first}"]).epochs == 5
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert Config().parse(["--config", str(empty)]).epochs == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.yaml", None, ["not found"]),
        ("bad.yaml", "a: [1", ["not valid", "line"]),
        ("bad.json", "{", ["not valid"]),
        ("list.yaml", "- 1", ["holds a list"]),
        ("typo.yaml", "optin: {lr: 1}", ["optin", "'optim'"]),
        ("wrong.yaml", "epochs: soon", ["epochs: 'soon'"]),
        ("old.yaml", "checkpoint: path", ["checkpoint: 'path'", "resume"]),
        ("binary.yaml", b"\xff\xfe\x00", ["cannot be read"]),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(["--config", str(path)], capsys)
    assert all(word in message for word in words)
    if len(words) == 1 and words[0] in ("not found", "not valid", "holds a list", "cannot be read"):
        assert name in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--epoch 5", ["epoch: unknown key (value 5)", "'epochs'", "model.epoch", "(epoch: int)"]),
        ("--lr 1e-3", ["lr: unknown key", "'optim.lr'"]),
        ("--optin.lr 1", ["optin: unknown section", "'optim'"]),
        ("--checkpoint.intervall 3", ["checkpoint.intervall: unknown key", "'checkpoint.interval'"]),
        ("--dataloader.train.batchsize 3", ["dataloader.train.batchsize: unknown key", "batch_size"]),
        ("--epochs three", ["epochs: 'three' (str) is not allowed; give a whole number >= 1"]),
        ("--epochs 0", ["epochs: '0'"]),
        ("--epochs", ["--epochs: needs a value"]),
        ("--epochs 1 2", ["--epochs: takes one value, got 2: 1 2"]),
        ("--width", ["--width: needs a value"]),
        ("--width 1.5", ["width: '1.5'"]),
        ("--width 1 2", ["width: ['1', '2']"]),
        ("--epochs 2 --steps 5", ["steps: 5", "epochs: 2"]),
        ("--log maybe", ["log: 'maybe'", "true or false"]),
        ("--no-log yes", ["no_log"]),
        ("3 --epochs 2", ["3: unexpected"]),
        ("--config", ["--config: needs the path"]),
        ("--checkpoint runs/a", ["checkpoint: 'runs/a'", "resume"]),
        ("--world_size 2", ["world_size", "WORLD_SIZE"]),
        ("--precision fp17", ["precision: 'fp17'", "bf16"]),
        ("--sched.type a --scheduler.type b", ["sched.type", "scheduler.type", "'a'", "'b'"]),
        ("--model.hidden 3 --model 4 --model.x.y 1 --model.x 2 --model.x.z 3", ["model"]),
    ],
)
def test_refused(text, words, capsys):
    message = refused(text, capsys)
    assert all(word in message for word in words), message


def test_every_problem_of_the_words_is_reported_at_once(capsys):
    message = refused("x --epochs three --lr 3 --optim.lr fast --optin.lr 3 --ema.decai 0.9", capsys)
    assert message.startswith("6 problems") and len(message.splitlines()) == 7


def test_an_older_name_on_the_command_line(capsys):
    with pytest.warns(DeprecationWarning, match="'epoch_end' is now called 'epochs'"):
        assert parse("--epoch_end 7").epochs == 7
    with pytest.warns(DeprecationWarning):
        assert parse("--save_interval 2").checkpoint.interval == 2
    with pytest.warns(DeprecationWarning):
        message = refused("--epoch_end 7 --epochs 8", capsys)
    assert "epoch_end" in message and "epochs: 8" in message
    assert "epochs: 'soon'" in refused("--epoch_end soon", capsys)


def test_help_lists_every_key_own_ones_first(capsys):
    with pytest.raises(SystemExit) as caught:
        Config().parse(["--epochs", "3", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    from danling.runners.keys import KEYS

    lines = text.splitlines()
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert set(options) == {f"--{name}" for name in KEYS} | {
        "--width",
        "--sizes",
        "--tags",
        "--title",
        "--fast",
        "--model.hidden",
    }
    assert len(options) == len(set(options))
    assert text.index("--width INT") < text.index("--model.hidden INT") < text.index("--stack STR")
    for name, key in KEYS.items():
        start = next(i for i, line in enumerate(lines) if line.split()[:1] == [f"--{name}"])
        assert key.kind.upper() in lines[start]
        words = " ".join(" ".join(lines[start : start + 5]).split())
        assert key.meaning in words
    assert "(default: 3)" in " ".join(text.split()) and "checkpoint:" in lines and "your keys:" in lines


def test_a_reader_of_the_help_that_goes_away_is_no_error(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("from danling.runners import RunnerConfig\nRunnerConfig().parse()\n")
    command = f"{sys.executable} {script} --help | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == "" and result.stdout.startswith("usage: train.py")


def test_split_arguments():
    line = split_arguments(["-h", "--a-b.c-d", "-1", "--x=1=2", "y"])
    assert line.help and [(o.key, o.words) for o in line.options] == [("a_b.c_d", ["-1"]), ("x", ["1=2"])]
    assert line.problems == ["y: unexpected; every setting is given as --key value"]


def test_a_script_ends_with_status_2_and_without_a_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "from danling.runners import RunnerConfig\nconfig = RunnerConfig().parse()\nprint(config.epochs)\n"
    )
    done = [
        subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
        for arguments in (["--epochs", "4"], ["--epochs", "x"], ["--help"])
    ]
    assert [item.returncode for item in done] == [0, 2, 0]
    assert done[0].stdout == "4\n"
    assert done[1].stderr.startswith("train.py: epochs: 'x'") and not done[1].stdout
    assert "Traceback" not in done[1].stderr
    assert done[2].stdout.startswith("usage: train.py") and not done[2].stderr
    assert Path(script).exists()
