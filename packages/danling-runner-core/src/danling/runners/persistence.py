"""Saving and restoring a run: what goes into a checkpoint, what may come out of one, and the files of results."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .atomic import dump_json, read_json, read_yaml, write_json, write_yaml
from .configfile import plain
from .errors import CheckpointError, CheckpointNotFoundError, ResumeError
from .identity import differences, identity_view

COMPONENTS = ("optimizer", "scheduler", "grad_scaler", "ema", "rng", "dataloaders", "results", "callbacks")
RECORD = "runner.json"
CONFIG = "runner.yaml"
RECORDED = (
    "runner",
    "state",
    "results",
    "callbacks",
    "trackers",
)  # what an override of state_dict adds goes with the rank
FACTS = ("danling_version", "config_id", "identity_exclude")  # stand in the file beside the configuration


class Snapshot:
    """The state of one instant as files: danling's own record, then whatever the engine writes.

    Args:
        runner: whose state it is.
        kind: `full`, `seed` or `model`.
    """

    def __init__(self, runner: Persistence, kind: str) -> None:
        self._runner, self._kind = runner, kind
        self.collective = runner.writes_together

    def capture(self) -> None:
        """Copy the state; from here on training may go on."""
        runner, model_only = self._runner, self._kind == "model"
        self._files: dict[str, Any] = {}
        if runner.is_main_process:
            self._files[CONFIG] = runner.config_content()
            if not model_only:
                state = runner.state_dict()
                self._files[RECORD] = plain({key: state[key] for key in RECORDED})
        self._write_engine = runner.capture_model() if model_only else runner.capture()

    def write(self, directory: Path) -> list[str]:
        """Write this rank's files; return their names."""
        for name, content in self._files.items():
            (write_json if name == RECORD else write_yaml)(directory / name, content)
        return [*self._files, *(self._write_engine(directory) or ())]

    @property
    def report(self) -> Any:
        """What the engine's part of `write` has to tell the main process."""
        return getattr(self._write_engine, "report", None)

    def finish(self, directory: Path, reports: Sequence[Any]) -> None:
        """Write, on the main process, what takes the reports of all ranks."""
        if finish := getattr(self._write_engine, "finish", None):
            finish(directory, reports)


_Host: Any = object  # part of BaseRunner: what is used here and not defined here is the runner's


