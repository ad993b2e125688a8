"""How a DeepSpeed engine writes and reads its files under danling: errors are kept for the commit, no file runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from danling.backends.torch.snapshot import write_file
from danling.runners.errors import CheckpointError

from .files import TAG, EngineFiles, read_engine_file


class CheckpointFiles(CheckpointEngine):
    """What `deepspeed.DeepSpeedEngine` calls to write and read a file.

    All ranks meet several times while an engine saves. So that none of them waits for one that has failed, an error is
    remembered here and raised once the engine is through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.written: list[str] = []
        self.error: OSError | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a save."""
        self.written, self.error = [], None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory."""
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        if self.error is not None:
            return
        try:
            write_file(path, state_dict)
            self.written.append(path)
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file into host memory, without running code from it."""
        return read_engine_file(path)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End a save."""
        return True


def attach(engine: Any) -> None:
    """Let an engine write and read its files through `CheckpointFiles`, and leave no scripts beside them."""
    engine.checkpoint_engine = CheckpointFiles()
    engine._copy_recovery_script = lambda path: None


def save_engine(engine: Any, directory: Path) -> list[str]:
    """Write the engine's files of this rank below a directory; all ranks call it.

    Returns:
        Their names, relative to the directory.

    Raises:
        OSError: a file cannot be written.
    """
    engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
    files = engine.checkpoint_engine
    if files.error is not None:
        raise files.error
    return [str(Path(path).relative_to(directory)) for path in files.written]


def load_engine_state(engine: Any, files: EngineFiles) -> None:
    """Restore weights, optimizer and counters of an engine; all ranks call it.

    Raises:
        CheckpointError: they are missing, damaged or would run code.
    """
    path, _ = engine.load_checkpoint(str(files.directory), tag=files.tag)
    if path is None:
        raise CheckpointError(f"{files.folder} holds no state of a DeepSpeed engine")
