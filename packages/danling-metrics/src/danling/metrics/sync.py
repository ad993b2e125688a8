"""The exchange through which ranks read a metric together.

Every collective read takes the same three steps on every rank, whatever the container and whatever it holds:

1. **Header.** One all-gather of a record of `len(HEADER)` integers per rank.
2. **Verdict.** All ranks see all headers and take the same branch: nothing has changed, so cached values are used; the
   ranks disagree, so all raise `MetricSyncError`; or data travels. Names are exchanged only to explain a disagreement,
   or for a rank that has no names of its own yet.
3. **Data.** One all-reduce that sums the int64 counts, if there are any, and one padded all-gather that carries
   everything else (float64 sums, stored rows) as bytes with a description of their dtypes and shapes.

Which collective comes next therefore never depends on what only one rank knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import MetricSyncError

PROTOCOL = 1
HEADER = (
    "protocol",
    "fingerprint",
    "blank",
    "kind",
    "generation",
    "changed",
    "error",
    "rows",
    "row_type",
    "ints",
    "bytes",
    "text",
)
_KINDS = {"batch": 1, "average": 2}
_DTYPES = (
    torch.float64,
    torch.int64,
    torch.float32,
    torch.int32,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.bool,
    torch.uint8,
    torch.int8,
)


@dataclass
class Payload:
    """What one rank sends: counts to be summed, tensors to be gathered, and a summary of its pending rows."""

    ints: list[Tensor] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    rows: int = 0
    row_type: int = 0


class Syncable(Protocol):
    """What an object offers to be read by all ranks together."""

    _generation: int

    def _describe(self) -> Mapping[str, Any] | None:
        """Class, names, options and state layout as plain values; None when the object has none of its own yet."""

    def _adopt(self, description: Mapping[str, Any]) -> None:
        """Take the description of the other ranks (called only after `_describe` returned None)."""

    def _changed(self, kind: str) -> bool:
        """Whether anything happened since the last exchange of this kind."""

    def _check(self, kind: str) -> None:
        """Raise if the state cannot be read."""

    def _pack(self, kind: str) -> Payload:
        """Return what this rank sends."""

    def _unpack(self, kind: str, ints: list[Tensor], parts: list[list[Tensor]]) -> None:
        """Take the sums of all ranks' counts and every rank's tensors, in rank order."""

    def _restart(self, generation: int) -> None:
        """Forget what was exchanged before, so that the next payload holds everything."""


def world_size(distributed: bool, group: Any = None) -> int:
    """Return the number of ranks that read together, 1 when reads are local."""
    if not (distributed and dist.is_available() and dist.is_initialized()):
        return 1
    return max(1, dist.get_world_size(group))


def exchange(item: Syncable, kind: str, group: Any = None, device: torch.device | None = None) -> bool:
    """Read `item` on all ranks of `group` together.

    Args:
        item: the object to read; its `_unpack` is called with what all ranks sent.
        kind: `"average"` or `"batch"`.
        group: the process group, the default group if None.
        device: where the collectives run; the CPU under gloo and the current CUDA device under NCCL if None.

    Returns:
        True if data was exchanged; False if no rank has changed since the last exchange of this kind.

    Raises:
        MetricSyncError: on every rank, if the ranks disagree or one of them cannot be read.
        ValueError: on the rank that cannot be read, its own error.
    """
    device = collective_device(group, device)
    error = None
    description: Mapping[str, Any] | None = None
    payload = Payload()
    try:
        description = item._describe()
        if description is not None:
            item._check(kind)
            payload = item._pack(kind)
    except Exception as e:  # reported to every rank below, then raised
        error, payload = e, Payload()
    text = _encode(description)
    mine = [
        PROTOCOL,
        fingerprint(description),
        int(description is None),
        _KINDS[kind],
        item._generation,
        int(item._changed(kind)),
        int(error is not None),
        payload.rows,
        payload.row_type,
        sum(t.numel() for t in payload.ints),
        _packed_size(payload.parts),
        len(text),
    ]
    headers = [
        dict(zip(HEADER, row, strict=True)) for row in _gather(torch.tensor(mine, device=device), group).tolist()
    ]
    known = [h for h in headers if not h["blank"] and not h["error"]]

    if failed := [rank for rank, h in enumerate(headers) if h["error"]]:
        if error is not None:
            raise error
        raise MetricSyncError(f"rank {_join(failed)} cannot be read; its own error says why")
    for name, what in (("protocol", "versions of danling-metrics"), ("kind", "what is read (batch or average)")):
        if len({h[name] for h in headers}) > 1:
            raise MetricSyncError(f"ranks differ in {what}: {_by_rank(headers, name)}")
    differ = len({h["fingerprint"] for h in known}) > 1
    if differ or (known and len(known) < len(headers)):
        texts = [
            t.cpu()
            for t in _gather_bytes(torch.frombuffer(bytearray(text), dtype=torch.uint8), headers, "text", group, device)
        ]
        descriptions = [json.loads(bytes(t.tolist())) for t in texts]
        if differ:
            raise MetricSyncError(explain(descriptions))
        if description is None:
            item._adopt(next(d for d in descriptions if d is not None))
        return exchange(item, kind, group, device)
    if not any(h["changed"] for h in headers):
        return False
    if len({h["generation"] for h in headers}) > 1:
        # A rank was reset, merged or loaded on its own. Everybody starts from its whole local state again.
        item._restart(max(h["generation"] for h in headers))
        return exchange(item, kind, group, device)
    if len({h["row_type"] for h in headers if h["row_type"]}) > 1:
        raise MetricSyncError(
            "ranks differ in the kind or trailing shape of their rows: "
            + ", ".join(f"rank {r}: {_row_type_name(h['row_type'])}" for r, h in enumerate(headers) if h["row_type"])
        )
    if len({h["ints"] for h in headers}) > 1:
        raise MetricSyncError(f"ranks differ in the number of their counts: {_by_rank(headers, 'ints')}")

    ints = payload.ints
    if headers[0]["ints"]:
        flat = torch.cat([t.reshape(-1).to(device) for t in ints])
        dist.all_reduce(flat, group=group)
        ints = [
            piece.view(t.shape).to(t.device)
            for piece, t in zip(flat.split([t.numel() for t in ints]), ints, strict=True)
        ]
    packed = _gather_bytes(_pack(payload.parts, device), headers, "bytes", group, device)
    item._unpack(kind, ints, [_unpack(p) for p in packed])
    return True


def collective_device(group: Any, device: torch.device | None) -> torch.device:
    """Return the device on which the collectives of `group` run."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend and "gloo" not in backend:
        if device is not None and device.type == "cuda":
            return device
        return torch.device("cuda", torch.cuda.current_device())
    if device is not None and "nccl" in backend:
        return device
    return torch.device("cpu")


