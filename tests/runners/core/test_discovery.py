"""Stacks are found through entry points of real (tiny) distributions, and chosen without importing engines."""

from __future__ import annotations

import sys
import textwrap
from importlib import metadata

import pytest

from danling.runners.discovery import GROUP, KNOWN, StackError, check_engine, load_engine, resolve_stack, stacks

ENGINE = """
    from danling.runners import BaseRunner
    class {name}(BaseRunner):
        stack = "{stack}"
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site directory in which the test installs packages; only these and no others provide stacks."""
    directory = tmp_path / "site"
    directory.mkdir()

    def entry_points(*, group):
        found = metadata.MetadataPathFinder.find_distributions(
            metadata.DistributionFinder.Context(path=[str(directory)])
        )
        return [entry for d in found for entry in d.entry_points if entry.group == group]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    monkeypatch.syspath_prepend(str(directory))
    before = set(sys.modules)

    def install(distribution, entries, modules=None, version="1.0", requires=()):
        info = directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {name}\n" for name in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}")
        lines = "\n".join(f"{name} = {target}" for name, target in entries.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")
        for name, body in (modules or {}).items():
            (directory / f"{name}.py").write_text(textwrap.dedent(body))

    yield install
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(directory) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture
def ours(site):
    for stack, distribution in KNOWN.items():
        name = stack.capitalize()
        site(
            distribution, {stack: f"engine_{stack}:{name}"}, {f"engine_{stack}": ENGINE.format(name=name, stack=stack)}
        )
    return site


def config(**values):
    axes = values.pop("axes", {})
    return {"stack": "auto", "parallel": {"axes": axes}, "deepspeed": None, "accelerate": None} | values


def test_what_is_not_installed_comes_with_its_install(site):
    known = stacks()
    assert list(known) == ["torch", "parallel", "deepspeed", "accelerate"]
    assert not any(info.installed for info in known.values())
    assert known["accelerate"].install == "pip install danling-runner-accelerate"


def test_listing_imports_nothing(ours):
    ours("danling-toy", {"toy": "toy_engine:Toy"}, {"toy_engine": "raise SystemExit('imported')"}, version="2.5")
    found = stacks()
    assert list(found) == [*KNOWN, "toy"]
    toy = found["toy"]
    assert (toy.target, toy.distribution, toy.version, toy.problem) == ("toy_engine:Toy", "danling-toy", "2.5", None)
    assert toy.installed and toy.install is None
    assert "toy_engine" not in sys.modules


def test_a_missing_requirement_is_seen_without_importing(site):
    site(
        "danling-toy",
        {"toy": "toy_engine:Toy"},
        requires=["no-such-engine-anywhere>=1", "pytest", "other; extra == 'x'"],
    )
    toy = stacks()["toy"]
    assert toy.problem == "needs no-such-engine-anywhere: pip install no-such-engine-anywhere"
    assert toy.installed and toy.install == "pip install no-such-engine-anywhere"


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("torch", "torch"),
        ("ddp", "torch"),
        ("ds", "deepspeed"),
        ("DeepSpeed", "deepspeed"),
        ("accelerate", "accelerate"),
    ],
)
def test_a_name_or_its_alias_decides(ours, asked, name):
    choice = resolve_stack(config(stack=asked))
    assert choice.name == name and choice.reason == "asked for"


def test_an_unknown_name_lists_what_there_is(site):
    site("danling-runner-torch", {"torch": "engine_torch:Torch"})
    with pytest.raises(StackError) as caught:
        resolve_stack(config(stack="torhc"))
    message = str(caught.value)
    assert "unknown stack 'torhc'; did you mean 'torch'? Installed: torch." in message
    assert "deepspeed (pip install danling-runner-deepspeed)" in message


def test_a_known_name_that_is_missing_says_how_to_get_it(site):
    with pytest.raises(StackError, match="stack 'parallel' is not installed: pip install danling-runner-parallel"):
        resolve_stack(config(stack="parallel"))


def test_auto_takes_torch(site):
    site("danling-runner-torch", {"torch": "engine_torch:Torch"})
    assert resolve_stack(config()).name == "torch"
    assert resolve_stack(config()).reason == "the default"


