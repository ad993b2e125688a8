"""Sharded checkpoints in the format of `torch.distributed.checkpoint` (DCP): each rank writes and reads only its own parts.

Nothing is planned together: each rank knows by itself which of the tensors that several ranks hold it is to write, and the main
process puts the index together from what all ranks wrote, just before the commit. So a save adds no collective to that of the
commit, and may run on a writer thread. The index, `.metadata`, is a pickle; it is read by an unpickler that admits nothing but
the classes of such an index.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from danling.runners.errors import CheckpointError, ResumeError

from .payload import SHARDS as FOLDER
from .payload import report_misfit, strip_prefixes
from .snapshot import HostBuffers

INDEX = ".metadata"
PREFIXES = {"model": "model.", "ema": "ema.", "optimizer": "optimizer.state."}

# What the pickle of an index may name.
_PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}
ALLOWED: dict[str, set[str]] = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


# ------------------------------------------------------------------- tensors


def local_part(value: Any) -> Tensor:
    """What this rank holds of a tensor: the local tensor of a `DTensor`, the `local` of other split tensors, or all of it."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.to_local() if hasattr(value, "to_local") else value
    return value.local


def own_place(value: Any, rank: int, world_size: int) -> tuple[int, int]:
    """The number of this rank among those that hold the same part of a tensor, and how many these are.

    A `DTensor` is taken to span all ranks; a plain tensor to be the same on all of them.
    """
    mesh = getattr(value, "device_mesh", None)
    if mesh is None:
        return rank, world_size
    place, count = 0, 1
    for dim, placement in enumerate(value.placements):
        if placement.is_replicate():
            place = place * mesh.size(dim) + mesh.get_local_rank(dim)
            count *= mesh.size(dim)
    return place, count


def write_items(name: str, value: Any) -> list[WriteItem]:
    """How DCP describes the parts of a tensor that this rank holds."""
    if hasattr(value, "__create_write_items__"):
        items = value.__create_write_items__(name, value)
        return [item for item in items if math.prod(item.tensor_data.chunk.sizes) or not math.prod(value.shape)]
    chunk = ChunkStorageMetadata(torch.Size([0] * value.dim()), value.shape)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=value.dtype), size=value.shape)
    return [WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.TENSOR, tensor_data=data)]


# -------------------------------------------------------------------- saving


@dataclass
class Report:
    """What one rank wrote: DCP's results, and the chunks they are.

    Attributes:
        chunks: `(name, whole size, dtype, offsets, sizes)` of each.
        results: of the writer.
        more: whatever else the main process is to know.
    """

    chunks: list[tuple[str, torch.Size, torch.dtype, torch.Size, torch.Size]]
    results: list[Any]
    more: Any = None


