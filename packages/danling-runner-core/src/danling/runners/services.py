"""The services a run is made of, each opened in a hook of the construction."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from .atomic import read_yaml
from .errors import ConfigError
from .heartbeat import Heartbeat
from .store import CheckpointStore

_Host: Any = object  # part of BaseRunner: what is used here and not defined here is the runner's


class Services(_Host):
    """The construction hooks that need no engine."""

    def init_distributed(self) -> None:
        """Join the other processes; nothing to do for one."""
        self.state.rng.seed = self.choose_seed()

    def choose_seed(self) -> int:
        """The configured seed; without one that of the run being resumed, else one that is drawn."""
        config = self.config
        if config.seed is not None:
            return config.seed
        for source in (config.resume, self.dir if config.auto_resume else None):
            if source and (Path(source) / "runner.yaml").exists():
                return int(read_yaml(Path(source) / "runner.yaml")["seed"])
        return random.SystemRandom().randrange(2**31)

    def init_checkpoint_manager(self) -> None:
        """Bind the checkpoint store."""
        checkpoint = self.config.checkpoint
        mode = checkpoint.async_mode or ("async" if checkpoint.async_enabled else "disabled")
        self.set_checkpoint_manager(
            CheckpointStore(
                self.checkpoint_dir,
                coordinator=self.coordinator,
                keep_latest_k=checkpoint.keep_latest_k,
                asynchronous=mode != "disabled",
                load_only=checkpoint.load_only,
                on_commit=self._on_commit,
                on_error=self._on_save_error,
                problem=self.problems.add,
                logger=self.logger,
            )
        )
        if not self.config.ft.enabled:  # another replica group may be in the middle of a save
            self._store.repair()

    def set_checkpoint_manager(self, store: CheckpointStore) -> None:
        """Use another store; the one before is closed."""
        if (old := self.__dict__.get("_store")) is not None:
            old.close()
        self._store = store

    @property
    def checkpoint_manager(self) -> CheckpointStore:
        """The checkpoint store; replaced through `set_checkpoint_manager`."""
        return self._store

    def init_fault_tolerance(self) -> None:
        """Leave `ft` None; engines with replica groups bind their manager here.

        Raises:
            ConfigError: `ft.enabled` on an engine without them.
        """
        if self.config.ft.enabled:
            raise ConfigError(f"ft.enabled: stack {self.stack!r} has no replica groups")

    def init_garbage_collection(self) -> None:
        """Take over garbage collection when `gc.interval` is set."""
        options = self.config.gc
        if options.interval:
            self.supervisor.take_over_gc(options.interval, options.generation, options.disable_automatic)

    def init_tensorboard(self) -> None:
        """Open TensorBoard on the main process."""
        from .trackers.tensorboard import TensorBoardTracker

        if self.is_main_process:
            self.trackers.add(TensorBoardTracker(self.dir / "tensorboard", self.summary_writer))

    def init_wandb(self) -> None:
        """Open Weights & Biases on the main process."""
        from .trackers.wandb import WandbTracker

        if self.is_main_process:
            self.trackers.add(WandbTracker(self.config, name=self.name, directory=self.dir))

    def init_signal_handlers(self) -> None:
        """SIGTERM, SIGINT and SIGUSR1 set flags from here to the close."""
        self.supervisor.install_signal_handlers()
        self._closing("supervisor", self.supervisor.close)

    def init_heartbeat(self) -> None:
        """Start the heartbeat when it is enabled."""
        options = self.config.heartbeat
        self.heartbeat: Heartbeat | None = None
        if options.enabled:
            self.heartbeat = Heartbeat(
                self.dir / options.dir_name,
                self._beat,
                rank=self.rank,
                world_size=self.world_size,
                interval=options.interval_seconds,
                restarts=self.elastic_state.restart_count,
                problems=self.problems,
            )
            self.heartbeat.start()

    def _beat(self) -> dict[str, Any]:
        state = self.train_state
        counters = {"global_step": state.global_step, "micro_step": state.micro_step, "epoch": state.epoch}
        return {
            "event": self._last_event,
            "mode": str(self._mode),
            "split": self.split,
            "counters": counters,
            "failed_saves": self._store.health.get("failures", 0),
        }

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed the random number generators of this process.

        Args:
            seed: None takes the configuration's.
            bias: added to the seed; None is the rank, False is nothing.

        Returns:
            The seed used, bias included.
        """
        if seed is None:
            seed = self.state.rng.seed
        assert seed is not None
        offset = self.rank if bias is None else int(bias)
        self.state.rng.seed, self.state.rng.bias = seed, offset
        random.seed(seed + offset)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed((seed + offset) % 2**32)
        return seed + offset

    def set_deterministic(self) -> None:
        """Ask the engine for deterministic algorithms; undone at close."""
