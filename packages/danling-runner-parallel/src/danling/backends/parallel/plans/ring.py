"""torch's ring attention over the context axis, where its kernels apply.

Ranks pass keys and values round and merge partial softmaxes, so no rank ever holds the keys of the whole sequence's scores. torch
offers this as a patch of `F.scaled_dot_product_attention` for the whole process; here the same routine is called for one
attention only and nothing global stays changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .collectives import Axis

try:  # not public: without it keys and values are gathered, which gives the same numbers
    from torch.distributed.tensor.experimental._context_parallel import _attention as _torch_ring
except ImportError:  # pragma: no cover
    _torch_ring = None  # type: ignore[assignment]

aten = torch.ops.aten
# Per device: forward, backward, and the names of what backward wants back from forward beyond output and logsumexp.
_KERNELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "cuda": (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        {"cum_seq_q": 0, "cum_seq_k": 1, "max_q": 2, "max_k": 3, "philox_seed": 4, "philox_offset": 5},
    ),
    "cpu": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        {},
    ),
}


def ring_applies(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether torch's ring attention takes these: half precision on CUDA, one length, no dropout.

    Args:
        query: `(B, heads, rows, head_dim)`.
        key: `(B, heads, keys, head_dim)`, this rank's.
        dropout: probability in force.
    """
    return (
        _torch_ring is not None
        and query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and key.dtype == query.dtype
        and query.shape == key.shape
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and not torch.compiler.is_compiling()
    )


def ring_attention(query: Tensor, key: Tensor, value: Tensor, axis: Axis, *, is_causal: bool) -> Tensor:
    """Attend from this rank's queries to the keys of all ranks, `(B, heads, rows, head_dim)`, in the order of ranks."""
    return _Ring.apply(query, key, value, axis, is_causal)


@contextmanager
def _plain_order() -> Iterator[None]:
    """Parts of the sequence are in order, so torch must not assume its zigzag order for causal masks."""
    options = _torch_ring._cp_options
    before = options.enable_load_balance
    options.enable_load_balance = False
    try:
        yield
    finally:
        options.enable_load_balance = before


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, axis: Axis, is_causal: bool) -> Tensor:
        forward, _, names = _KERNELS[query.device.type]
        with _plain_order():
            out, logsumexp, *rest = _torch_ring._templated_ring_attention(
                axis.group, 2, forward, query, key, value, is_causal=is_causal, dropout_p=0.0
            )
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.axis, ctx.is_causal = axis, is_causal
        ctx.kept = {name: rest[index] for name, index in names.items()}
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, out, logsumexp = ctx.saved_tensors
        with _plain_order():
            gradients = _torch_ring._templated_ring_attention_backward(
                ctx.axis.group,
                2,
                _KERNELS[query.device.type][1],
                grads[0].contiguous(),
                "grad_out",
                query,
                key,
                value,
                out,
                logsumexp,
                ctx.is_causal,
                dropout_p=0.0,
                **ctx.kept,
            )
        return *gradients[:3], None, None
