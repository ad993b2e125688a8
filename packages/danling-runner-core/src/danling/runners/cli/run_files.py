"""What the files of a run say, read without building anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic import read_json, read_yaml, restore_nonfinite
from ..lock import is_locked
from .main import CommandError

ABOUT_THE_RUN = ("danling_version", "config_id", "identity_exclude")
"""What ``runner.yaml`` holds besides the configuration."""

MARKS = ("summary.json", "runner.yaml", "results.json")


class RunFiles:
    """One run directory. A file that is missing or unreadable counts as empty; `unreadable` lists the latter."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.dir = Path(directory)
        self.unreadable: dict[str, str] = {}

    def _read(self, name: str, read: Any = read_json) -> dict[str, Any]:
        try:
            content = read(self.dir / name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.unreadable[name] = " ".join(str(error).split())
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``."""
        return self._read("summary.json")

    @cached_property
    def results(self) -> dict[str, Any]:
        """``results.json``."""
        return self._read("results.json")

    @cached_property
    def latest(self) -> dict[str, Any]:
        """``latest.json``."""
        return self._read("latest.json")

    @cached_property
    def best(self) -> dict[str, Any]:
        """``best.json``."""
        return self._read("best.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """``runner.yaml``."""
        return self._read("runner.yaml", _read_config)

    def metadata(self, name: str) -> dict[str, Any]:
        """A file of the newest attempt below ``metadata/``."""
        attempts = sorted(path for path in self.dir.glob("metadata/*") if path.is_dir())
        return self._read(str((attempts[-1] / name).relative_to(self.dir)), read_yaml) if attempts else {}

    @property
    def name(self) -> str:
        """Name of the run; its directory's, if no file tells."""
        return self._first("name") or self.dir.name

    @property
    def config_id(self) -> str | None:
        """Identity of the run's configuration."""
        return self._first("config_id")

    def _first(self, key: str) -> Any:
        return next((source[key] for source in (self.summary, self.results) if source.get(key)), None)

    @property
    def status(self) -> str:
        """As ``summary.json`` has it; ``killed`` when that says running but nobody holds the lock."""
        status = self.summary.get("status", "unknown")
        return "killed" if status == "running" and not is_locked(self.dir) else status

    @property
    def progress(self) -> float | None:
        """Fraction of the budget that is used, None where that is unknown."""
        counters, targets = (self.summary.get(key) or {} for key in ("counters", "targets"))
        for done, target in (("updates", "steps"), ("epochs", "epochs")):
            if targets.get(target):
                return min(counters.get(done, 0) / targets[target], 1.0)
        return None

    @property
    def changed(self) -> float:
        """When a file of the run was last written, in seconds since the epoch."""
        names = (*MARKS, "metrics.jsonl", "latest.json")
        return max((stat.st_mtime for name in names if (stat := _stat(self.dir / name))), default=0.0)

    def score(self, which: str) -> float | None:
        """The score of the ``latest`` or ``best`` row."""
        row = self.summary.get(which)
        score = row.get("score") if isinstance(row, Mapping) else None
        return score if score is not None else getattr(self, which).get("score")


def find_run(path: str) -> RunFiles:
    """The run at ``path``: its directory, or anything inside it.

    Raises:
        CommandError: there is none.
    """
    start = Path(path)
    if not start.exists():
        raise CommandError(f"{path}: no such file or directory")
    for directory in (start, *start.absolute().parents):
        if is_run(directory):
            return RunFiles(directory)
    raise CommandError(f"{path} is not in a run: a run directory holds {' or '.join(MARKS)}")


def is_run(directory: Path) -> bool:
    """Whether this is the directory of a run; a checkpoint holds a ``runner.yaml`` too."""
    return any((directory / name).is_file() for name in MARKS) and not (directory / "manifest.json").exists()


def find_runs(root: str) -> Iterator[RunFiles]:
    """Every run at or below ``root``.

    Raises:
        CommandError: ``root`` is no directory.
    """
    if not os.path.isdir(root):
        raise CommandError(f"{root}: no such directory")
    for directory, inner, files in os.walk(root):
        if not set(MARKS).isdisjoint(files):
            inner.clear()  # there are no runs inside runs
            yield RunFiles(directory)
        else:
            inner[:] = sorted(name for name in inner if not name.startswith("."))


def _read_config(path: Path) -> Any:
    import yaml

    from ..configfile import parse_yaml

    try:
        return restore_nonfinite(parse_yaml(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
