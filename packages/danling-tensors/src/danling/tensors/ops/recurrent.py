"""Recurrent networks: elements run through torch's packed sequences, cells row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danling.tensors.layout import Layout
from danling.tensors.nested_tensor import NestedTensor, values_of, wrap
from danling.tensors.ops.base import first_nested, names
from danling.tensors.ops.pointwise import rewrap
from danling.tensors.ops.table import register


def _schedule(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How rows go into a packed sequence: time step by time step, longest elements first.

    Returns:
        Where each row goes `(R,)`; which row stands at each place `(R,)`; elements from long to short `(B,)`; the inverse
        of that `(B,)`; how many elements reach each step `(Lmax,)`, on the CPU.
    """

    def build() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        lengths = layout.segments.sizes[:, 0]
        order = torch.argsort(lengths, descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu")
        steps = torch.arange(layout.max_sizes[0], device="cpu")
        batch_sizes = (lengths[None, :] > steps[:, None]).sum(1)
        start = torch.zeros_like(batch_sizes)
        torch.cumsum(batch_sizes[:-1], 0, out=start[1:])
        cpu = torch.device("cpu")
        row, element = layout.segments.on("row", cpu), layout.segments.on("element", cpu)
        target = start.index_select(0, row) + place.index_select(0, element)
        source = torch.empty_like(target)
        source[target] = torch.arange(len(target), device="cpu")
        return target.to(device), source.to(device), order.to(device), place.to(device), batch_sizes

    with torch.inference_mode(False), torch.no_grad():
        return layout.segments.memo(("rnn", device), build)


@register("recurrent", "lstm", "gru", "rnn_tanh", "rnn_relu", path="grouped")
def sequence(func: Any, x: NestedTensor, hx: Any, params: Any, *settings: Any) -> Any:
    """A whole network over elements `(L, D)`; states are dense, in batch order."""
    if not isinstance(x, NestedTensor):
        raise TypeError(f"{names(func)}: the initial state of a dense input must be dense")
    has_biases, num_layers, dropout, train, bidirectional, batch_first = settings
    layout = x._layout
    if layout.ragged_dims != (0,) or layout.rank != 2:
        raise ValueError(
            f"{names(func)} needs elements (L, D) with L ragged, got ragged dims {layout.ragged_dims} of rank {layout.rank}"
        )
    if batch_first != layout.batch_first:
        raise ValueError(
            f"{names(func)}: the module has batch_first={batch_first}, the NestedTensor batch_first={layout.batch_first}"
        )
    if layout.batch_size == 0 or min(layout.segments.table) == 0:
        at = f"element {layout.segments.table.index(0)} is empty" if layout.batch_size else "the batch is empty"
        raise RuntimeError(f"{names(func)}: Length of all samples has to be greater than 0, but {at}")
    values = values_of(x)
    target, source, order, place, batch_sizes = _schedule(layout, values.device)
    states = [h.index_select(1, order) for h in (hx if isinstance(hx, (tuple, list)) else (hx,))]
    state = tuple(states) if isinstance(hx, (tuple, list)) else states[0]
    data = values.index_select(0, source)
    out = func(data, batch_sizes, state, params, has_biases, num_layers, dropout, train, bidirectional)
    rows = out[0].index_select(0, target)
    return (
        wrap(rows, layout.with_static((rows.shape[1],)), x._flags),
        *(h.index_select(1, place) for h in out[1:]),
    )


@register("recurrent", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(func: Any, x: Any, hx: Any, *params: Any, **kwargs: Any) -> Any:
    """One step of a network; every row is a sample."""
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    like = first_nested(x, *states)
    for operand in (x, *states):
        if not isinstance(operand, NestedTensor):
            raise TypeError(
                f"{names(func)}: input and state must both be NestedTensors, got a dense {tuple(operand.shape)}"
            )
        own = operand._layout
        if own.segments != like._layout.segments or own.ragged_dims != like._layout.ragged_dims:
            raise ValueError(f"{names(func)}: input and state differ in structure: {own} and {like._layout}")
    packed = [values_of(h) for h in states]
    out = func(values_of(x), packed if isinstance(hx, (tuple, list)) else packed[0], *params, **kwargs)
    return rewrap(out, like._layout, like._flags)
