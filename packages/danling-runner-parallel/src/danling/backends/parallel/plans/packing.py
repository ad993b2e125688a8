"""Parameters that hold several matrices one below the other, such as the packed projection of attention.

Tensor parallelism gives each rank its heads of *every* matrix in such a parameter: rows that are not neighbours in the whole
parameter. A DTensor can only describe neighbours, so the split parameter is a DTensor over the rows in rank order (rank 0's rows
of the first matrix, of the second, ..., then rank 1's), which has the shape of the whole and which optimizers, gradient norms and
FSDP2 take as it is. Whatever leaves the process passes through this file, which knows where each row belongs.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_MARK = "_packed_parameters"


class Run(NamedTuple):
    """Neighbouring rows: where they stand in the whole parameter, where in this process, and how many."""

    row: int
    local: int
    length: int


def mark_packed(module: nn.Module, name: str, blocks: int, degree: int) -> None:
    """Note on a module that its parameter `name` holds `blocks` matrices whose rows are split over `degree` ranks."""
    module.__dict__.setdefault(_MARK, {})[name] = (blocks, degree)


def packed_parameters(part: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the packed and split parameters of a model part: name → (matrices, ranks that share them).

    The state of an optimizer that has the shape of such a parameter has its order too.
    """
    found = {}
    for prefix, module in part.named_modules():
        for name, layout in module.__dict__.get(_MARK, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = layout
    return found


def to_rank_order(whole: Tensor, blocks: int, degree: int) -> Tensor:
    """Bring the rows of a whole parameter into rank order; plain tensors only.

    Example:
        >>> to_rank_order(torch.tensor([0, 1, 10, 11, 20, 21]), blocks=3, degree=2)
        tensor([ 0, 10, 20,  1, 11, 21])
    """
    rows = whole.shape[0] // (blocks * degree)
    return whole.reshape(blocks, degree, rows, *whole.shape[1:]).transpose(0, 1).reshape(whole.shape)


def to_usual_order(ranked: Tensor, blocks: int, degree: int) -> Tensor:
    """Bring rows in rank order back to where the unsplit model has them; plain tensors only.

    Example:
        >>> to_usual_order(torch.tensor([0, 10, 20, 1, 11, 21]), blocks=3, degree=2)
        tensor([ 0,  1, 10, 11, 20, 21])
    """
    return to_rank_order(ranked, degree, blocks)


def runs_of(rows: int, start: int, length: int, blocks: int, degree: int) -> list[Run]:
    """Return where `length` rows from `start` on, counted in rank order, belong in the whole.

    Args:
        rows: rows of the whole parameter.
        start: first row held here, in rank order.
        length: rows held here.
        blocks: matrices in the parameter.
        degree: ranks that share each of them.

    Example:
        >>> runs_of(rows=12, start=6, length=4, blocks=3, degree=2)
        [Run(row=2, local=0, length=2), Run(row=6, local=2, length=2)]
    """
    piece = rows // (blocks * degree)
    runs = []
    local = 0
    while local < length:
        rank, within = divmod(start + local, blocks * piece)
        block, offset = divmod(within, piece)
        count = min(piece - offset, length - local)
        runs.append(Run((block * degree + rank) * piece + offset, local, count))
        local += count
    return runs


class PackedShard:
    """This process's rows of a packed parameter, or of optimizer state of its shape, as DCP wants them.

    `torch.distributed.checkpoint` asks objects for the chunks they hold; this answers with the places of the rows in the
    unsplit parameter, so that files hold its usual name, shape and order.

    Args:
        tensor: a split parameter, also one that FSDP2 has split once more.
        blocks: matrices packed in it.
        degree: ranks that share each of them.

    Attributes:
        local: the rows held here, in the order they have here; read and written in place.
        shape: of the whole.
        runs: where the rows belong.
        device_mesh, placements: of the tensor, which tell who holds the same.
    """

    def __init__(self, tensor: DTensor, blocks: int, degree: int) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        self.runs = runs_of(tensor.shape[0], offsets[0], sizes[0], blocks, degree) if math.prod(sizes) else []
        self.local = tensor.to_local().detach()
        self.shape, self.device_mesh, self.placements = tensor.shape, tensor.device_mesh, tensor.placements
        self._rest = tuple(offsets[1:]), tuple(sizes[1:])

    def with_local(self, local: Tensor) -> PackedShard:
        """The same rows in other memory."""
        twin = copy.copy(self)
        twin.local = local
        return twin

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.local.dtype

    def size(self) -> torch.Size:
        """Shape of the whole."""
        return self.shape

    def __create_write_items__(self, fqn: str, item: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.local), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        offsets, sizes = self._rest
        return [
            ChunkStorageMetadata(torch.Size((run.row, *offsets)), torch.Size((run.length, *sizes))) for run in self.runs
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for run in self.runs:
            if run.row == index.offset[0]:
                return self.local.narrow(0, run.local, run.length)
        raise ValueError(f"{index.fqn} has no rows here that begin at {index.offset}")
