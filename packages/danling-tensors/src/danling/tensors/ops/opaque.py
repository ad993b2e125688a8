"""Attention as one operator of a traced graph: a loop over lengths cannot be traced, so it runs inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Segments
from danling.tensors.ops.attention import attend, dense_reader
from danling.tensors.tracing import segments_of

_library = torch.library.Library("danling", "FRAGMENT")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, Tensor? mask, Tensor? extra_k, Tensor? extra_v, "
    "Tensor? seed, float dropout_p, bool is_causal, float? scale, bool enable_gqa"
)
_library.define(f"attention({_ARGUMENTS}) -> Tensor")
_library.define(f"attention_backward(Tensor grad, {_ARGUMENTS}) -> Tensor[]")
_DATA = ("q", "k", "v", "mask", "extra_k", "extra_v")  # what has a gradient
_PLACES = (0, 1, 2, 5, 6, 7)
_AUTOGRAD = ("AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradOther", "ADInplaceOrView")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    k_segments: Segments,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attend` as one operator; the mask is a dense one that broadcasts to `(B, *heads, Lq, Lk)`."""
    seed = torch.randint(2**62, (), device="cpu") if dropout_p > 0 else None
    q_offsets, k_offsets = (s.on("offsets", q.device) for s in (q_segments, k_segments))
    more = (None, None) if extra is None else extra
    return torch.ops.danling.attention.default(
        q, k, v, q_offsets, k_offsets, mask, *more, seed, dropout_p, is_causal, scale, enable_gqa
    )


@contextmanager
def _seeded(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the same dropout in forward and backward, and leave torch's generators as they are."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(int(seed))
        yield


def _run(q: Any, k: Any, v: Any, qo: Any, ko: Any, mask: Any, ek: Any, ev: Any, seed: Any, *settings: Any) -> Tensor:
    q_segments = segments_of(qo)
    k_segments = q_segments if ko is qo else segments_of(ko)
    if k_segments == q_segments:
        k_segments = q_segments
    reader = None if mask is None else dense_reader(mask, q.dim())
    extra = None if ek is None else (ek, ev)
    with _seeded(seed, q.device):
        return attend(q, k, v, q_segments, k_segments, reader, *settings, extra=extra)  # type: ignore[misc]


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _forward(*args: Any) -> Tensor:
    return _run(*args).contiguous()


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of q, k, v, mask and extras, by running forward again; empty ones where there is nothing to derive."""
    leaves = list(args)
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:  # an operator runs below autograd, which is needed here
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        wanted = []
        for i in _PLACES:
            if args[i] is not None and args[i].is_floating_point():
                leaves[i] = args[i].detach().requires_grad_()
                wanted.append(leaves[i])
        out = _run(*leaves)
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    grads = []
    for i in _PLACES:
        x = args[i]
        if x is None or not x.is_floating_point():
            grads.append(grad.new_empty(0))
            continue
        g = next(found)
        grads.append(torch.zeros_like(x, memory_format=torch.contiguous_format) if g is None else g.contiguous())
    return grads


@torch.library.register_fake("danling::attention", lib=_library)
def _(q, k, v, *args):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("danling::attention_backward", lib=_library)
def _(grad, *args):
    known = (args[i] for i in _PLACES)
    return [grad.new_empty(0) if x is None or not x.is_floating_point() else x.new_empty(x.shape) for x in known]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.settings = inputs[9:]


def _derive(ctx: Any, grad: Tensor) -> Any:
    tensors = ctx.saved_tensors
    grads = torch.ops.danling.attention_backward.default(grad, *tensors, *ctx.settings)
    out: list[Any] = [None] * 13
    for i, g in zip(_PLACES, grads):
        if tensors[i] is not None and tensors[i].is_floating_point() and ctx.needs_input_grad[i]:
            out[i] = g
    return tuple(out)


torch.library.register_autograd("danling::attention", _derive, setup_context=_setup, lib=_library)
