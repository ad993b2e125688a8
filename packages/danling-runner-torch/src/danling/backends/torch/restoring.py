"""The state of a torch run as files and back: weights, EMA, optimizer, scheduler, scaler, loaders, random states."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danling.runners.discovery import load_engine
from danling.runners.errors import CheckpointError, ResumeError
from danling.runners.persistence import RECORDED

from .export import as_dtype, cast_floating, write_safetensors
from .payload import (
    EMA,
    MODEL,
    NESTED_UNDER,
    OPTIMIZER,
    HostBuffers,
    TorchSnapshot,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    rank_file,
    read_payload,
    read_weights,
    strip_prefixes,
)
from .rng import capture_rng, restore_rng
from .sharded import Sharded
from .snapshot import read_file


class Restoring(Sharded):
    """The part of `TorchRunner` that saves and restores."""

    _buffers: HostBuffers | None
    _log_mark: tuple[float, float] | None

    # Saving

    def engine_state(self) -> dict[str, Any]:
        """What the main process writes: file and content, live."""
        files = {MODEL: model_state(self.model), **self.side_state()}
        if self.optimizer is not None:
            state = optimizer_state(self.optimizer, self.iter_optimizer_named_parameters())
            files[OPTIMIZER] = {**files.get(OPTIMIZER, {}), "optimizer": state}
        return files

    def side_state(self) -> dict[str, Any]:
        """The part of it that is whole on every rank also where an engine splits weights and optimizer."""
        files: dict[str, Any] = {}
        if self.ema is not None:
            files[EMA] = self._ema_weights() or self.ema.state_dict()
        if states := self.side_states():
            files[OPTIMIZER] = states
        return files

    def side_states(self) -> dict[str, Any]:
        """State that is small and whole on every rank: scheduler, scaler, count of the average."""
        parts = {"scheduler": self.scheduler, "grad_scaler": self.grad_scaler}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        if hasattr(self.ema, "n_averaged"):
            states["ema_updates"] = self.ema.n_averaged
        return states

    def _ema_weights(self) -> dict[str, Any] | None:
        """Weights of an `AveragedModel` under the names of the user's module; None for other kinds of average."""
        return model_state(self.ema) if hasattr(self.ema, "n_averaged") and isinstance(self.ema, nn.Module) else None

    def rank_state(self) -> dict[str, Any]:
        """What differs from rank to rank: random states, positions of loaders, open meters and metrics."""
        state: dict[str, Any] = {
            "rng": capture_rng(self.device),
            "dataloaders": self.loader_states(),
            "meters": self._meters[True].state_dict(),
            "log_mark": list(self._log_mark) if self._log_mark else None,
        }
        if hasattr(self.train_metrics, "state_dict"):
            state["metrics"] = self.train_metrics.state_dict()
        own = {key: value for key, value in self.state_dict().items() if key not in RECORDED}
        if own:
            state["own"] = own
        return state

    def loader_states(self) -> dict[str, Any]:
        """Positions of the loaders that keep their own; those that danling samples are counted in samples instead."""
        states = {}
        for split in self.train_splits:
            loader = self.dataloaders.get(split)
            position = self.train_state.positions.get(split, {})
            is_open = position.get("samples") and not position.get("complete")
            if is_open and split not in self.datasamplers and hasattr(loader, "state_dict"):
                states[split] = loader.state_dict()
        return states

    def capture(self) -> Callable[[Path], list[str]]:
        """Copy the state of this rank; return a function that writes its files."""
        if self.uses_dcp:
            return self.capture_sharded()
        files = self.engine_state() if self.is_main_process else {}
        return self._captured({**files, rank_file(self.rank): self.rank_state()})

    def capture_model(self) -> Callable[[Path], list[str]]:
        """Copy the weights, those of the EMA when there is one; return a function that writes them."""
        dtype = self.config.checkpoint.export_dtype
        if self.uses_dcp:
            return self.capture_sharded_model(as_dtype(dtype))
        weights = self.export_state(dtype)
        return self._captured({MODEL: weights} if self.is_main_process else {})

    def _captured(self, files: dict[str, Any]) -> Callable[[Path], list[str]]:
        return self._host_snapshot(files).write

    def _host_snapshot(self, files: dict[str, Any]) -> TorchSnapshot:
        """Files whose content is copied to the host."""
        if self._buffers is None:
            self._buffers = HostBuffers(pinned=self.config.checkpoint.async_mode == "async_with_pinned_mem")
        snapshot = TorchSnapshot(files, self._buffers)
        snapshot.capture()
        return snapshot

    def write_state(self, directory: Path) -> list[str]:
        """Write this rank's files of the present state."""
        return self.capture()(directory)

    def export_state(self, dtype: str | None = None, ema: bool = True) -> dict[str, Any]:
        """Weights for use elsewhere: those of the EMA when there is one, floating tensors cast."""
        averaged = ema and self.ema is not None and self._ema_ready
        return cast_floating(model_state(self.evaluation_model if averaged else self.unwrap(self.model)), dtype)

    def export(self, path: str | os.PathLike[str], dtype: str | None = None, ema: bool = True) -> None:
        """Write the weights as safetensors, on the main process; of sharded weights every rank calls it.

        Args:
            path: the file.
            dtype: fp32, fp16, bf16 or fp64 for the floating tensors; None keeps theirs.
            ema: prefer the EMA's.
        """
        state = self.export_state(ema=ema) if self.is_main_process or self.uses_dcp else {}
        if self.is_main_process:
            write_safetensors(path, state, dtype=dtype)

    # Restoring

    def read_state(self, directory: Path) -> dict[str, Any]:
        """Read what `write_state` wrote, by component."""
        payload = read_payload(directory, self.rank)
        saved = list((directory / "ranks").glob("rank-*.pt"))
        if "rng" not in payload and (directory / "ranks").is_dir():
            payload |= {"rng": {}, "dataloaders": {}}  # a rank that did not exist when the checkpoint was saved
        gone = range(self.rank + self.world_size, len(saved), self.world_size)
        if gone:  # what ranks that are no more had measured of an unfinished pass
            payload["gone"] = [read_file(directory / rank_file(rank)) for rank in gone]
        return payload

    def load_checkpoint(self, src: Any) -> None:
        """Restore the full state of a run; see `BaseRunner.load_checkpoint`."""
        payload = self.read_checkpoint(src)
        super().load_checkpoint(payload)
        if payload.get("extra"):
            self.load_extra(payload["extra"])
        if "ema_updates" in payload and "ema" not in self._excluded() and hasattr(self.ema, "n_averaged"):
            self.ema.n_averaged.copy_(payload["ema_updates"])
        if "meters" in payload:
            self._meters[True].load_state_dict(payload["meters"])
        if "metrics" in payload and hasattr(self.train_metrics, "load_state_dict"):
            self.train_metrics.load_state_dict(payload["metrics"])
        for gone in payload.get("gone", ()):
            for name, kept in (("meters", self._meters[True]), ("metrics", self.train_metrics)):
                if name in gone and hasattr(kept, "merge"):
                    _take_in(kept, gone[name])
        marks = [share["log_mark"] for share in (payload, *payload.get("gone", ())) if share.get("log_mark")]
        self._log_mark = tuple(map(sum, zip(*marks, strict=True))) if marks else None  # type: ignore[assignment]
        if self.scheduler is not None:
            self._extend_schedule()

    def _extend_schedule(self) -> None:
        """Give a schedule made for another budget the length of this one."""
        planned = getattr(self.scheduler, "total_steps", None)
        length = self.epochs if self.scheduler_interval == "epoch" else self.steps
        if self.config.scheduler.get("total_steps") is not None or planned in (None, length) or length is None:
            return
        if hasattr(self.scheduler, "set_total_steps"):
            self.scheduler.set_total_steps(length)
            self.logger.info("the schedule now ends at %d instead of %d", length, planned)
        else:
            kind = type(self.scheduler).__name__
            self.logger.warning("%s keeps its horizon of %d although the budget is now %d", kind, planned, length)

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """Load weights; missing, unexpected and misshapen ones are an error that lists them."""
        self._load_weights(state, skip=self.excluded_names(list(state)))

    def _load_weights(self, state: Mapping[str, Any], **options: Any) -> None:
        if self._by_parts(state):
            self.load_tensors(self.model_tensors(), state, **options)
            if isinstance(state, dict):
                self.load_extra({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        else:
            load_model_state(self.model, state, **options)

    def _load_average(self, state: Mapping[str, Any], **options: Any) -> None:
        targets = self.ema_tensors() if self._by_parts(state) else None
        if targets is not None:
            self.load_tensors(targets, state, **options)
        else:
            load_model_state(self.ema, state, **options)

    def _by_parts(self, state: Mapping[str, Any]) -> bool:
        return self.uses_dcp or not isinstance(state, dict)

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """Load what modules keep beside tensors (`get_extra_state`), which a sharded checkpoint stores apart."""
        for part in self.local_parts():
            own = {name: name for name in part.state_dict()}
            part.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)

    def load_ema(self, state: Mapping[str, Any]) -> None:
        """Load the average."""
        if self.ema_tensors() is None:
            self.ema.load_state_dict(state)
        else:
            self._load_average(state)

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Load the optimizer, by parameter name."""
        names = list(self.iter_optimizer_named_parameters())
        skip = self.excluded_names([name for name, _ in names])
        if "tensors" in state:
            state = self.gathered_optimizer(state)
        load_optimizer_state(self.optimizer, state, names, skip=skip)

    def load_scheduler(self, state: Mapping[str, Any]) -> None:
        """Load the scheduler."""
        self.scheduler.load_state_dict(state)

    def load_grad_scaler(self, state: Mapping[str, Any]) -> None:
        """Load the gradient scaler."""
        self.grad_scaler.load_state_dict(state)

    def load_dataloaders(self, states: Mapping[str, Any]) -> None:
        """Keep the positions of loaders until their pass begins."""
        self._loader_states = dict(states)

    def load_rng(self, state: Mapping[str, Any]) -> None:
        """Put the random states of this rank back; a rank that did not exist before is seeded."""
        if state:
            restore_rng(dict(state), self.device)
            return
        seed, place = self.rng_state.seed, self.rng_state.bias  # ranks that are to draw the same numbers share a bias
        text = f"{seed}, {place}, {self.global_step}"
        self.set_seed(zlib.crc32(text.encode()), bias=False)
        self.state.rng.seed, self.state.rng.bias = seed, place
        self.logger.warning("rank %d has no random state in the checkpoint: it is seeded anew", self.rank)

    def seek_loader(self, split: str, epoch: int, consumed: int) -> None:
        """Bring a loader that keeps its own position to where the pass was.

        Raises:
            ResumeError: it cannot tell, or take, a position.
        """
        loader = self.dataloaders[split]
        state = self._loader_states.pop(split, None)
        if not consumed:
            parts = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None), loader)
            for part in (*parts, getattr(loader, "dataset", None)):
                if part is not None and hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
        elif state is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(state)
        else:
            raise ResumeError(
                f"the loader of {split!r} has no state_dict and load_state_dict: a run cannot be resumed in the middle of "
                "its pass; save at the end of epochs only, or use a stateful loader"
            )

    # Weights alone

    def load_pretrained(self, src: Any, strict: bool = True) -> None:
        """Load weights alone: those of an EMA when the source has one.

        Args:
            src: a checkpoint or run directory, an alias, a mapping, or a `.safetensors`, `.pt`, `.pth`, `.bin` file.
            strict: an error when names differ; wrong shapes always are.
        """
        state, source = self.read_weights(src), "the mapping" if isinstance(src, Mapping) else src
        self._load_weights(state, strict=strict, error=CheckpointError, source=source)
        if self.ema is not None and self.ema_tensors() is not None:
            self._load_average(state, strict=strict, error=CheckpointError, source=source)
        self.logger.info("weights loaded from %s", source)

    def read_weights(self, src: Any) -> Mapping[str, Tensor]:
        """The weights in a source, under the names of a plain module."""
        if isinstance(src, Mapping):
            nested = next((src[key] for key in ("ema", *NESTED_UNDER) if isinstance(src.get(key), Mapping)), src)
            return strip_prefixes(nested)
        path = Path(os.fspath(src))
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            if not path.is_file():
                from danling.runners.errors import CheckpointNotFoundError

                raise CheckpointNotFoundError(f"there is no file {path}")
            return read_weights(path)
        path = self._store.resolve(src)
        if bad := self._store.verify(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(bad)}")
        stack = self._store.read_manifest(path).get("stack") or self.stack
        engine = type(self) if stack == self.stack or self.shares_payload(stack) else load_engine(stack)
        return engine.checkpoint_weights(path)

    @staticmethod
    def checkpoint_weights(directory: Path, *, ema: bool = True) -> Mapping[str, Tensor]:
        """Read the whole weights in a checkpoint directory of this stack, under the names of a plain module.

        Args:
            directory: verified.
            ema: prefer the moving average where there is one.
        """
        return read_weights(directory, ema=ema)

    @classmethod
    def export_checkpoint(
        cls, source: str | os.PathLike[str], path: str | os.PathLike[str], *, dtype: Any = None, ema: bool = True
    ) -> None:
        """Write the weights of a verified checkpoint of this stack as safetensors.

        Args:
            source: its directory.
            path: the file to make or replace.
            dtype: cast floating tensors.
            ema: take the moving average when there is one.

        Raises:
            CheckpointError: the checkpoint has no weights or cannot be read.
        """
        write_safetensors(path, cls.checkpoint_weights(Path(source), ema=ema), dtype=dtype)


def _take_in(kept: Any, state: Mapping[str, Any]) -> None:
    """Add what another rank had measured to meters or metrics."""
    group = getattr(kept, "group", None)
    other = deepcopy(kept, {id(group): group})  # process groups cannot be copied, and need not be
    other.load_state_dict(state)
    kept.merge(other)
