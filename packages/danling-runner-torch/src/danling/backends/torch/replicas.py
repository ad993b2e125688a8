"""What replica groups change in a run: windows that may be run again, metrics that wait for the vote, saves by one group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danling.runners.errors import ConfigError

from .ft import FaultTolerance, require_torchft
from .positions import Positions
from .window import Window

if TYPE_CHECKING:
    from .distributed import WindowHeader


class ReplicaWindow(Window):
    """A window that is run again, with fresh weights, when the groups do not commit it.

    Args:
        runner: whose window it is.

    Attributes:
        refused: whether the update at the end of the window was refused.
    """

    __slots__ = ("runner", "refused", "facts", "_before")

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.refused = False
        self.facts: dict[str, Any] = {}
        super().__init__()

    def __iter__(self) -> Iterator[Any]:
        runner = self.runner
        counters = ("micro_step", "skipped", "skipped_in_a_row")
        state, meters = runner.train_state, runner._meters[True]
        before = {name: getattr(state, name) for name in counters}, meters.state_dict()
        while True:
            yield from self.batches
            if not self.refused:
                return
            self.refused = False
            for name, value in before[0].items():
                setattr(state, name, value)
            meters.load_state_dict(before[1])
            runner.zero_grad()
            header = runner.ft.open_window({**self.facts, "abort": False})
            total = None if self.weights[0] is None else header.weight
            degree = runner.loss_degree * runner.ft.participants
            self.open(self.batches, self.weights, total=total, degree=degree, fillers=self.fillers)
            self.samples, self.tokens = header.samples, header.tokens


class DeferredMetrics:
    """Metrics of training that take in a window once it is committed, so that one that is run again counts once."""

    def __init__(self, metrics: Any) -> None:
        self._metrics, self._pending = metrics, []  # type: ignore[var-annotated]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Keep what one micro-batch brings."""
        detached = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        self._pending.append((detached, kwargs))

    def settle(self, committed: bool) -> None:
        """Take in, or drop, what the window has brought."""
        pending, self._pending = self._pending, []
        if committed:
            for args, kwargs in pending:
                self._metrics.update(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)


_Host: Any = object  # part of TorchRunner: what is used here and not defined here is the runner's


class Replicas(_Host):
    """The part of `TorchRunner` that replica groups change."""

    ft: FaultTolerance | None
    window: Any
    _train_metrics: Any
    _saving: str | None = None

    def check_config(self) -> None:
        """Refuse, before anything is built, what this engine cannot honour.

        Raises:
            ConfigError: naming the key.
            ImportError, RuntimeError: `ft.enabled` without TorchFT, or without a lighthouse.
        """
        super().check_config()
        if self.config.ft.enabled:
            require_torchft()

    def init_fault_tolerance(self) -> None:
        """Bind TorchFT's manager when `ft.enabled`.

        Raises:
            ConfigError: the run directory holds checkpoints and `auto_resume` is off.
        """
        if not self.config.ft.enabled:
            return
        if self.workspace.has_checkpoints() and not self.config.auto_resume:
            raise ConfigError(
                f"auto_resume: False, but {self.checkpoint_dir} holds checkpoints; with replica groups an earlier run is not "
                "set aside, because another group may be at work in its directory: set auto_resume, or another name"
            )
        self.ft = ft = FaultTolerance(self)
        self._closing("ft", ft.close)
        self.window = ReplicaWindow(self)

    def data_share(self, train: bool) -> tuple[int, int]:
        """Which share of a split is read here, and how many shares there are; training splits are dealt to all groups."""
        rank, ranks = self.data_rank, self.data_degree
        options = self.config.ft
        if not (train and options.enabled):
            return rank, ranks
        return options.replica_id * ranks + rank, options.group_size * ranks

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed the generators; ranks of different replica groups differ too."""
        options = self.config.ft
        if bias is None and options.enabled and options.replica_id:
            bias = options.replica_id * self.world_size + self.rank
        return super().set_seed(seed, bias)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end of the budget; with replica groups, join them first."""
        if self.ft is not None:
            with self._ending():
                self.ft.join()
            if self._train_metrics is not None and not isinstance(self._train_metrics, DeferredMetrics):
                self._train_metrics = DeferredMetrics(self._train_metrics)
        return super().train(*args, **kwargs)

    def window_header(self, **facts: Any) -> WindowHeader:
        """Tell all ranks, of all groups, about the window in hand."""
        if self.ft is None:
            return self.exchange_header(**facts)
        self.window.facts = facts
        return self.ft.open_window(facts)

    def commits(self) -> bool:
        """Whether the update of the window in hand is to be applied; replica groups vote."""
        assert self.ft is not None
        committed = self.ft.commit()
        if isinstance(self._train_metrics, DeferredMetrics):
            self._train_metrics.settle(committed)
        self.window.refused = not committed
        return committed

    # Checkpoints

    def _store_save(self, target: str, aliases: list[str], **options: Any) -> None:
        ft = self.ft
        if ft is None:
            return super()._store_save(target, aliases, **options)
        positions = ft.positions
        self._saving = target
        if ft.leads:
            super()._store_save(target, aliases, **options)
        elif positions is not None and options.get("kind", "full") == "full":
            try:
                positions.write(target, ft.position())
            except OSError as error:
                if options["final"]:
                    raise
                self.problems.add("position of the replica group", error)
            self.supervisor.save_done()
        else:
            self.supervisor.save_done()
        if positions is not None:
            positions.retain(self.config.checkpoint.keep_latest_k, {info.name for info in self._store.list()})

    def capture(self) -> Callable[[Path], Any]:
        """Copy the state of this rank; with the position of the group, whose file belongs to the save."""
        write = super().capture()
        if self.ft is None or self.ft.positions is None:
            return write
        return _WithPosition(write, self.ft.positions, self._saving, self.ft.position())

    def load_checkpoint(self, src: Any) -> None:
        """Restore the full state of a run; a position file of this group overrides the position stored with it."""
        super().load_checkpoint(src)
        if self.ft is not None and self.ft.positions is not None and self.resumed_from != "memory":
            found = self.ft.positions.read(Path(self.resumed_from).name)
            if found is not None:
                self.ft.restore_position(found)


class _WithPosition:
    """Writes the position of the group, then what `capture` gave: a save whose position fails is not committed."""

    def __init__(self, write: Any, positions: Positions, name: str | None, position: dict[str, Any]) -> None:
        self._write, self._positions, self._name, self._position = write, positions, name, position

    def __call__(self, directory: Path) -> Any:
        if self._name is not None:
            self._positions.write(self._name, self._position)
        return self._write(directory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._write, name)
