"""Where a replica group is in its share of the data: one small file per rank and save, beside the checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from danling.runners.atomic import fsync_dir, fsync_file

from .snapshot import map_state, read_file, write_file


class Positions:
    """The position files of this group.

    Args:
        folder: of the group; a save of the name `step-8` has its files in `folder/step-8`.
        rank: of this process in its group.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def write(self, name: str, position: dict[str, Any]) -> None:
        """Write the file of this rank, whole or not at all.

        Args:
            name: of the save.
            position: plain state with `global_step`.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            write_file(temporary, map_state(position, lambda tensor, _: tensor))
            fsync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the position of this rank in a save, None when there is none."""
        path = self._path(name)
        return read_file(path) if path.exists() else None

    def newest(self) -> dict[str, Any] | None:
        """Return the position of this rank with the most steps, None when there is none."""
        names = self.names()
        return self.read(names[-1]) if names else None

    def names(self) -> list[str]:
        """The saves that hold a position of this rank, by steps."""
        found = [(read_file(path)["global_step"], path.parent.name) for path in self.folder.glob(f"*/{self._file}")]
        return [name for _, name in sorted(found)]

    def retain(self, keep: int, committed: Collection[str]) -> None:
        """Remove this rank's positions of saves that are gone, all but the newest `keep`; 0 keeps all."""
        if not keep:
            return
        for name in self.names()[:-keep]:
            if name not in committed:
                self._path(name).unlink(missing_ok=True)
                if not any(self._path(name).parent.iterdir()):
                    shutil.rmtree(self._path(name).parent, ignore_errors=True)

    @property
    def _file(self) -> str:
        return f"rank-{self.rank:05d}.pt"

    def _path(self, name: str) -> Path:
        return self.folder / name / self._file
