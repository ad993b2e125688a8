"""Names are resolved on first use: nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import danling
import danling.runners as runners

HEAVY = ("torch", "chanfig", "numpy", "rich", "matplotlib", "tensorboard")


def loaded_after(code):
    code += f"; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True, capture_output=True, text=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import danling",
        "import danling.runners",
        "import danling; danling.stacks, danling.read_metrics, danling.CheckpointStore, danling.Results",
        "import danling; danling.Supervisor, danling.ConfigError, danling.on_main_process, danling.RunnerState",
        "import danling; danling.Runner, danling.BaseRunner, danling.Workspace",
        "import danling; dir(danling), danling.runners, dir(danling.runners), danling.stacks()",
    ],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded_after(code) == []


def test_the_configuration_alone_needs_chanfig():
    assert "chanfig" in loaded_after("import danling; danling.RunnerConfig")


def test_every_name_resolves():
    for name in runners.__all__:
        assert getattr(runners, name).__module__.startswith("danling.runners"), name
    for name in danling.__all__:
        assert getattr(danling, name) is not None
    for module in (runners, danling):
        assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("module", [runners, danling], ids=lambda module: module.__name__)
def test_type_checkers_see_the_same_names(module):
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    concrete = {"AccelerateRunner", "DeepSpeedRunner", "ParallelRunner", "TorchRunner"}  # there only where installed
    assert typed == {name: home for name, home in module._HOME.items() if name not in concrete}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'danling.runners' has no attribute 'Runer'"):
        runners.Runer  # noqa: B018
    with pytest.raises(AttributeError, match="module 'danling' has no attribute 'Runer'"):
        danling.Runer  # noqa: B018
    assert not hasattr(danling, "nothing")


def test_the_umbrella_gives_the_same_objects():
    for name in runners.__all__:
        assert getattr(danling, name) is getattr(runners, name)
    assert danling.Config is danling.RunnerConfig
    assert danling.__version__.count(".") == 2


def test_a_missing_piece_names_its_install():
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("danling.tensors", "danling.metrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import danling
for use in (lambda: danling.NestedTensor, lambda: danling.tensors, lambda: danling.METRICS):
    try:
        use()
    except ImportError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == [
        "danling.tensors is not installed: pip install danling-tensors",
        "danling.tensors is not installed: pip install danling-tensors",
        "danling.metrics is not installed: pip install danling-metrics",
    ]


def test_an_error_inside_a_piece_is_not_taken_for_a_missing_piece():
    code = """
import sys
sys.modules["torch"] = None
import danling
try:
    danling.NestedTensor
except ImportError as error:
    assert "pip install danling-tensors" not in str(error), error
    assert "torch" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
