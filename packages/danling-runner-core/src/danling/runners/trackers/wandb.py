"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ..configfile import plain


class WandbTracker:
    """Logs to a W&B run, which a resumed attempt continues under the same id.

    Every value is plotted over ``global_step``, whatever W&B's own step counter says, so that evaluations are never
    dropped. The run is opened by the first value.

    Args:
        config: of the danling run; ``config.wandb`` has the options. What is not set there follows from the run:
            project is the lineage, group the experiment.
        name: of the danling run.
        directory: where W&B keeps its files unless ``config.wandb.dir`` says otherwise.

    Raises:
        ImportError: when wandb is not installed.
    """

    name = "wandb"

    def __init__(self, config: Any, *, name: str, directory: str | os.PathLike[str]) -> None:
        if find_spec("wandb") is None:
            raise ImportError('W&B is not installed: pip install "danling-runner-core[wandb]"')
        given = {key: value for key, value in config.wandb.items() if key != "enabled" and value is not None}
        self._options = {
            "project": config.lineage,
            "group": config.experiment,
            "name": name,
            "dir": os.fspath(directory),
            "config": plain(config),
        } | given
        self._id: str | None = None
        self._run: Any = None

    @property
    def run(self) -> Any:
        """The W&B run, opened on first use."""
        if self._run is None:
            import wandb

            os.makedirs(self._options["dir"], exist_ok=True)
            self._run = wandb.init(id=self._id, resume="allow", **self._options)
            self._run.define_metric("global_step")
            self._run.define_metric("*", step_metric="global_step")
            self._id = self._run.id
        return self._run

    def log(self, scalars: Mapping[str, float], *, global_step: int, epoch: int) -> None:
        """Log scalars and the epoch over ``global_step``."""
        self.run.log({**scalars, "epoch": epoch, "global_step": global_step})

    def flush(self) -> None:
        """Nothing: W&B sends from a process of its own."""

    def state_dict(self) -> dict[str, Any]:
        """The id of the run, for checkpoints."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run with this id."""
        self._id = state["id"]

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