@pytest.mark.parametrize(
    ("usable", "name", "reason"),
    [
        ("def usable(): return True, ''", "deepspeed", "installed and usable"),
        ("def usable(): return False, 'no accelerator'", "torch", "DeepSpeed is not usable: no accelerator"),
        ("raise OSError('broken build')", "torch", "DeepSpeed is not usable: OSError: broken build"),
        ("", "deepspeed", "installed and usable"),
    ],
)
def test_auto_takes_deepspeed_where_it_can_be_used(site, usable, name, reason):
    site("danling-runner-torch", {"torch": "engine_torch:Torch"})
    site("danling-runner-deepspeed", {"deepspeed": "engine_ds:Ds"}, {"engine_ds": usable})
    choice = resolve_stack(config())
    assert (choice.name, choice.reason) == (name, reason)


def test_auto_goes_on_with_the_stack_of_the_checkpoint(ours):
    choice = resolve_stack(config(), checkpoint_stack="accelerate")
    assert (choice.name, choice.reason) == ("accelerate", "it wrote the checkpoint to resume from")


def test_a_section_decides_for_its_engine_or_fails(ours, site):
    assert resolve_stack(config(deepspeed={})).name == "deepspeed"
    assert resolve_stack(config(accelerate={}), checkpoint_stack="torch").name == "accelerate"
    with pytest.raises(StackError, match="both `deepspeed` and `accelerate`"):
        resolve_stack(config(deepspeed={}, accelerate={}))


def test_a_section_without_its_engine_says_how_to_get_it(site):
    site("danling-runner-torch", {"torch": "engine_torch:Torch"})
    with pytest.raises(StackError, match="pip install danling-runner-deepspeed"):
        resolve_stack(config(deepspeed={}))


def test_auto_does_not_choose_parallel(site):
    with pytest.raises(
        StackError, match=r"parallel.axes.tensor .*`stack: parallel` \(pip install danling-runner-parallel"
    ):
        resolve_stack(config(axes={"replicate": 1, "tensor": 2}))


def test_a_name_claimed_twice_names_both(ours):
    ours("danling-toy", {"toy": "a:A"})
    ours("another-toy", {"toy": "b:B"})
    ours("torch-thief", {"torch": "c:C"})
    with pytest.raises(StackError, match="claimed by another-toy and danling-toy"):
        resolve_stack(config(stack="toy"))
    with pytest.raises(StackError, match="claimed by danling-runner-torch and torch-thief"):
        load_engine("torch")


def test_a_name_of_ours_is_reserved(site):
    site("thief", {"accelerate": "c:C"})
    with pytest.raises(StackError, match="claimed by danling-runner-accelerate and thief"):
        resolve_stack(config(stack="accelerate"))


def test_a_name_has_lower_case_letters_digits_and_underscores(site):
    site("odd", {"My-Toy": "c:C"})
    assert "lower case" in stacks()["My-Toy"].problem


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("class Other: ...", "AttributeError"),
        ("class Toy: ...", "is no subclass of danling.runners.BaseRunner"),
        ("Toy = 3", "is no subclass of danling.runners.BaseRunner"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_an_engine_that_cannot_be_loaded_is_named(site, body, message):
    site("danling-toy", {"toy": "toy_engine:Toy"}, {"toy_engine": body})
    with pytest.raises(StackError, match="stack 'toy' of danling-toy 1.0") as caught:
        load_engine("toy")
    assert message in str(caught.value)


def test_an_engine_is_loaded_by_name(ours):
    engine = load_engine("ddp")
    assert engine.__name__ == "Torch" and engine.stack == "torch"


def test_a_class_that_is_fixed_to_an_engine_refuses_another(ours):
    engine = load_engine("torch")
    check_engine(engine, config())
    check_engine(engine, config(stack="ddp"))
    with pytest.raises(
        StackError, match="Torch is fixed to stack 'torch', but the configuration says stack: deepspeed"
    ):
        check_engine(engine, config(stack="deepspeed"))


def test_the_concrete_runners_are_reachable_by_name_or_name_their_install(ours, monkeypatch):
    import danling.runners

    monkeypatch.delitem(vars(danling.runners), "TorchRunner", raising=False)
    assert danling.runners.TorchRunner is load_engine("torch")
    monkeypatch.delitem(vars(danling.runners), "TorchRunner")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(ImportError, match="TorchRunner is not installed: pip install danling-runner-torch"):
        danling.runners.TorchRunner  # noqa: B018
