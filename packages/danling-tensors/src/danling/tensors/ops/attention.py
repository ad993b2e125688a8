"""Scaled dot-product attention over ragged sequences: never padded, one dense call per group of equal lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danling.tensors.layout import Layout, LengthsError, Segments, int64_tensor, is_traced
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import named_error
from danling.tensors.ops.table import register
from danling.tensors.packing import difference

CHUNK = 1024
"""Queries of one call where a mask or weights of `(chunk, keys)` would be held."""


@register("attention", "scaled_dot_product_attention", path="grouped")
def scaled_dot_product_attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: explicit attn_mask should not be set when is_causal=True")
    q, k, v = (as_rows(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    check_batch(q, k, v)
    q_rows, k_rows, v_rows = values_of(q), values_of(k), values_of(v)
    settings = dropout_p, is_causal, scale, enable_gqa
    lengths_q, lengths_k = q._layout.segments, k._layout.segments
    if lengths_q.symbolic or lengths_k.symbolic:
        from danling.tensors.ops.opaque import attention

        whole = None if attn_mask is None else dense_mask(attn_mask, q._layout, k._layout)
        out = attention(q_rows, k_rows, v_rows, lengths_q, lengths_k, whole, *settings)
    else:
        mask = mask_reader(attn_mask, q, k) if attn_mask is not None else None
        out = attend(q_rows, k_rows, v_rows, lengths_q, lengths_k, mask, *settings)
    nested = isinstance(query, NestedTensor)
    if not nested or query._layout.dense:
        dense = out.reshape(query.shape[0], query.shape[-2], *out.shape[1:]).movedim(1, -2)
        return wrap(dense, query._layout.with_static(tuple(dense.shape[1:])), query._flags) if nested else dense
    return wrap(out, query._layout.with_static(tuple(out.shape[1:])), query._flags)


def as_rows(x: Any, name: str) -> NestedTensor:
    """An operand whose rows are sequence positions; a dense one counts as a batch of equal lengths.

    Raises:
        ValueError: The ragged dim is not the last but one, or the batch is not first.
    """
    if isinstance(x, NestedTensor):
        layout = x._layout
        if layout.rank < 2 or layout.ragged_dims not in ((layout.rank - 2,), ()):
            raise ValueError(
                f"{name} must have its ragged dim at -2, got ragged_dims={layout.ragged_dims} of {layout.rank} element dims; "
                "declare it with ragged_dims= where the batch is built"
            )
        if not layout.batch_first:
            raise ValueError(f"{name} has batch_first=False; use transpose(0, 1)")
        if layout.ragged_dims:
            return x
        x = values_of(x)
    rank = x.dim() - 1
    static = (*x.shape[1:-2], x.shape[-1])
    layout = Layout(equal_lengths(x, x.shape[0], x.shape[-2]), (rank - 2,), static)
    return wrap(x.movedim(-2, 1).reshape(layout.rows, *static), layout, (0.0, False))


def equal_lengths(x: Tensor, batch: int, length: int) -> Segments:
    """Segments of a dense batch."""
    if is_traced(x):
        from danling.tensors.tracing import uniform

        return uniform(batch, length, x.device)
    return Segments(int64_tensor([length] * batch).view(-1, 1))


def check_batch(q: NestedTensor, k: NestedTensor, v: NestedTensor) -> None:
    """Keys and values share their lengths, all share the batch size."""
    if k._layout.segments != v._layout.segments:
        raise ValueError(f"key and value must have the same lengths, but value {difference(v._layout, k._layout)}")
    if q._layout.batch_size != k._layout.batch_size:
        raise ValueError(f"query has batch size {q._layout.batch_size}, key {k._layout.batch_size}")


Reader = Callable[[list[int], int, int], Tensor]
"""Gives the mask `(group, *heads, n, m)` that the named elements see, bool (True is allowed) or additive."""


def mask_reader(mask: Any, q: NestedTensor, k: NestedTensor) -> Reader:
    """Read an attention mask group by group; entries at padding are never looked at.

    Raises:
        ValueError: It does not broadcast to `(B, *heads, Lq, Lk)`.
    """
    lq, lk = q._layout, k._layout
    if isinstance(mask, NestedTensor):
        if mask._layout.batch_size != lq.batch_size:
            raise ValueError(f"attn_mask has batch size {mask._layout.batch_size}, the query {lq.batch_size}")
        parts = mask.unbind()

        def read_nested(members: list[int], n: int, m: int) -> Tensor:
            return torch.stack([parts[i] for i in members])

        return read_nested
    whole = dense_mask(mask, lq, lk)
    return dense_reader(whole, whole.dim() - 1)


def dense_mask(mask: Any, lq: Layout, lk: Layout) -> Tensor:
    """A dense mask with all dims of `(B, *heads, Lq, Lk)`.

    Raises:
        ValueError: It does not broadcast to that.
        LengthsError: It is a NestedTensor in a traced graph.
    """
    if isinstance(mask, NestedTensor):
        raise LengthsError("a NestedTensor as attn_mask")
    wanted = (lq.batch_size, *lq.static_sizes[:-1], lq.max_sizes[0], lk.max_sizes[0])
    shape = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    if len(shape) != len(wanted) or any(a not in (1, b) for a, b in zip(shape, wanted)):
        raise ValueError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {wanted}")
    return mask.reshape(shape)


def dense_reader(whole: Tensor, rank: int) -> Reader:
    """Read a mask of `rank + 1` dims that broadcasts to `(B, *heads, Lq, Lk)`."""

    def read(members: list[int], n: int, m: int) -> Tensor:
        part = whole
        if part.shape[0] != 1:
            part = part[members[0] : members[-1] + 1]
        if part.shape[-2] != 1:
            part = part[..., :n, :]
        return part[..., :m] if part.shape[-1] != 1 else part

    return read


def groups_of(q: Segments, k: Segments) -> list[tuple[list[int], int, int]]:
    """Runs of neighbours with equal lengths: `(members, query length, key length)`."""

    def build() -> list[tuple[list[int], int, int]]:
        out: list[tuple[list[int], int, int]] = []
        for i, (n, m) in enumerate(zip(q.lengths, k.lengths)):
            if out and out[-1][1] == n and out[-1][2] == m:
                out[-1][0].append(i)
            else:
                out.append(([i], n, m))
        return out

    return q.memo("attention groups", build) if q is k else build()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    k_segments: Segments,
    mask: Reader | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    extra: tuple[Tensor, Tensor] | None = None,
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention of packed rows `(R, *heads, D)`, element by element.

    Neighbouring elements of equal length go as one call; long queries under a mask go in chunks, so that no call holds
    more than `CHUNK` rows of scores.

    Args:
        q: Query rows; `k` and `v` likewise.
        q_segments: Lengths of the queries, `k_segments` those of keys and values.
        mask: Reader of the mask, if any.
        extra: Keys and values `(x, *heads, D)` that every element sees after its own.
        run: What to call on each group instead of attention, with `(q, k, v, mask)`; its results are rows, too.
    """
    groups = groups_of(q_segments, k_segments)
    counts_q = [len(members) * n for members, n, _ in groups]
    counts_k = [len(members) * m for members, _, m in groups]
    heads = q.dim() - 2
    parts: list[Tensor] = []
    pieces = zip(groups, q.split(counts_q), k.split(counts_k), v.split(counts_k))
    for (members, n, m), q_part, k_part, v_part in pieces:
        if n == 0:
            continue
        count = len(members)
        qs, ks, vs = _sequence(q_part, count, n), _sequence(k_part, count, m), _sequence(v_part, count, m)
        seen = None if mask is None else mask(members, n, m)
        if extra is not None:
            more = extra[0].shape[0]
            ks, vs = (
                torch.cat([x, _sequence(e, 1, more).expand(count, *x.shape[1:-2], -1, -1)], -2)
                for x, e in zip((ks, vs), extra)
            )
            if seen is not None:
                seen = F.pad(seen.expand(*seen.shape[:-1], m), (0, more), value=seen.dtype == torch.bool)
        try:
            if run is not None:
                parts.append(run(qs, ks, vs, seen))
                continue
            out = _one(qs, ks, vs, seen, dropout_p, is_causal, scale, enable_gqa)
        except RuntimeError as error:
            raise named_error(members[0], error) from error
        out = out.movedim(-2, 1) if heads else out.squeeze(1)
        parts.append(out.reshape(count * n, *out.shape[2:]))
    if not parts:
        zero = (q.sum() + k.sum() + v.sum()) * 0
        return q.new_zeros(0, *q.shape[1:-1], v.shape[-1]) + zero.to(q.dtype)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sequence(rows: Tensor, count: int, length: int) -> Tensor:
    """Rows as `(count, *heads, length, D)`; at least four dims, which the fused kernels want."""
    x = rows.unflatten(0, (count, length))
    return x.movedim(1, -2) if x.dim() > 3 else x.unsqueeze(1)


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    n, m = q.shape[-2], k.shape[-2]
    if mask is not None and mask.dim() < q.dim():
        mask = mask.reshape(mask.shape[0], *(1,) * (q.dim() - mask.dim()), *mask.shape[1:])
    plain_cpu = q.device.type == "cpu"
    if plain_cpu and n > CHUNK and (mask is not None or dropout_p > 0 or (is_causal and m != n)):
        pieces = []
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            piece = mask
            if mask is not None and mask.shape[-2] != 1:
                piece = mask[..., start:stop, :]
            if is_causal:
                rows = torch.arange(start, stop, device=q.device)[:, None]
                piece = torch.arange(m, device=q.device) <= rows
            pieces.append(
                F.scaled_dot_product_attention(
                    q[..., start:stop, :], k, v, piece, dropout_p, False, scale=scale, enable_gqa=enable_gqa
                )
            )
        out = torch.cat(pieces, -2)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out
