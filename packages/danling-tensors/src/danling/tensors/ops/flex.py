"""Flex attention over ragged sequences: a score function and a mask function of positions inside each element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Segments
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.attention import CHUNK, as_rows, check_batch, groups_of
from danling.tensors.ops.base import named_error

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`score_mod(score, b, h, q_idx, kv_idx) -> score`, on scalars."""
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`mask_mod(b, h, q_idx, kv_idx) -> bool`, on scalars; true where the query sees the key."""


class BlockMask:
    """Which keys each query block of each element needs to look at, made by `create_block_mask`.

    Attributes:
        mask_mod: The function of positions that decides inside a block.
        block_size: Rows and columns of a block.
        heads: Number of heads the mask was made for; 1 when it is the same for all.
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        q: Segments,
        k: Segments,
        heads: int,
        block_size: tuple[int, int],
        any_blocks: list[Tensor],
        all_blocks: list[Tensor],
    ) -> None:
        self.mask_mod = mask_mod
        self.block_size = block_size
        self.heads = heads
        self._q, self._k = q, k
        self._any, self._all = any_blocks, all_blocks  # per element, `(query blocks, key blocks)`: over heads

    def sparsity(self) -> float:
        """Share of the blocks that no query of theirs looks at, in percent."""
        total = sum(blocks.numel() for blocks in self._any)
        seen = sum(int(blocks.sum()) for blocks in self._any)
        return 100.0 * (1 - seen / total) if total else 0.0

    def check(self, q: NestedTensor, k: NestedTensor) -> None:
        """Raise `ValueError` unless the mask was made for these lengths and heads."""
        for name, made, given in (("query", self._q, q._layout.segments), ("key", self._k, k._layout.segments)):
            if made != given:
                raise ValueError(
                    f"block_mask was made for {name} lengths {made.lengths}, got {given.lengths}; "
                    "call create_block_mask for this batch"
                )
        heads = q._layout.static_sizes[0]
        if self.heads not in (1, heads):
            raise ValueError(f"block_mask was made for {self.heads} heads, query has {heads}")

    def spans(self, members: list[int]) -> Iterator[tuple[int, int, int, int, bool]]:
        """For each query block of some elements: its rows, the span of keys they need, and whether to ask `mask_mod`."""
        n, m = self._q.lengths[members[0]], self._k.lengths[members[0]]
        rows, columns = self.block_size
        some = torch.stack([self._any[i] for i in members]).any(0).tolist()
        every = torch.stack([self._all[i] for i in members]).all(0).tolist()
        for block, (seen, full) in enumerate(zip(some, every)):
            wanted = [j for j, flag in enumerate(seen) if flag]
            first, last = (wanted[0], wanted[-1] + 1) if wanted else (0, 0)
            stop = min((block + 1) * rows, n)
            yield block * rows, stop, first * columns, min(last * columns, m), not all(full[first:last])

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch_size={self._q.batch_size}, heads={self.heads}, block_size={self.block_size}, "
            f"sparsity={self.sparsity():.1f}%)"
        )


