"""Facts about the workspace that packaging tests check: packages, their metadata, sources and imports."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Package:
    """One publishable package of the workspace."""

    name: str
    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "src"

    @property
    def project(self) -> dict:
        return tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]

    @property
    def files(self) -> set[Path]:
        """Files that the wheel would install, relative to site-packages."""
        return {
            path.relative_to(self.source)
            for path in self.source.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
        }

    @property
    def modules(self) -> list[Path]:
        return sorted(path for path in self.files if path.suffix == ".py")


def packages() -> list[Package]:
    """Return every package of the workspace, by name."""
    return [Package(folder.name, folder) for folder in sorted((ROOT / "packages").iterdir()) if folder.is_dir()]


def module_name(path: Path) -> str:
    """Turn a path relative to `src` into a dotted module name."""
    parts = list(path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, module: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the absolute names a file imports, leaving out what stands under `if TYPE_CHECKING:`."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                    parent = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parent, base] if base else parent)
                yield base
                yield from (f"{base}.{alias.name}" for alias in child.names)
            else:
                yield from visit(child)

    return visit(ast.parse(file.read_text()))
