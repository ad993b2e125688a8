"""The workspace's shape: one version, one owner per file, dependencies that point downward only."""

from __future__ import annotations

import re
import subprocess

import pytest

from support.workspace import ROOT, imports, module_name, packages

PACKAGES = packages()
NAMES = [package.name for package in PACKAGES]

# What each package may import from the others; the umbrella re-exports everything lazily.
LAYERS = {
    "danling-tensors": set(),
    "danling-metrics": set(),
    "danling-optim": set(),
    "danling-runner-core": set(),
    "danling-runner-torch": {"danling-runner-core", "danling-metrics", "danling-optim"},
    "danling-runner-parallel": {"danling-runner-torch", "danling-runner-core", "danling-metrics", "danling-optim"},
    "danling-runner-deepspeed": {"danling-runner-torch", "danling-runner-core", "danling-metrics", "danling-optim"},
    "danling-runner-accelerate": {"danling-runner-torch", "danling-runner-core", "danling-metrics", "danling-optim"},
    "danling": {name for name in NAMES if name != "danling"},
}
# Optional neighbours: imported inside functions only, and the package works without them.
OPTIONAL = {"danling-runner-torch": {"danling-tensors"}, "danling-runner-core": {"danling-runner-torch"}}


OWNERS = {
    module_name(path): package.name for package in PACKAGES if package.name != "danling" for path in package.modules
}


def test_the_nine_packages_exist() -> None:
    assert set(NAMES) == set(LAYERS)


@pytest.mark.parametrize("package", PACKAGES, ids=NAMES)
def test_one_version_and_matching_sibling_ranges(package) -> None:
    version = PACKAGES[0].project["version"]
    assert package.project["version"] == version
    major, minor = (int(part) for part in version.split(".")[:2])
    expected = f">={major}.{minor},<{major}.{minor + 1}"
    project = package.project
    requirements = [*project.get("dependencies", [])]
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    for requirement in requirements:
        match = re.match(r"(danling[\w-]*)(\[[^]]*\])?(.*)", requirement)
        if match:
            assert match[1] in NAMES, f"{package.name} requires {match[1]}, which is no package here"
            assert match[3] == expected, f"{package.name} requires {requirement!r}, not {match[1]}{expected}"


def test_no_file_belongs_to_two_packages() -> None:
    seen: dict = {}
    for package in PACKAGES:
        for path in package.files:
            assert path not in seen, f"{path} is in {seen[path]} and in {package.name}"
            seen[path] = package.name


def test_only_the_umbrella_initialises_the_namespace() -> None:
    for package in PACKAGES:
        names = {str(path) for path in package.files}
        assert ("danling/__init__.py" in names) == (package.name == "danling")
        assert "danling/backends/__init__.py" not in names


@pytest.mark.parametrize("package", PACKAGES, ids=NAMES)
def test_imports_point_downward(package) -> None:
    allowed = LAYERS[package.name] | {package.name}
    wrong = []
    for path in package.modules:
        file, module = package.source / path, module_name(path)
        for top_level, names in (
            (True, set(imports(file, module, top_level_only=True))),
            (False, set(imports(file, module))),
        ):
            for name in names:
                other = OWNERS.get(name)
                if other is None or other in allowed:
                    continue
                if not top_level and other in OPTIONAL.get(package.name, ()):
                    continue
                wrong.append(f"{path} imports {name} of {other}")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("package", PACKAGES, ids=NAMES)
def test_declared_dependencies_are_the_layers(package) -> None:
    declared = {re.match(r"[\w-]+", item)[0] for item in package.project.get("dependencies", [])}
    extras = package.project.get("optional-dependencies", {}).values()
    declared_extras = {re.match(r"[\w-]+", item)[0] for extra in extras for item in extra}
    siblings = {name for name in declared | declared_extras if name in NAMES} - {package.name}
    assert siblings <= LAYERS[package.name]


@pytest.mark.parametrize("package", [p for p in PACKAGES if p.name == "danling-runner-core"], ids=str)
def test_runner_core_never_imports_torch(package) -> None:
    for path in package.modules:
        names = set(imports(package.source / path, module_name(path), top_level_only=True))
        heavy = {name for name in names if name.split(".")[0] in {"torch", "numpy", "pandas"}}
        assert not heavy, f"{path} imports {sorted(heavy)} when it is imported"
        if path.name not in ("config.py", "checking.py"):  # the second is a part of the first
            assert not any(name.split(".")[0] == "chanfig" for name in names), f"{path} imports chanfig"


@pytest.mark.parametrize("package", PACKAGES, ids=NAMES)
def test_each_package_is_documented(package) -> None:
    readme = (package.folder / "README.md").read_text()
    assert readme.startswith(f"# {package.name}")
    assert "pip install" in readme
    assert (package.folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_no_lock_file_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "uv.lock" not in tracked.split()


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert "pip install uv && uv run python docs/examples/digits.py" in text
    assert "pip install uv && uv run pytest" in text


def test_the_justfile_has_at_most_ten_verbs() -> None:
    verbs = re.findall(r"^([a-z][\w-]*)(?: [^:=\n]*)?:(?!=)", (ROOT / "justfile").read_text(), re.M)
    assert 1 <= len(verbs) <= 10, verbs
