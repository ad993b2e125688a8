"""`nn.MultiheadAttention` over a part of the heads, a part of the sequence, or both."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import Axis, copy_in, gather_parts, join, own_randomness, sum_out
from .linear import local
from .modules import inherits
from .ring import ring_applies, ring_attention


class Split:
    """What `become` mixes into an `nn.MultiheadAttention`: the same results from the part at hand.

    With `heads`, the projections hold this rank's heads and the outputs are added up over the axis. With `sequence`,
    queries, keys and values are this rank's part of the sequence; keys and values of the other ranks are gathered (or
    passed round, where torch's ring attention applies) and masks are cut to the rows of these queries.
    """

    heads: Axis | None = None
    sequence: Axis | None = None

    in_proj_weight: Any
    in_proj_bias: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    out_proj: Any
    bias_k: Any
    bias_v: Any
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    training: bool
    add_zero_attn: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does, which documents the arguments.

        With a `sequence` axis, an `attn_mask` has the rows of the whole sequence or of this part, and the columns of the
        whole; or it is this part's square, if it is causal and `is_causal` says so. A `key_padding_mask` covers the
        whole sequence or this part. Attention weights are returned for the rows of this part.

        Raises:
            ValueError: a mask has another shape.
        """
        attend = _attend_eagerly if self.heads is not None and self.dropout and self.training else Split._attend
        return attend(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask too")
        batched = query.dim() == 3
        parts: Any = self._project(query, key, value)
        if not batched:
            parts = [part.unsqueeze(0) for part in parts]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            parts = [part.transpose(0, 1) for part in parts]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        rate = self.dropout if self.training else 0.0
        plain = key_padding_mask is None and not need_weights and self.bias_k is None and not self.add_zero_attn
        weights = None
        if self.sequence is not None and plain and (attn_mask is None or is_causal) and ring_applies(q, k, rate):
            mixed = ring_attention(q, k, v, self.sequence, is_causal=is_causal)
        else:
            k, v = self._all_keys(k, v)
            mask = self._mask(q, k, attn_mask, key_padding_mask, is_causal)
            if is_causal and not need_weights:
                k, v, mask = self._without_later(q, k, v, mask)
            k, v, mask = self._extended(k, v, mask)
            split = rate > 0 and self.heads is not None
            with own_randomness(self.heads, q.device) if split else nullcontext():  # type: ignore[arg-type]
                mixed, weights = _weighted(q, k, v, mask, rate) if need_weights else (_mixed(q, k, v, mask, rate), None)
        mixed = mixed.transpose(1, 2).flatten(2)
        if not batched:
            mixed = mixed.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        return self._out(mixed), None if weights is None else self._all_weights(weights, average_attn_weights, batched)

    # Projections

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to this rank's heads; inputs that are one tensor are projected, and synchronised, as one."""
        packed, bias = local(self.in_proj_weight), local(self.in_proj_bias)
        same = key is query, value is key
        if self.heads is not None:
            query = copy_in(query, self.heads)
            key = query if same[0] else copy_in(key, self.heads)
            value = key if same[1] else copy_in(value, self.heads)
        if packed is not None and all(same):
            q, k, v = F.linear(query, packed, bias).chunk(3, -1)
            return q, k, v
        if packed is None:
            matrices = [local(weight) for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)]
        else:
            matrices = packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), matrices, biases)
        return q, k, v

    def _out(self, mixed: Tensor) -> Tensor:
        weight, bias = local(self.out_proj.weight), local(self.out_proj.bias)
        if self.heads is None:
            return F.linear(mixed, weight, bias)
        out = sum_out(F.linear(mixed, weight), self.heads)
        return out if bias is None else out + bias

    # Keys, values and masks

    def _all_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, gathered together."""
        if self.sequence is None:
            return k, v
        k, v = gather_parts(torch.stack((k, v)), self.sequence, 3)
        return k, v

    def _without_later(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Leave out keys that a causal mask hides from all queries here: those of later ranks."""
        if self.sequence is None or mask is None or k.shape[2] != q.shape[2] * self.sequence.degree:
            return k, v, mask
        seen = q.shape[2] * (self.sequence.rank + 1)
        return k[:, :, :seen], v[:, :, :seen], mask[..., :seen]

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Return what is added to the scores: `(1 or B, 1 or local heads, rows here, all keys)`."""
        mask = None
        if attn_mask is not None:
            mask = self._rows(_additive(attn_mask, q.dtype), q, k, is_causal)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            if self.sequence is not None and padding.shape[-1] * self.sequence.degree == k.shape[2]:
                padding = gather_parts(padding, self.sequence, 1)
            if padding.shape != (k.shape[0], k.shape[2]):
                raise ValueError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but there are {k.shape[0]} sequences "
                    f"of {k.shape[2]} keys{self._cut(k)}"
                )
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _rows(self, mask: Tensor, q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
            if self.heads is not None:
                mask = mask.chunk(self.heads.degree, 1)[self.heads.rank]
        elif mask.dim() == 2:
            mask = mask[None, None]
        if self.sequence is not None:
            degree, rank = self.sequence.degree, self.sequence.rank
            if mask.shape[-2:] == (rows * degree, keys):
                mask = mask.narrow(-2, rank * rows, rows)
            elif is_causal and mask.shape[-2:] == (rows, rows) and keys == rows * degree:
                later = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(1 + rank * rows)
                mask = _additive(later, q.dtype)[None, None]
        if mask.shape[-2:] != (rows, keys) or mask.shape[0] not in (1, q.shape[0]):
            raise ValueError(
                f"attn_mask has shape {tuple(mask.shape[-2:])} in its last dimensions, but there are {rows} queries and "
                f"{keys} keys{self._cut(k)}"
            )
        return mask

    def _cut(self, k: Tensor) -> str:
        if self.sequence is None:
            return ""
        return (
            f", {k.shape[2] // self.sequence.degree} of them on each of {self.sequence.degree} context ranks; "
            "masks cover all keys, and a causal mask over this rank's part alone needs is_causal=True"
        )

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value, and the zero ones, if there are any."""
        more = []
        if self.bias_k is not None:
            shape = (k.shape[0], 1, k.shape[1], k.shape[3])
            more.append(
                [local(bias).view(1, *shape[1:]).expand(shape).transpose(1, 2) for bias in (self.bias_k, self.bias_v)]
            )
        if self.add_zero_attn:
            zero = k.new_zeros(*k.shape[:2], 1, k.shape[3])
            more.append([zero, zero])
        for key, value in more:
            k, v = torch.cat([k, key], 2), torch.cat([v, value], 2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _all_weights(self, weights: Tensor, average: bool, batched: bool) -> Tensor:
        """Attention weights of all heads, `(B, heads, L, S)`, or their mean."""
        if average:
            weights = weights.sum(1) / self.num_heads
            weights = weights if self.heads is None else sum_out(weights, self.heads)
        elif self.heads is not None:
            weights = join(weights, self.heads, 1)
        return weights if batched else weights.squeeze(0)


# Random numbers of a rank's own break a graph, here between views of one tensor, which compilers refuse to hand over.
_attend_eagerly = torch.compiler.disable(Split._attend)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"masks are boolean or floating point tensors, not {mask.dtype}")
    return mask.to(dtype)


def _mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, rate)


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
    return weights @ v, weights


def is_standard(module: nn.Module) -> bool:
    """Whether a module attends the way `nn.MultiheadAttention` does."""
    return isinstance(module, Split) or inherits(module, nn.MultiheadAttention, "forward")
