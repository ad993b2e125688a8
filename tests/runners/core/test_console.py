"""What a person sees: streams, the log file, tables, and the bar on a real terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from danling.runners.console import Console, Progress, evaluation_table, table
from danling.runners.problems import Problems


@pytest.fixture
def console(request):
    console = Console(request.node.name)
    yield console
    console.close()


def on_a_terminal(body, columns=100, **environment):
    """Run a script whose stdout and stderr are a terminal; return what came over the line."""
    primary, secondary = pty.openpty()
    env = (
        {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        | {"TERM": "xterm", "COLUMNS": str(columns)}
        | environment
    )
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=secondary, stderr=secondary, env=env
    )
    os.close(secondary)
    chunks = []
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(primary)
    assert process.wait() == 0, b"".join(chunks).decode()
    return b"".join(chunks).decode()


def screen(text):
    """What is left of terminal output: the lines that were not erased."""
    lines = [""]
    row = 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == "\r":
            pass
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token.startswith("\x1b"):
            pass
        else:
            lines[row] += token
    return [line.rstrip() for line in lines]


def test_the_logger_has_a_name_of_its_own_and_leaves_the_root_alone(console):
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    assert console.logger.name.startswith("danling.run.") and not console.logger.propagate
    console.logger.info("hello")
    console.close()
    assert not [handler for handler in console.logger.handlers if type(handler).__module__.startswith("danling")]
    assert (list(root.handlers), root.level) == before


def test_streams_by_level(console, capsys):
    console.logger.debug("silent")
    console.logger.info("to stdout")
    console.logger.warning("to stderr")
    console.logger.error("also")
    out, err = capsys.readouterr()
    assert out == "to stdout\n"
    assert err == "WARNING: to stderr\nERROR: also\n"


def test_other_ranks_say_who_they_are_and_only_when_it_matters(capsys):
    console = Console("other", rank=3)
    console.logger.info("nothing")
    console.logger.warning("careful")
    console.close()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"\[rank 3 on \S+\] WARNING: careful\n", err)


def test_the_log_file_has_everything_with_time_and_level(console, tmp_path, capsys):
    console.log_to(tmp_path / "logs" / "run.log")
    console.block("run digits", {"stack": "torch", "nothing": None})
    console.logger.warning("careful")
    console.close()
    text = (tmp_path / "logs" / "run.log").read_text()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO run digits\n  stack  torch\n", text)
    assert text.endswith("WARNING careful\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_no_log_line_elsewhere(tmp_path, capsys):
    problems = Problems(logging.getLogger("test.console"))
    console = Console("full", problems=problems)
    (tmp_path / "run.log").symlink_to("/dev/full")
    console.log_to(tmp_path / "run.log")
    console.logger.info("hello")
    console.close()
    assert capsys.readouterr().out == "hello\n"
    assert problems.as_list()[0]["service"] == "log file" and "No space left" in problems.as_list()[0]["first"]


def test_a_log_file_that_cannot_be_opened_is_a_problem(tmp_path):
    problems = Problems(logging.getLogger("test.console"))
    console = Console("blocked", problems=problems)
    (tmp_path / "logs").write_text("in the way")
    console.log_to(tmp_path / "logs" / "run.log")
    console.close()
    assert problems.as_list()[0]["service"] == "log file"


def test_without_a_terminal_a_log_point_is_a_plain_line(console, capsys):
    console.start_progress(total=200)
    assert not console.bar.live
    console.log("epoch 1/2 train", 50, 100, {"loss": 0.5, "lr": 3e-4})
    console.log("train", 7, None, {"loss": float("nan")})
    assert capsys.readouterr().out == "epoch 1/2 train [50/100] loss 0.5  lr 0.0003\ntrain [7/?] loss nan\n"


def test_a_table_folds_where_the_terminal_ends():
    text = table(["split", "accuracy", "auroc", "f1"], [["val", "0.9", "0.8", "0.7"]], width=22)
    assert text == "split  accuracy  auroc\nval         0.9    0.8\n\nsplit   f1\nval    0.7"


def test_the_evaluation_table_shows_the_best_before_and_marks_the_new_one():
    before = {"val": {"loss": 0.31, "acc": 0.9}}
    row = {"train": {"loss": 0.25}, "val": {"loss": 0.3, "acc": 0.9125, "confusion": [[1, 2]]}}
    assert evaluation_table(row, before, mark=("val", "acc")).splitlines() == [
        "split  loss             acc",
        "train  0.2500           -",
        "val    0.3000 (0.3100)  0.9125* (0.9000)",
    ]


BAR = """
    import sys, time
    from danling.runners.console import Console
    out, err = sys.stdout, sys.stderr
    console = Console("bar", progress={progress})
    bar = console.start_progress(total=40, completed=10, epochs=4)
    assert sys.stdout is out and sys.stderr is err
    for step in range(11, 41):
        time.sleep(0.01)
        bar.advance(step, (step - 1) // 10)
        if step % 10 == 0:
            console.log("train", step, 40, {{"loss": 1 / step}})
            bar.start_evaluation("val", 5)
            for batch in range(5):
                time.sleep(0.02)
                bar.advance_evaluation(batch + 1)
            bar.end_evaluation()
            console.logger.info("row of step %d", step)
            console.logger.warning("warned at %d", step)
    bar.close(40, 4)
    console.close()
    print("after")
"""


def test_the_bar_on_a_terminal():
    text = on_a_terminal(BAR.format(progress=None))
    assert [line for line in screen(text) if line] == [
        "row of step 20",
        "WARNING: warned at 20",
        "row of step 30",
        "WARNING: warned at 30",
        "row of step 40",
        "WARNING: warned at 40",
        next(line for line in screen(text) if line.startswith("epoch 4/4")),
        "after",
    ]
    last = next(line for line in screen(text) if line.startswith("epoch 4/4"))
    assert "40/40" in last and "loss 0.025" in last and "/s" in last and "ETA" not in last
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "ETA" in plain
    evaluation = plain[plain.index("  val ") : plain.index("row of step 20")]
    assert re.search(r"20/40 .*loss 0.05\r\n  val +\S+ 1/5", evaluation)  # where the run stands, and the second bar
    after = plain[plain.index("row of step 20") : plain.index("WARNING: warned at 20")]
    assert "20/40" in after and "  val " not in after  # which goes when the evaluation is over
    assert "train [20/40]" not in plain  # the bar shows it; the line is for the log file
    drawn = text.count("epoch ")
    assert drawn <= 4 * 0.6 + 3 * 6 + 3, f"drawn {drawn} times in about 0.6 s"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is there


def test_colours_are_left_out_when_asked():
    assert "\x1b[3" not in on_a_terminal(BAR.format(progress=None), NO_COLOR="1")


def test_the_bar_can_be_switched_off_on_a_terminal():
    text = on_a_terminal(BAR.format(progress=False))
    assert "epoch 4/4" not in text and "train [20/40] loss 0.05" in text


def test_the_bar_can_be_forced_elsewhere():
    code = textwrap.dedent(BAR.format(progress=True))
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert any(line.startswith("epoch 4/4") for line in screen(out))


def test_a_dumb_terminal_gets_lines():
    text = on_a_terminal(BAR.format(progress=None), TERM="dumb")
    assert "train [20/40] loss 0.05" in text and "\x1b[" not in text


def test_a_bar_of_unknown_length():
    text = on_a_terminal(
        """
        import time
        from danling.runners.console import Console
        console = Console("bar")
        bar = console.start_progress(total=None)
        for step in range(1, 60):
            time.sleep(0.01)
            bar.advance(step, 0)
        bar.close(59, 0)
        console.close()
        """
    )
    last = [line for line in screen(text) if line][-1]
    assert last.startswith("step") and "59/?" in last and "ETA" not in last


def test_a_bar_that_nobody_sees_does_nothing():
    bar = Progress()
    bar.advance(1, 0)
    bar.log({"loss": 1.0})
    bar.start_evaluation("val", 3)
    bar.advance_evaluation(1)
    bar.end_evaluation()
    bar.close()
    assert not bar.live


def test_the_console_costs_no_rich_where_there_is_no_bar():
    code = "import sys; from danling.runners.console import Console; c = Console('x'); c.start_progress(total=1);"
    code += "c.block('a', {}); c.close(); assert not [m for m in sys.modules if m.split('.')[0] in ('rich', 'torch')]"
    subprocess.run([sys.executable, "-c", code], check=True)