def fingerprint(description: Mapping[str, Any] | None) -> int:
    """Return 63 bits that identify a description."""
    return int.from_bytes(hashlib.blake2b(_encode(description), digest_size=8).digest(), "little") >> 1


def explain(descriptions: Sequence[Any], labels: Sequence[str] | None = None) -> str:
    """Say in one sentence per key how descriptions differ."""
    labels = labels or [f"rank {rank}" for rank in range(len(descriptions))]
    pairs = [(label, d) for label, d in zip(labels, descriptions, strict=True) if d is not None]
    lines = list(_differences(pairs, ""))
    return f"{'ranks' if labels[0].startswith('rank') else 'states'} disagree: " + "; ".join(lines)


def _differences(pairs: list[tuple[str, Any]], path: str):
    if not all(isinstance(d, Mapping) for _, d in pairs):
        if len({json.dumps(d, sort_keys=True) for _, d in pairs}) > 1:
            yield f"{path or 'contents'} is " + ", ".join(f"{d!r} on {label}" for label, d in pairs)
        return
    keys = list(dict.fromkeys(key for _, d in pairs for key in d))
    for key in keys:
        name = f"{path}.{key}" if path else str(key)
        have = [(label, d[key]) for label, d in pairs if key in d]
        if len(have) < len(pairs):
            lack = [label for label, d in pairs if key not in d]
            yield f"{name} is on {', '.join(label for label, _ in have)} and not on {', '.join(lack)}"
        else:
            yield from _differences(have, name)