class Persistence(_Host):
    """The part of a runner that saves and restores."""

    resumed_from: Any = None
    last_checkpoint: str | None = None
    writes_together = False  # whether the ranks of the engine meet while they write
    _periodic = False
    _checked: Path | None = None  # a checkpoint whose files the main process has verified for all ranks
    _best_at: tuple[int, int] | None = None
    _closed: bool

    # State

    def state_dict(self) -> dict[str, Any]:
        """Configuration, counters, results, callbacks and trackers. An override adds to what `super()` returns."""
        return {
            "runner": plain(self.config),
            "state": self.state.state_dict(),
            "results": self.results.state_dict(),
            "callbacks": self.events.state_dict(),
            "trackers": self.trackers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; model, optimizer and the other components have their own `load_*`."""
        excluded = self._excluded()
        self.state.load_state_dict(state["state"])
        if "results" not in excluded:
            try:
                self.results.load_state_dict(state["results"])
            except ValueError as error:
                raise ResumeError(
                    f"{error}; add 'results' to checkpoint.exclude_from_loading to start them afresh"
                ) from error
        if "callbacks" not in excluded:
            for name in self.events.load_state_dict(state.get("callbacks", {})):
                self.logger.warning("the checkpoint holds state of a callback %r that this run does not have", name)
        self.trackers.load_state_dict(state.get("trackers", {}))

    def capture(self) -> Callable[[Path], list[str] | None]:
        """Copy the engine's state; return a function that writes this rank's files of it."""
        return self.write_state

    def write_state(self, directory: Path) -> list[str] | None:
        """Write this rank's part of the engine's state; return the names of the files, None for whatever is there."""
        return None

    def read_state(self, directory: Path) -> dict[str, Any]:
        """Read back what `write_state` wrote, by component."""
        return {}

    # Saving

    def save_checkpoint(
        self,
        name: str = "latest",
        epochs: int | None = None,
        save_best: bool = True,
        last_step: bool = False,
        force: bool = False,
    ) -> None:
        """Save everything that is needed to go on from here. Every rank calls it.

        Args:
            name: an alias for this checkpoint, beside `latest`.
            epochs: number in the directory's name, instead of the epochs completed.
            save_best: let `best` name it too when the last row is the best.
            last_step: this is the final save.
            force: write again even if this instant is saved already.

        Raises:
            CheckpointError: it cannot be written. Saves that training makes by itself are reported and counted instead.
        """
        if self.config.checkpoint.load_only:
            return
        if last_step and self.config.checkpoint.last_save_model_only:
            self._save_final_model()
            return
        state = self.train_state
        aliases = ["latest", *([name] if name != "latest" else [])]
        if save_best and self.is_best and self._best_at == (state.global_step, state.micro_step):
            aliases.append("best")
        loop = self.__dict__.get("_loop")
        final = last_step or not self._periodic or (loop is not None and loop.ending == "stop")
        self._store_save(self._checkpoint_name(epochs), aliases, final=final, force=force)

    def save_periodically(self) -> None:
        """A save that training makes by itself: failing is reported and counted, and training goes on."""
        self._periodic = True
        try:
            self.save_checkpoint()
        finally:
            self._periodic = False

    def save_seed_checkpoint(self, name: str = "seed") -> None:
        """Save the untrained state, so that runs on other layouts can start from the same weights."""
        if self.global_step > 0:
            self.logger.warning("a seed checkpoint is taken before training, but global_step is %d", self.global_step)
        kind = "model" if self.config.checkpoint.last_save_model_only else "seed"
        self._store_save(name, [], final=True, force=True, kind=kind)

    def _save_final_model(self) -> None:
        self._store_save("final", [], final=True, force=False, kind="model")

    def _store_save(self, target: str, aliases: list[str], *, final: bool, force: bool, kind: str = "full") -> None:
        if self._closed:
            raise CheckpointError("this runner is closed: its directory may be another run's by now")
        self.trackers.sync()
        self._store.save(target, Snapshot(self, kind), self._meta(kind), tuple(aliases), final=final, force=force)
        self.supervisor.save_done()

    def config_content(self) -> dict[str, Any]:
        """The content of `runner.yaml`: the configuration, the chosen stack, the seed in force."""
        facts: dict[str, Any] = {"stack": self.stack, "seed": self.rng_state.seed}
        if excluded := sorted(self.config.excluded()):
            facts["identity_exclude"] = excluded
        return self.workspace.config_content(plain(self.config), **facts)

    def _write_config(self) -> None:
        if self.is_main_process:
            self.workspace.write_config(self.config_content())

    def capture_model(self) -> Callable[[Path], list[str] | None]:
        """Copy the weights alone (those of the EMA when there is one); return a function that writes them."""
        raise NotImplementedError

    def _meta(self, kind: str) -> dict[str, Any]:
        state = self.train_state
        return {
            "kind": kind,
            "config_id": self.config_id,
            "code_id": self.code_id,
            "stack": self.stack,
            "axes": {},
            "world_size": self.world_size,
            "batch_size_equivalent": self.batch_size_equivalent,
            "global_step": state.global_step,
            "micro_step": state.micro_step,
            "epoch": state.epoch,
            "phase": state.phase,
            "score": self.latest_score,
            "wall_time": time.time(),
        }

    def _checkpoint_name(self, epochs: int | None = None) -> str:
        if epochs is not None:
            return f"epoch-{epochs}"
        state = self.train_state
        whole = not self.is_step_mode and state.phase != "evaluate" and state.epoch > 0
        between = not any(p.get("samples") or p.get("complete") for p in state.positions.values())
        return f"epoch-{state.epoch}" if whole and between else f"step-{state.global_step}"

    def prepare_for_shutdown_checkpoint(self) -> None:
        """Called before the save of a stop; at a boundary nothing is pending. Engines flush their own."""

    def _on_save_error(self, error: BaseException) -> None:
        self.emit("save_error", error=error)

    def _on_commit(self, path: Path) -> None:
        self.last_checkpoint = str(path)
        self.emit("save", path=path)

    def report_saves(self) -> None:
        """Tell the listeners about saves that were finished, or failed, since the last boundary."""
        self._store.boundary()

    # Restoring

    def auto_restore(self) -> None:
        """Restore what the configuration names: `resume`, else `auto_resume`, else `pretrained`."""
        config = self.config
        if config.resume:
            self._check_together(config.resume)
            self.load_checkpoint(config.resume)
        elif config.auto_resume and (newest := self.broadcast_object(self._newest())) is not None:
            self._checked = newest
            self.load_checkpoint(newest)
        elif config.pretrained:
            self.load_pretrained(config.pretrained)
        self._checked = None

    def _newest(self) -> Path | None:
        return self._store.newest() if self.is_main_process else None

    def read_checkpoint(self, src: Any) -> dict[str, Any]:
        """Read a checkpoint: a directory, an alias, a pointer file, a run directory, or a mapping that was read before.

        Raises:
            CheckpointNotFoundError: there is none.
            CheckpointError: it is damaged, or would run code.
        """
        if isinstance(src, Mapping):
            return dict(src)
        path = self._store.resolve(src)
        if path != self._checked:
            self._check_files(path)
        payload: dict[str, Any] = {"path": path, "manifest": self._store.read_manifest(path)}
        if (path / RECORD).exists():
            payload["record"] = _read_record(path / RECORD)
        return payload | self.read_state(path)

    def _check_files(self, path: Path) -> None:
        if bad := self._store.verify(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(bad)}")

    def _check_together(self, src: Any) -> None:
        """Let the main process read and check all files for all ranks; what is wrong each of them will find again."""
        found = None
        if self.is_main_process:
            with suppress(CheckpointError):
                path = self._store.resolve(src)
                self._check_files(path)
                found = path
        self._checked = self.broadcast_object(found)

    def read_config(self, src: Any) -> Any:
        """The configuration stored with a checkpoint or in a run directory, as a `RunnerConfig`."""
        path = Path(os.fspath(src))
        if not (path / CONFIG).exists():
            path = self._store.resolve(src)
        return _read_config(path)

    def load_checkpoint(self, src: Any) -> None:
        """Restore the full state of a run.

        Raises:
            CheckpointError, CheckpointNotFoundError: the source cannot be read.
            ResumeError: it belongs to a run that this one does not continue, or lacks a component.
        """
        payload = self.read_checkpoint(src)
        self._check_resumable(payload)
        excluded = self._excluded()
        self.load_state_dict({**payload["record"], **(payload.get("own") or {})})
        self.load_model(payload["model"])
        for name in ("ema", "optimizer", "scheduler", "grad_scaler", "dataloaders", "rng"):
            if name in excluded or not self._has_component(name):
                continue
            if payload.get(name) is None:
                raise ResumeError(
                    f"the checkpoint {payload.get('path', '')} holds no {name}, which this run has; "
                    f"to start it afresh, add {name!r} to checkpoint.exclude_from_loading"
                )
            getattr(self, f"load_{name}")(payload[name])
        self._after_restore(payload)

    def _has_component(self, name: str) -> bool:
        return name in ("dataloaders", "rng") or self.__dict__.get(name) is not None

    def _after_restore(self, payload: Mapping[str, Any]) -> None:
        state = self.train_state
        if state.phase == "done":
            state.phase = "train"
        path = payload.get("path")
        self.resumed_from = path or "memory"
        if path is not None and Path(path).parent == Path(self.checkpoint_dir):
            self.last_checkpoint = str(path)
        self.logger.info("resumed from %s at step %d, epoch %d", self.resumed_from, state.global_step, state.epoch)

    def _check_resumable(self, payload: Mapping[str, Any]) -> None:
        manifest = payload.get("manifest", {})
        where = payload.get("path", "the mapping")
        if "record" not in payload or manifest.get("kind", "full") == "model":
            raise ResumeError(f"{where} holds weights only; to start from them use `pretrained`")
        if (stack := manifest.get("stack", self.stack)) != self.stack and not self.shares_payload(stack):
            raise ResumeError(
                f"{where} was written by stack {stack!r} and this run uses {self.stack!r}; "
                "its weights can be taken over with `pretrained`"
            )
        before, now = manifest.get("batch_size_equivalent"), self.batch_size_equivalent
        if before is not None and now is not None and before != now:
            self.logger.warning("an update now takes %d samples; the checkpoint was trained with %d", now, before)
        config = payload["record"]["runner"]
        theirs = identity_view(config, self.config.excluded())
        different = differences(self.config.identity(), theirs)
        different.pop("pretrained", None)
        if different:
            lines = [f"  {key}: {mine!r} here, {other!r} in the checkpoint" for key, (mine, other) in different.items()]
            raise ResumeError("\n".join([f"{where} belongs to a different experiment:", *lines]))

    def shares_payload(self, stack: str) -> bool:
        """Whether full checkpoints of another stack can be resumed here."""
        return False

    def _excluded(self) -> set[str]:
        patterns = self.config.checkpoint.exclude_from_loading or []
        return {patterns} if isinstance(patterns, str) else set(patterns)

    def excluded_names(self, names: list[str]) -> list[str]:
        """Parameter names that `checkpoint.exclude_from_loading` leaves out.

        Raises:
            ResumeError: a pattern matches no component and no name.
        """
        found: list[str] = []
        for pattern in sorted(self._excluded() - set(COMPONENTS)):
            glob = pattern.removeprefix("model.")
            matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
            if not matched:
                raise ResumeError(
                    f"checkpoint.exclude_from_loading: {pattern!r} matches no parameter; "
                    f"the components are {', '.join(COMPONENTS)}"
                )
            found += matched
        return found

    @classmethod
    def from_checkpoint(cls, src: Any, **overrides: Any) -> Any:
        """A runner with the configuration and full state of a checkpoint.

        The source does not stay in its configuration, so that who reads that again goes on from the newest checkpoint;
        `pretrained` does, being part of what the run is.

        Args:
            src: a checkpoint or run directory.
            overrides: configuration keys to change, dotted names with `__` for the dot.
        """
        path = _checkpoint_path(src)
        config = _read_config(path)
        for key, value in overrides.items():
            config[key.replace("__", ".")] = value
        config.resume, config.auto_resume = str(path), False
        runner: Any = cls(config)
        runner.config.resume = None
        runner._write_config()
        return runner

    @classmethod
    def from_pretrained(cls, config: Any, src: Any) -> Any:
        """A runner with a configuration of its own and the weights of a checkpoint."""
        from .config import RunnerConfig

        config = RunnerConfig.of(config)
        config.resume, config.auto_resume, config.pretrained = None, False, os.fspath(src)
        return cls(config)

    # Files

    def save_result(self) -> None:
        """Write `results.json`, `latest.json` and `best.json`; a failure is a problem, not an error."""
        if not self.is_main_process:
            return
        header = self.workspace.header()
        position = {"global_step": self.global_step, "epoch": self.epoch}
        try:
            self.results.write(self.dir, header, position)
        except OSError as error:
            self.problems.add("results.json", error)

    def print_result(self) -> None:
        """Log the last row as a table beside the best."""
        latest = self.latest_result
        if latest is not None and self.is_main_process:
            self.console.evaluation(f"{self.results.unit} {latest.pop('index')}", latest, self.best_result)

    def write_score(self, name: str, score: float | None = None, split: str | None = None) -> None:
        """Hand one number to the trackers.

        Args:
            name: of the number.
            score: None is the latest score.
            split: None is the score's.
        """
        value = self.latest_score if score is None else score
        self.trackers.log(split or self.score_split, {name: value}, global_step=self.global_step, epoch=self.epoch)

    def save(self, obj: Any, file: Any, main_process_only: bool = True) -> Any:
        """Write an object by the extension of its file, atomically."""
        from danling import utils

        return utils.save(obj, file) if self.is_main_process or not main_process_only else file

    def load(self, file: Any) -> Any:
        """Read an object by the extension of its file; runs no code from it."""
        from danling import utils

        return utils.load(file)

    def dict(self) -> dict[str, Any]:
        """`state_dict()` as plain values."""
        return self.state_dict()

    def json(self, file: Any = None) -> str:
        """The state as JSON; written to `file` when given."""
        if file is not None:
            write_json(Path(os.fspath(file)), self.state_dict())
        return dump_json(self.state_dict())

    def yaml(self, file: Any = None) -> str:
        """The configuration as YAML; written to `file` when given."""
        text = self.config.yamls()
        if file is not None:
            Path(os.fspath(file)).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, file: Any) -> Any:
        """A runner from the configuration in a file that `json` wrote."""
        return cls(read_json(Path(os.fspath(file)))["runner"])

    @classmethod
    def from_yaml(cls, file: Any) -> Any:
        """A runner from a configuration file such as `runner.yaml`."""
        return cls(_read_config(Path(os.fspath(file))))

    def check_dir(self, action: str = "warn") -> bool:
        """Report a run directory that holds files already: `warn`, `raise` or `ignore`."""
        return self.workspace.check_dir(action)


def _read_record(path: Path) -> Any:
    try:
        record = read_json(path)
        if not all(isinstance(record[name], Mapping) for name in ("runner", "state", "results")):
            raise ValueError(f"{path} is not what a run stores")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold the record of a run: {error}") from None
    return record


def _read_config(path: Path) -> Any:
    from .config import RunnerConfig

    content = read_yaml(path / CONFIG if path.is_dir() else path)
    keys = {key: value for key, value in content.items() if key not in FACTS}
    return RunnerConfig.stored(keys, content.get("identity_exclude", ()))


def _checkpoint_path(src: Any) -> Path:
    path = Path(os.fspath(src))
    if path.is_file() and path.suffix == ".pointer":
        path = path.parent / path.read_text().strip()
    for candidate in (path, path / "checkpoints"):
        pointer = candidate / "latest.pointer"
        if pointer.exists():
            return candidate / pointer.read_text().strip()
    if not (path / CONFIG).exists():
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}")
    return path
