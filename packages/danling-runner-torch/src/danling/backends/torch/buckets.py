"""The order in which DistributedDataParallel sums gradients, fixed before the first update.

After its first backward pass DistributedDataParallel lays its buckets out anew, in the order in which gradients became
ready. Where a gradient lies in its bucket decides in which order the numbers of three or more ranks are added, and so the
last bit of the sum: the first update of an attempt would differ from the same update in the middle of another one. A
backward pass of zeros, in an order that depends on the model alone, lets this happen before anything is trained.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel


def fix_buckets(model: DistributedDataParallel) -> None:
    """Let the buckets take their final layout; every rank calls it, before the first forward pass.

    Gradients are expected from the last parameter to the first, as in most models. With `find_unused_parameters` the layout is
    final already; with `static_graph` it depends on the first pass, and is left alone.
    """
    if model.find_unused_parameters or model.static_graph or getattr(model, "_use_python_reducer", False):
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        model.reducer.prepare_for_forward()
        model.reducer.prepare_for_backward([])
        zeros = [(parameter * torch.zeros_like(parameter)).sum().float() for parameter in parameters]
        torch.stack(zeros).sum().backward()
    model.zero_grad(set_to_none=True)
    model.reducer._rebuild_buckets()
