"""The example of the front page: it learns, it learns the same thing everywhere, and it goes on where it ended."""

import importlib.util

import pytest

GOLDEN = {1: (1.77102, 0.60738, 0.60757), 2: (0.37423, 0.22285, 0.17127)}  # loss of train, val, test


@pytest.fixture(scope="module")
def digits(request):
    path = request.config.rootpath / "docs" / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(digits, tmp_path, capsys):
    def train(*words):
        with digits.Digits(digits.Config().parse(["--workspace_root", str(tmp_path), *words])) as runner:
            runner.train()
        return runner.results.rows(), capsys.readouterr().out

    rows, shown = train()
    for epoch, losses in GOLDEN.items():
        assert [rows[epoch][split]["loss"] for split in ("train", "val", "test")] == pytest.approx(losses, rel=5e-3)
    assert rows[10]["test"]["acc"] >= 0.97
    for words in (
        "run digits-",
        "splits",
        "budget",
        "val/acc, max is best",
        "epoch 10/10",
        "finished",
        "checkpoint",
        "directory",
    ):
        assert words in shown
    more, shown = train("--auto_resume", "true", "--epochs", "12")
    assert list(more) == list(range(1, 13)) and {epoch: more[epoch] for epoch in rows} == rows
    assert "resumed from" in shown