class ShardedTensors:
    """The tensors of one instant, as this rank's file of a DCP checkpoint.

    Args:
        tensors: name → tensor, `DTensor`, or another split tensor; live.
        buffers: host memory that they are copied to.
        rank: of this process.
        place: tells for a tensor the number of this rank among those that hold the same part, and their count.
        dtype: what floating tensors are cast to, None for nothing.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        buffers: HostBuffers,
        *,
        rank: int,
        place: Callable[[Any], tuple[int, int]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rank = rank
        self.items: list[WriteItem] = []
        owned: dict[str, Any] = {}
        for name, value in tensors.items():
            index, count = place(value)
            if zlib.crc32(name.encode()) % count != index:
                continue  # another rank that holds the same writes it: each has its share of the names
            items = write_items(name, value)
            if items:
                self.items += items
                owned[name] = value
        parts = {name: local_part(value) for name, value in owned.items()}
        if dtype is not None:
            parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in parts.items()}
        self.copies = buffers.copy(parts)
        self._owned = {name: value for name, value in owned.items() if hasattr(value, "with_local")}

    def write(self, directory: Path) -> tuple[list[str], Report]:
        """Write this rank's file; return its name below `directory`, and the report for `write_index`.

        Raises:
            OSError: it cannot be written.
        """
        if not self.items:
            return [], Report([], [])
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        writer = FileSystemWriter(folder, sync_files=False)
        planner = _Copies(self.copies, self._owned)
        plan = writer.prepare_global_plan([SavePlan([])] * self.rank + [SavePlan(self.items)])[self.rank]
        results = writer.write_data(plan, planner)
        results.wait()
        chunks = [_describe(item, self.copies[item.index.fqn].dtype) for item in self.items]
        names = sorted({result.storage_data.relative_path for result in results.value()})
        return [f"{FOLDER}/{name}" for name in names], Report(chunks, results.value())


class _Copies(DefaultSavePlanner):
    """Hands the writer the copies on the host in place of the live tensors."""

    def __init__(self, copies: Mapping[str, Tensor], split: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies, self.split = copies, split

    def lookup_object(self, index: MetadataIndex) -> Any:
        copy = self.copies[index.fqn]
        if index.fqn in self.split:
            return self.split[index.fqn].with_local(copy).__get_tensor_shard__(index)
        return copy


def _describe(item: WriteItem, dtype: torch.dtype) -> tuple[str, torch.Size, torch.dtype, torch.Size, torch.Size]:
    data = item.tensor_data
    assert data is not None
    return item.index.fqn, data.size, dtype, data.chunk.offsets, data.chunk.sizes


def write_index(directory: Path, reports: Sequence[Report]) -> None:
    """Write the index over what all ranks wrote, on the main process.

    Raises:
        CheckpointError: the parts of a tensor do not add up to the whole; names it.
    """
    stored: dict[str, TensorStorageMetadata] = {}
    for name, size, dtype, offsets, sizes in (chunk for report in reports for chunk in report.chunks):
        entry = stored.setdefault(name, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
        if entry.size != size:
            raise CheckpointError(f"{name} has shape {tuple(entry.size)} on one rank and {tuple(size)} on another")
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
    for name, entry in stored.items():
        found, whole = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if found != whole or len({chunk.offsets for chunk in entry.chunks}) < len(entry.chunks):
            raise CheckpointError(
                f"the ranks wrote {found} elements of {name}, which has {whole}: a tensor that is split over an axis has "
                "to be a DTensor, and one that is not has to be the same on its ranks"
            )
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(folder, sync_files=False)
    writer.finish(Metadata(dict(stored)), [report.results for report in reports])


# ------------------------------------------------------------------- reading


class IndexUnpickler(pickle.Unpickler):
    """An unpickler that finds only the classes of an index: DCP's metadata, sizes, dtypes, layouts and paths."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object behind a name.

        Raises:
            pickle.UnpicklingError: it is none of those.
        """
        if name in ALLOWED.get(module, ()) or module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype):
            return getattr(import_module(module), name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_index(folder: Path) -> Metadata:
    """Read the index of a DCP folder without running any code that it may hold.

    Raises:
        CheckpointError: it is missing or damaged, names other classes than those of an index, or files elsewhere.
    """
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            metadata = IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {INDEX}: it is no checkpoint of torch.distributed.checkpoint") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds {error}, which is no part of an index. danling runs no code from a file; the checkpoint is "
            "damaged or was made to do harm"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    try:
        names = {info.relative_path for info in metadata.storage_data.values()}
        names_are_files = all(Path(name).name == name for name in names)
    except (AttributeError, TypeError):
        raise CheckpointError(f"{path} is damaged: it is not the index of a checkpoint") from None
    if not names_are_files:
        raise CheckpointError(f"{path} names files outside of {folder}")
    return metadata


class SafeReader(FileSystemReader):
    """DCP's reader with `read_index` in place of pickle; tensors are read with `weights_only=True`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class _Targets(DefaultLoadPlanner):
    """Puts what is read where it belongs; what is no tensor is refused, because reading it could run code."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        # DCP's own puts None in the place of objects whose type it does not know, such as rows of a packed parameter.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        target = self.state_dict[index.fqn]
        return super().lookup_tensor(index) if isinstance(target, Tensor) else target.__get_tensor_shard__(index)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        try:
            self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{read_item.dest_index.fqn} holds objects that only running code brings back"
            ) from error


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one component in a DCP folder: whole ones by name, read when they are asked for.

    Args:
        folder: with the index.
        prefix: that the names of the component have in it.
        metadata: of the folder, when it was read before.

    Raises:
        CheckpointError: see `read_index`.
    """

    def __init__(self, folder: Path, prefix: str = "", metadata: Metadata | None = None) -> None:
        self.folder, self.prefix = folder, prefix
        self.metadata = read_index(folder) if metadata is None else metadata

    @cached_property
    def entries(self) -> dict[str, TensorStorageMetadata]:
        """What the index says of each tensor."""
        return {
            name.removeprefix(self.prefix): entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if name.startswith(self.prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.read_into({name: whole})
        return whole

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole tensor."""
        return self.entries[name].size

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, Any]) -> None:
        """Read into tensors that are there: of split ones the parts that this rank holds. No collective.

        Args:
            targets: name → tensor, `DTensor` or another split tensor, of the stored shapes.

        Raises:
            CheckpointError: a file is damaged.
        """
        state = {f"{self.prefix}{name}": target for name, target in targets.items()}
        planner, reader = _Targets(), SafeReader(self.folder)
        planner.set_up_planner(state, self.metadata, True)
        reader.set_up_storage_reader(self.metadata, True)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        try:
            reader.read_data(plan, planner).wait()
        except CheckpointError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            raise CheckpointError(f"{self.folder} is damaged: {type(error).__name__}: {text[0]}") from None


@torch.no_grad()
def assign(target: Any, whole: Tensor) -> None:
    """Copy from a whole tensor into one that is there: of a split one the part that this rank holds. No collective."""
    if not hasattr(target, "__create_chunk_list__"):
        target.detach().copy_(whole)
        return
    for chunk in target.__create_chunk_list__():
        piece = whole
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            piece = piece.narrow(dim, offset, size)
        if piece.numel():
            target.__get_tensor_shard__(MetadataIndex("", chunk.offsets)).detach().copy_(piece)


def stored_components(directory: Path) -> dict[str, StoredTensors]:
    """The components in the DCP folder of a checkpoint: `model`, and `ema` and `optimizer` where they are there.

    Raises:
        CheckpointError: see `read_index`.
    """
    folder = directory / FOLDER
    metadata = read_index(folder)
    found = {name: StoredTensors(folder, prefix, metadata) for name, prefix in PREFIXES.items()}
    return {name: stored for name, stored in found.items() if stored or name == "model"}


def load_named(
    targets: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    skip: Iterable[str] = (),
    elsewhere: Iterable[str] = (),
    error: type[Exception] = ResumeError,
    source: Any = "the checkpoint",
) -> None:
    """Load whole or stored tensors into tensors that are there, split or not; changes nothing when they do not fit.

    Args:
        targets: name → tensor that is written to.
        state: name → whole tensor; of `StoredTensors` each rank reads its own parts.
        strict: refuse missing and unexpected names; wrong shapes are always refused.
        skip: names to leave as they are.
        elsewhere: names that other ranks have.
        error: raised when something does not fit.
        source: named in the message.

    Raises:
        ResumeError: or `error`: lists missing and unexpected names and wrong shapes.
    """
    if not isinstance(state, StoredTensors):
        state = strip_prefixes({name: value for name, value in state.items() if isinstance(value, Tensor)}, targets)
    skip, known = set(skip), {*targets, *elsewhere}
    wanted = [name for name in targets if name not in skip]
    here = [name for name in wanted if name in state]
    shapes = {name: state.shape(name) if isinstance(state, StoredTensors) else state[name].shape for name in here}
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in known and name not in skip]
    wrong = [
        f"{name} {tuple(shape)} instead of {tuple(targets[name].shape)}"
        for name, shape in shapes.items()
        if shape != targets[name].shape
    ]
    report_misfit(missing if strict else [], unexpected if strict else [], wrong, error=error, source=source)
    if isinstance(state, StoredTensors):
        state.read_into({name: targets[name] for name in here})
    else:
        for name in here:
            assign(targets[name], state[name])
