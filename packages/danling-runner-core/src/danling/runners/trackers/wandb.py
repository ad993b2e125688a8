"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Wandb:
    """Logs to a W&B run, which a resumed attempt continues under the same id.

    Args:
        id: of the run to continue; None starts a new one.
        options: arguments of ``wandb.init``: project, entity, group, name, job_type, tags, dir, mode, config.

    Every value is plotted over ``global_step``, whatever W&B's own step counter says, so that evaluations are never
    dropped.

    Raises:
        ImportError: when wandb is not installed.
    """

    name = "wandb"

    def __init__(self, *, id: str | None = None, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError('W&B is not installed: pip install "danling-runner-core[wandb]"') from error
        options = {name: value for name, value in options.items() if value is not None}
        self.run = wandb.init(id=id, resume="allow" if id else None, **options)
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")

    @property
    def id(self) -> str:
        """The id W&B knows the run by."""
        return self.run.id

    def log(self, scalars: Mapping[str, float], *, global_step: int, epoch: int) -> None:
        """Log scalars and the epoch over ``global_step``."""
        self.run.log({**scalars, "epoch": epoch, "global_step": global_step})

    def flush(self) -> None:
        """Nothing: W&B sends from a process of its own."""

    def state_dict(self) -> dict[str, Any]:
        """The id, for checkpoints."""
        return {"id": self.id}

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