def _encode(description: Any) -> bytes:
    return json.dumps(description, sort_keys=True, default=str).encode()


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _by_rank(headers: Sequence[Mapping[str, int]], name: str) -> str:
    return ", ".join(f"rank {rank}: {h[name]}" for rank, h in enumerate(headers))


def row_type(integer: bool, width: Sequence[int]) -> int:
    """Return a number for the kind (labels or scores) and trailing shape of rows that `_row_type_name` can read."""
    code = 0
    for size in width:
        code = (code << 20) | int(size)
    return (code << 4) | (len(tuple(width)) << 1 | int(integer)) + 1


def _row_type_name(code: int) -> str:
    low, code = (code & 15) - 1, code >> 4
    width = []
    for _ in range(low >> 1):
        width.append(code & 0xFFFFF)
        code >>= 20
    return f"{'labels' if low & 1 else 'scores'} of shape {('N', *reversed(width))}".replace("'", "")


def _gather(tensor: Tensor, group: Any) -> Tensor:
    """All-gather equal-sized 1-d tensors into `(world_size, n)`."""
    out = tensor.new_empty((dist.get_world_size(group), tensor.numel()))
    dist.all_gather(list(out.unbind(0)), tensor, group=group)
    return out


def _gather_bytes(
    data: Tensor, headers: Sequence[Mapping[str, int]], size: str, group: Any, device: torch.device
) -> list[Tensor]:
    """All-gather byte tensors whose sizes stand in the headers under `size`."""
    sizes = [h[size] for h in headers]
    if not max(sizes):
        return [data.new_empty(0) for _ in sizes]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data.to(device)
    return [row[:n] for row, n in zip(_gather(padded, group).unbind(0), sizes, strict=True)]


def _packed_size(parts: Sequence[Tensor]) -> int:
    if not parts:
        return 0
    return 8 * (1 + sum(2 + t.dim() for t in parts)) + sum(_aligned(t.numel() * t.element_size()) for t in parts)


def _aligned(nbytes: int) -> int:
    return (nbytes + 7) // 8 * 8


def _pack(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Lay tensors into one byte tensor: their number, dtypes and shapes as int64, then their data, 8-byte aligned."""
    if not parts:
        return torch.empty(0, dtype=torch.uint8, device=device)
    index = [len(parts)]
    for t in parts:
        index += [_DTYPES.index(t.dtype), t.dim(), *t.shape]
    out = torch.zeros(_packed_size(parts), dtype=torch.uint8, device=device)
    out[: 8 * len(index)] = torch.tensor(index, device=device).view(torch.uint8)
    start = 8 * len(index)
    for t in parts:
        nbytes = t.numel() * t.element_size()
        if nbytes:
            out[start : start + nbytes] = t.detach().to(device).contiguous().view(-1).view(torch.uint8)
        start += _aligned(nbytes)
    return out


def _unpack(data: Tensor) -> list[Tensor]:
    """Undo `_pack`."""
    if not data.numel():
        return []
    data = data.clone() if data.storage_offset() % 8 else data
    count = int(data[:8].view(torch.int64))
    # The index of a tensor of d dims takes 2 + d numbers; read the dims as they come.
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    specs, at = [], 1
    for _ in range(count):
        code, dims = words[at : at + 2].tolist()
        specs.append((_DTYPES[code], words[at + 2 : at + 2 + dims].tolist()))
        at += 2 + dims
    parts, start = [], 8 * at
    for dtype, shape in specs:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        parts.append(data[start : start + nbytes].clone().view(dtype).view(shape))
        start += _aligned(nbytes)
    return parts