def create_block_mask(
    mask_mod: MaskMod,
    query: Tensor,
    key: Tensor | None = None,
    *,
    H: int | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
) -> BlockMask:
    """Find the blocks of keys that each block of queries looks at, element by element.

    Args:
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)` on scalar index tensors gives a bool, true where the query may see the
            key. `b` is the element, `q_idx` and `kv_idx` count from the start of that element.
        query: NestedTensor of elements `(H, Lq, D)`.
        key: NestedTensor of elements `(H, Lk, D)`; `query` when None.
        H: Number of heads when the mask differs between them; else `mask_mod` is asked about head 0 only.
        BLOCK_SIZE: Queries and keys of a block. Smaller blocks skip more and cost more calls.

    Returns:
        The mask, good for every batch of these lengths.

    Raises:
        TypeError: `mask_mod` does not give bools.
        ValueError: The block size is not positive, or an operand is not a batch of `(H, L, D)` elements.

    Example:
        >>> import torch
        >>> from danling.tensors import NestedTensor, create_block_mask
        >>> q = NestedTensor(torch.ones(1, 256, 4), torch.ones(1, 128, 4))
        >>> create_block_mask(lambda b, h, q, k: q >= k, q, BLOCK_SIZE=64)
        BlockMask(batch_size=2, heads=1, block_size=(64, 64), sparsity=35.0%)
    """
    q = _heads_first(query, "query")
    k = q if key is None else _heads_first(key, "key")
    if q._layout.batch_size != k._layout.batch_size:
        raise ValueError(f"query has batch size {q._layout.batch_size}, key {k._layout.batch_size}")
    rows, columns = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else BLOCK_SIZE
    if rows < 1 or columns < 1:
        raise ValueError(f"BLOCK_SIZE must be positive, got {BLOCK_SIZE}")
    heads = torch.arange(1 if H is None else H, device=q.device)
    some: list[Tensor] = []
    every: list[Tensor] = []
    q_segments, k_segments = q._layout.segments, k._layout.segments
    for i, (n, m) in enumerate(zip(q_segments.lengths, k_segments.lengths)):
        shape = (-(-n // rows), -(-m // columns))
        any_blocks = torch.zeros(shape, dtype=torch.bool, device="cpu")
        all_blocks = torch.zeros(shape, dtype=torch.bool, device="cpu")
        b = torch.tensor([i], device=q.device)
        keys = torch.arange(m, device=q.device)
        for block in range(shape[0] if m else 0):
            queries = torch.arange(block * rows, min((block + 1) * rows, n), device=q.device)
            allowed = _mask(mask_mod, b, heads, queries, keys)
            short = shape[1] * columns - m
            flat = allowed.reshape(-1, m)
            any_blocks[block] = _blocks(flat.any(0), short, False, columns).any(1)
            all_blocks[block] = _blocks(flat.all(0), short, True, columns).all(1)
        some.append(any_blocks)
        every.append(all_blocks)
    return BlockMask(mask_mod, q_segments, k_segments, heads.numel(), (rows, columns), some, every)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention with scores changed by a function of positions, on sequences of different lengths, never padded.

    `softmax(score_mod(query @ key^T * scale)) @ value` for each element, with positions counted from the element's start,
    differentiable in `query`, `key`, `value` and in whatever tensors `score_mod` reads. Scores are held for one block of
    queries at a time and computed in float32 (float64 for float64). A query without any key gives zeros.

    Args:
        query: NestedTensor of elements `(H, Lq, D)`; a dense `(B, H, Lq, D)` counts as equal lengths, likewise below.
        key: Elements `(Hk, Lk, D)`.
        value: Elements `(Hk, Lk, Dv)`, with the lengths of `key`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` on scalars gives the new score.
        block_mask: From `create_block_mask` for the same lengths; blocks that it rules out are not computed.
        scale: Factor of the scores, `1 / sqrt(D)` when None.
        enable_gqa: `H` may be a multiple of `Hk`.
        return_lse: Give the log-sum-exp of the scores, elements `(H, Lq)`, as a second result.

    Returns:
        A NestedTensor of elements `(H, Lq, Dv)` with the layout of `query` (dense for a dense `query`), and the
        log-sum-exp if asked for.

    Raises:
        TypeError: `block_mask` is not from `danling.tensors.create_block_mask`.
        ValueError: Lengths, heads or batch sizes do not agree.

    Example:
        >>> import torch
        >>> from danling.tensors import NestedTensor, flex_attention
        >>> q = NestedTensor(torch.randn(2, 3, 8), torch.randn(2, 5, 8))
        >>> def nearer_is_better(score, b, h, q_idx, kv_idx):
        ...     return score - 0.5 * (q_idx - kv_idx).abs()
        >>> flex_attention(q, q, q, nearer_is_better).shape
        torch.Size([2, 2, 5, 8])

    Source: Dong et al., Flex Attention: A Programming Model for Generating Optimized Attention Kernels, 2024.
    """
    q, k, v = (_heads_first(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    check_batch(q, k, v)
    heads, kv_heads = q._layout.static_sizes[0], k._layout.static_sizes[0]
    if heads != kv_heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}: they must be equal, or a multiple with enable_gqa=True"
        )
    if block_mask is not None:
        if not isinstance(block_mask, BlockMask):
            raise TypeError(
                f"block_mask must come from danling.tensors.create_block_mask, got {type(block_mask).__name__}"
            )
        block_mask.check(q, k)
    if scale is None:
        scale = q._layout.static_sizes[1] ** -0.5
    groups = groups_of(q._layout.segments, k._layout.segments)
    q_counts = [len(members) * n for members, n, _ in groups]
    k_counts = [len(members) * m for members, _, m in groups]
    pieces = zip(
        groups, values_of(q).split(q_counts), values_of(k).split(k_counts), values_of(v).split(k_counts), strict=True
    )
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for (members, n, m), *parts in pieces:
        if not n:
            continue
        dense_q, *dense_kv = (x.unflatten(0, (len(members), size)).movedim(1, -2) for x, size in zip(parts, (n, m, m)))
        if heads != kv_heads:
            dense_kv = [x.repeat_interleave(heads // kv_heads, 1) for x in dense_kv]
        try:
            blocks = list(_attend(dense_q, dense_kv[0], dense_kv[1], members, scale, score_mod, block_mask))
        except RuntimeError as error:
            raise named_error(members[0], error) from error
        outs.append(torch.cat([out for out, _ in blocks], -2).movedim(-2, 1).flatten(0, 1))
        sums.append(torch.cat([lse for _, lse in blocks], -1).movedim(-1, 1).flatten(0, 1))
    rows = torch.cat(outs) if outs else values_of(q).new_zeros(0, heads, v._layout.static_sizes[-1])
    lse_rows = torch.cat(sums) if sums else values_of(q).new_zeros(0, heads, dtype=_working(q.dtype))
    layout = q._layout.with_static((heads, rows.shape[-1]))
    result: Tensor = wrap(rows, layout, q._flags)
    lse_result: Tensor = wrap(lse_rows, layout.with_dims((1,), (heads,)), q._flags)
    if not isinstance(query, NestedTensor):
        batch, length = query.shape[0], query.shape[-2]
        result, lse_result = (x.unflatten(0, (batch, length)).movedim(1, 2) for x in (rows, lse_rows))
    return (result, lse_result) if return_lse else result


def _heads_first(x: Any, name: str) -> NestedTensor:
    # as_rows knows (L, D) and further static dims; flex attention has exactly one dim of heads.
    if isinstance(x, NestedTensor):
        if x._layout.rank != 3:
            raise ValueError(f"{name} must have elements (H, L, D), got {x._layout.rank} element dims")
    elif not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a NestedTensor or a Tensor, got {type(x).__name__}")
    elif x.dim() != 4:
        raise ValueError(f"{name} must have shape (B, H, L, D), got {tuple(x.shape)}")
    return as_rows(x, name)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _every_key(n: int, m: int) -> Iterator[tuple[int, int, int, int, bool]]:
    for start in range(0, n, CHUNK):
        yield start, min(start + CHUNK, n), 0, m, False


def _over_positions(function: Callable[..., Tensor], leading: int) -> Callable[..., Tensor]:
    # From scalars to (b, h, q, k): `leading` arguments have all four dims, the four index arguments one each.
    for axis in (3, 2, 1, 0):
        dims = tuple(0 if i == axis else None for i in range(4))
        function = torch.vmap(function, (0,) * leading + dims)
    return function


def _mask(mask_mod: MaskMod, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    allowed = _over_positions(mask_mod, 0)(b, h, q, k)
    if allowed.dtype != torch.bool:
        raise TypeError(f"mask_mod must give bools, got {allowed.dtype}")
    return allowed


def _blocks(flags: Tensor, short: int, fill: bool, width: int) -> Tensor:
    return torch.nn.functional.pad(flags, (0, short), value=fill).view(-1, width).cpu()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    members: list[int],
    scale: float,
    score_mod: ScoreMod | None,
    block_mask: BlockMask | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    # Elements of equal lengths, dense (count, heads, L, D): the result and its log-sum-exp, one block of queries at a time.
    dtype, device = _working(q.dtype), q.device
    b, h = torch.tensor(members, device=device), torch.arange(q.shape[1], device=device)
    spans = _every_key(q.shape[-2], k.shape[-2]) if block_mask is None else block_mask.spans(members)
    for start, stop, first, last, masked in spans:
        scores = (q[:, :, start:stop].to(dtype) @ k[:, :, first:last].to(dtype).mT) * scale
        if first == last:
            out = q.new_zeros(*scores.shape[:-1], v.shape[-1]) + 0 * scores.sum()
            yield out.to(q.dtype), torch.full_like(scores.sum(-1), -torch.inf)
            continue
        where = torch.arange(start, stop, device=device), torch.arange(first, last, device=device)
        if score_mod is not None:
            scores = _over_positions(score_mod, 1)(scores, b, h, *where).to(dtype)
        if block_mask is not None and masked:
            allowed = _mask(block_mask.mask_mod, b, h[: block_mask.heads], *where)
            scores = scores.masked_fill(~allowed, -torch.inf)
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        alive = scores.masked_fill(dead, 0.0)  # else the gradient of a row of -inf is NaN
        weights = alive.softmax(-1).masked_fill(dead, 0.0)
        lse = alive.logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)
        yield (weights @ v[:, :, first:last].to(dtype)).to(q.dtype), lse
