"""`multi_head_attention_forward`, which `nn.MultiheadAttention` and the transformer layers call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danling.tensors.layout import Layout, LengthsError, Segments
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.attention import Reader, attend, check_batch, equal_lengths, mask_reader
from danling.tensors.ops.table import register


@register("attention", "multi_head_attention_forward", path="grouped")
def multi_head_attention_forward(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Operands are sequence-first as torch's function wants them: `.shape` `(L, B, E)`, i.e. `batch_first=False`."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("static_k and static_v are not supported with NestedTensors")
    if isinstance(is_causal, torch.SymBool):  # found out from the mask in a traced graph: the mask says it, too
        is_causal = False
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    one = key is value
    self_attention = query is key and one
    q = sequences(query, "query")
    k = q if query is key else sequences(key, "key")
    v = k if one else sequences(value, "value")
    check_batch(q, k, v)
    width = q._layout.static_sizes[0]
    if width != embed_dim_to_check:
        raise ValueError(f"was expecting embedding dimension of {embed_dim_to_check}, but got {width}")
    head = width // num_heads
    if head * num_heads != width:
        raise ValueError(f"embed_dim {width} not divisible by num_heads {num_heads}")
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        weights = in_proj_weight
    rows = _project(q, k, v, weights, in_proj_bias, self_attention, one)
    rows_q, rows_k, rows_v = (r.unflatten(-1, (num_heads, head)) for r in rows)
    extra = _extra(bias_k, bias_v, add_zero_attn, num_heads, head, rows_k)
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # as torch: the hint replaces the mask
    else:
        is_causal = False
    if is_causal and extra is not None:
        # The columns of bias_k and of zeros are seen by every query.
        top_q, top_k = q._layout.max_sizes[0], k._layout.max_sizes[0]
        attn_mask, is_causal = torch.ones(top_q, top_k, dtype=torch.bool, device=rows_q.device).triu(1), False
    dropout_p = dropout_p if training else 0.0
    lengths_q, lengths_k = q._layout.segments, k._layout.segments
    symbolic = lengths_q.symbolic or lengths_k.symbolic
    if symbolic and need_weights:
        raise LengthsError("attention with need_weights=True")
    mask: Any = (_dense_masks if symbolic else _mask)(attn_mask, key_padding_mask, q, k, num_heads, rows_q.dtype)
    weights_out = None
    if need_weights:
        out, weights_out = _with_weights(q, k, rows_q, rows_k, rows_v, mask, dropout_p, extra, average_attn_weights)
    elif symbolic:
        from danling.tensors.ops.opaque import attention

        out = attention(rows_q, rows_k, rows_v, lengths_q, lengths_k, mask, dropout_p, is_causal, extra=extra)
    else:
        out = attend(rows_q, rows_k, rows_v, lengths_q, lengths_k, mask, dropout_p, is_causal, extra=extra)
    out = F.linear(out.flatten(-2), out_proj_weight, out_proj_bias)
    if isinstance(query, NestedTensor):
        result: Any = wrap(out, query._layout.with_static((out.shape[-1],)), query._flags)
    else:
        result = out.reshape(query.shape[1], query.shape[0], -1).transpose(0, 1)
    return result, weights_out


def sequences(x: Any, name: str) -> NestedTensor:
    """An operand as a NestedTensor of elements `(L, E)`; a dense one is `(L, B, E)`.

    Raises:
        ValueError: `batch_first` of the module and of the tensor differ, or the elements are no sequences.
    """
    if not isinstance(x, NestedTensor):
        if x.dim() != 3:
            raise ValueError(f"{name} must be (L, B, E), got {tuple(x.shape)}")
        length, batch, width = x.shape
        layout = Layout(equal_lengths(x, batch, length), (0,), (width,), False)
        return wrap(x.transpose(0, 1).reshape(batch * length, width), layout, (0.0, False))
    layout = x._layout
    if layout.rank != 2 or layout.ragged_dims not in ((0,), ()):
        raise ValueError(f"{name} must have elements (L, E) with ragged dim 0, got {layout}")
    if layout.batch_first:
        raise ValueError(
            f"{name}: batch_first of the module and of the NestedTensor differ; build both with batch_first=True or both "
            "with batch_first=False (transpose(0, 1) changes the tensor's)"
        )
    if not layout.ragged_dims:
        return sequences(values_of(x).transpose(0, 1), name)
    return x


def _project(
    q: NestedTensor, k: NestedTensor, v: NestedTensor, weights: Any, bias: Any, self_attention: bool, one: bool
) -> tuple[Tensor, ...]:
    """Query, key and value rows, in as few products as their sharing allows."""
    if not isinstance(weights, tuple):
        if self_attention:
            return F.linear(values_of(q), weights, bias).chunk(3, -1)
        width = weights.shape[0] // 3
        if one:
            w, b = weights.split([width, 2 * width]), (None, None) if bias is None else bias.split([width, 2 * width])
            return F.linear(values_of(q), w[0], b[0]), *F.linear(values_of(k), w[1], b[1]).chunk(2, -1)
        weights = weights.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(values_of(x), w, b) for x, w, b in zip((q, k, v), weights, biases))


def _extra(
    bias_k: Tensor | None, bias_v: Tensor | None, zero: bool, heads: int, head: int, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    if bias_k is not None and bias_v is not None:
        keys.append(bias_k.reshape(1, heads, head))
        values.append(bias_v.reshape(1, heads, head))
    if zero:
        keys.append(like.new_zeros(1, heads, head))
        values.append(like.new_zeros(1, heads, head))
    return (torch.cat(keys), torch.cat(values)) if keys else None


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    """A mask in which True hides as one that is added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _dense_masks(attn: Any, padding: Any, q: NestedTensor, k: NestedTensor, heads: int, dtype: Any) -> Tensor | None:
    """Both masks as one dense additive mask, for a traced graph."""
    if isinstance(attn, NestedTensor) or isinstance(padding, NestedTensor):
        raise LengthsError("a NestedTensor as attention mask")
    parts = []
    if attn is not None:
        attn = _checked(attn, q, k, heads)
        parts.append(_additive(attn if attn.dim() == 4 else attn[None, None], dtype))
    if padding is not None:
        parts.append(_additive(_checked_padding(padding, k), dtype)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _checked(attn: Tensor, q: NestedTensor, k: NestedTensor, heads: int) -> Tensor:
    lq, lk = q._layout, k._layout
    full = (lq.batch_size * heads, lq.max_sizes[0], lk.max_sizes[0])
    if attn.dim() == 3:
        if tuple(attn.shape) != full:
            raise RuntimeError(f"The shape of the 3D attn_mask is {tuple(attn.shape)}, but should be {full}.")
        return attn.unflatten(0, (lq.batch_size, heads))
    if tuple(attn.shape) != full[1:]:
        raise RuntimeError(f"The shape of the 2D attn_mask is {tuple(attn.shape)}, but should be {full[1:]}.")
    return attn


def _checked_padding(padding: Tensor, k: NestedTensor) -> Tensor:
    wanted = (k._layout.batch_size, k._layout.max_sizes[0])
    if tuple(padding.shape) != wanted:
        raise RuntimeError(f"expecting key_padding_mask shape of {wanted}, but got {tuple(padding.shape)}")
    return padding


def _mask(attn: Any, padding: Any, q: NestedTensor, k: NestedTensor, heads: int, dtype: torch.dtype) -> Reader | None:
    readers: list[Reader] = []
    lq = q._layout
    wide = wrap(values_of(q)[:, None].detach(), lq.with_dims((1,), (heads, 1)), q._flags)
    if attn is not None:
        if not isinstance(attn, NestedTensor):
            attn = _checked(attn, q, k, heads)
        whole = mask_reader(_additive(attn, dtype), wide, k)

        def read_attn(members: list[int], n: int, m: int) -> Tensor:
            part = whole(members, n, m)
            return part if part.dim() == 4 else part[:, None]

        readers.append(read_attn)
    if padding is not None:
        if isinstance(padding, NestedTensor):
            parts = _additive(padding, dtype).unbind()
            readers.append(lambda members, n, m: torch.stack([parts[i] for i in members])[:, None, None])
        else:
            hidden = _additive(_checked_padding(padding, k), dtype)
            readers.append(lambda members, n, m: hidden[members[0] : members[-1] + 1, None, None, :m])
    if not readers:
        return None
    if len(readers) == 1:
        return readers[0]
    return lambda members, n, m: readers[0](members, n, m) + readers[1](members, n, m)


def _with_weights(
    q: NestedTensor,
    k: NestedTensor,
    rows_q: Tensor,
    rows_k: Tensor,
    rows_v: Tensor,
    mask: Reader | None,
    dropout_p: float,
    extra: Any,
    average: bool,
) -> tuple[Tensor, NestedTensor]:
    """Attention that also returns its weights, a NestedTensor of elements `(Lq, Lk)` or `(H, Lq, Lk)`."""
    weights: list[Tensor] = []
    scale = rows_q.shape[-1] ** -0.5

    def run(qs: Tensor, ks: Tensor, vs: Tensor, seen: Tensor | None) -> Tensor:
        scores = torch.matmul(qs * scale, ks.mT)
        if seen is not None:
            scores = scores + seen
        shares = torch.softmax(scores, -1)
        if dropout_p > 0:
            shares = F.dropout(shares, dropout_p)
        kept = shares.mean(1) if average else shares.movedim(1, -1)
        weights.append(kept.flatten(0, 2))
        return torch.matmul(shares, vs).movedim(-2, 1).flatten(0, 1)

    out = attend(rows_q, rows_k, rows_v, q._layout.segments, k._layout.segments, mask, extra=extra, run=run)
    more = 0 if extra is None else extra[0].shape[0]
    sizes = torch.stack([q._layout.segments.sizes[:, 0], k._layout.segments.sizes[:, 0] + more], 1)
    heads = rows_q.shape[1]
    if average:
        layout = Layout(Segments(sizes), (0, 1), ())
    else:
        layout = Layout(Segments(sizes), (1, 2), (heads,))
    values = torch.cat(weights) if weights else rows_q.new_zeros(0, *layout.static_sizes)
    return out, wrap(values, layout, q._flags)


@register("attention", "_nested_tensor_from_mask_left_aligned")
def left_aligned(func: Any, *args: Any) -> bool:
    """`nn.TransformerEncoder` asks whether it may convert its input to torch's own nested tensor: not this one."""
    return False


@register("attention", "_transformer_encoder_layer_fwd", path="grouped")
def encoder_layer(
    func: Any,
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    """What an encoder layer calls in evaluation where it does not see that its input is special, as in a traced graph."""
    masks: dict[str, Any] = {}
    if mask is not None:
        masks["key_padding_mask" if mask_type == 1 else "attn_mask"] = mask.flatten(0, 1) if mask_type == 2 else mask

    def attention(x: Any) -> Any:
        x = x.transpose(0, 1)
        projections = qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias
        out, _ = F.multi_head_attention_forward(
            x, x, x, embed_dim, num_heads, *projections, training=False, need_weights=False, **masks
        )
        return out.transpose(0, 1)

    def ffn(x: Any) -> Any:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    width = (embed_dim,)
    if norm_first:
        x = src + attention(F.layer_norm(src, width, norm_weight_1, norm_bias_1, eps))
        return x + ffn(F.layer_norm(x, width, norm_weight_2, norm_bias_2, eps))
    x = F.layer_norm(src + attention(src), width, norm_weight_1, norm_bias_1, eps)
    return F.layer_norm(x + ffn(x), width, norm_weight_2, norm_bias_2, eps)
