"""Reading what DeepSpeed engines have saved, here or elsewhere, without running code from a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danling.backends.torch.snapshot import read_file
from danling.runners.errors import CheckpointError
from danling.runners.manifest import MANIFEST

from .quiet import quiet_import

TAG = "engine"  # where the engine's files are in a checkpoint of danling's
WHOLE = "mp_rank_00_model_states.pt"
PARTS = "zero_pp_rank_*_mp_rank_00_model_states.pt"
# What the engine itself puts beside the state of its caller.
ENGINE_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size "
    "checkpoint_parallel_dimensions ds_config ds_version".split()
)


@dataclass(frozen=True)
class EngineFiles:
    """The files of one save of an engine.

    Attributes:
        directory: what the engine was told to save to.
        tag: the folder in it.
    """

    directory: Path
    tag: str

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.directory / self.tag


def read_engine_file(path: str | os.PathLike[str]) -> Any:
    """Read a file that an engine has saved.

    Besides plain data it may hold objects of the classes in which DeepSpeed keeps loss scales, stages and addresses of
    fragments; nothing else is brought back.

    Raises:
        CheckpointError: it holds an object of any other class, which is named, or is damaged.
        FileNotFoundError: there is none.
    """
    with quiet_import():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return read_file(path)


def find_foreign(source: Any) -> EngineFiles | None:
    """Find the save that a path names when DeepSpeed, not danling, has laid out the directory.

    Args:
        source: a directory with a file `latest` in it, or the folder of one tag.

    Returns:
        None for everything else.
    """
    if isinstance(source, Mapping):
        return None
    path = Path(os.fspath(source)).expanduser()
    if not path.is_dir() or (path / MANIFEST).exists():
        return None
    if (path / "latest").is_file():
        return EngineFiles(path, (path / "latest").read_text().strip())
    return EngineFiles(path.parent, path.name) if _model_files(path) else None


def read_common(folder: Path) -> dict[str, Any]:
    """Read what every rank of a save has in common: shapes, counters, the state of the engine's caller.

    Raises:
        CheckpointError: there is no save in the folder, or one of several tensor-parallel ranks.
    """
    return read_engine_file(_model_files(folder, required=True)[0])


def zero_stage(common: Mapping[str, Any]) -> int:
    """The ZeRO stage of the engine that saved."""
    return int(((common.get("ds_config") or {}).get("zero_optimization") or {}).get("stage") or 0)


def read_engine_weights(folder: Path) -> dict[str, Tensor]:
    """Read the whole weights of a save, from however many ranks.

    Returns:
        Name → tensor, under the names of the module that the engine carried. Weights that ZeRO 3 had split are those of
        the optimizer, in float32.

    Raises:
        CheckpointError: there are none, or they cannot be put together.
    """
    common = read_common(folder)
    if (folder / WHOLE).exists():
        return dict(common["module"])
    ranks = range(common["dp_world_size"])
    weights = {name: value for name, value in common["module"].items() if name in common["buffer_names"]}
    flats = [_flat_groups(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in ranks]
    for index, shapes in enumerate(common["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            share = math.ceil(shape.numel() / len(ranks))
            parts = [flat[index][offset : offset + share] if index < len(flat) else flat[0][:0] for flat in flats]
            weights[name] = _join(parts, shape, name, folder)
            offset += share
    frozen = common.get("frozen_param_shapes") or {}
    others = [common, *(read_engine_file(folder / PARTS.replace("*", str(rank))) for rank in ranks[1:] if frozen)]
    for name, shape in frozen.items():
        weights[name] = _join([other["frozen_param_fragments"][name] for other in others], shape, name, folder)
    for alias, name in (common.get("shared_params") or {}).items():
        weights[alias] = weights[name]
    return weights


def _flat_groups(path: Path) -> list[Tensor]:
    try:
        return read_engine_file(path)["optimizer_state_dict"]["fp32_flat_groups"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the weights were split by ZeRO 3 over all ranks") from None


def _join(parts: list[Tensor], shape: torch.Size, name: str, folder: Path) -> Tensor:
    whole = torch.cat([part.flatten() for part in parts])
    if len(whole) < shape.numel():
        raise CheckpointError(
            f"{folder} does not hold all of {name}, which was split by ZeRO 3 and moved elsewhere; "
            "export the weights from the running job: runner.export(path)"
        )
    return whole[: shape.numel()].view(shape).clone()


def _model_files(folder: Path, required: bool = False) -> list[Path]:
    found = sorted(folder.glob("*_model_states.pt"), key=lambda path: (len(path.name), path.name))
    if required and not found:
        raise CheckpointError(f"{folder} holds no weights of a DeepSpeed engine (no *_model_states.pt)")
    if required and any("mp_rank_00" not in path.name for path in found):
        raise CheckpointError(f"{folder} was saved by tensor-parallel ranks, whose weights cannot be put together here")
    return found
