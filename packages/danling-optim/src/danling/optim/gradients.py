"""The passes over gradients that an update needs, each fused over all tensors and free of host reads.

Every function takes a list of gradients as the optimizer sees them: dense, sparse, distributed (`DTensor`), of any
mixture of devices and dtypes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Any]


def _dtensor_type() -> Any:
    # A DTensor can only exist once its module has been imported, so nothing is imported for its sake.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def local_parts(grads: Iterable[Any]) -> list[Tensor]:
    """Return the dense tensors in which this process stores `grads`; writing to them changes the gradients."""
    distributed = _dtensor_type()
    parts = []
    for grad in grads:
        if distributed is not None and isinstance(grad, distributed):
            grad = grad.to_local()
        if grad.layout is not torch.strided:
            grad = grad._values()
        if grad.is_complex():
            grad = torch.view_as_real(grad)
        if grad.numel():
            parts.append(grad)
    return parts


def by_kind(tensors: Sequence[Tensor]) -> Iterable[tuple[torch.device, torch.dtype, list[Tensor]]]:
    """Split tensors by device and dtype, the granularity of torch's foreach functions."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), members in groups.items():
        yield device, dtype, members


def scale_(grads: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply gradients in place by a number or by a tensor without dimensions."""
    for device, dtype, parts in by_kind(local_parts(grads)):
        if not isinstance(factor, Tensor):
            torch._foreach_mul_(parts, float(factor))
            continue
        # One kernel for all wants equal dtypes. float16 has too little range for a factor, so it keeps float32.
        kind = factor.dtype if dtype is torch.float16 else dtype
        torch._foreach_mul_(parts, factor.to(device=device, dtype=kind, non_blocking=True))


def clamp_(grads: Sequence[Tensor], limit: float) -> None:
    """Limit every element of the gradients to [-limit, limit], in place."""
    for _, _, parts in by_kind(local_parts(grads)):
        torch._foreach_clamp_min_(parts, -limit)
        torch._foreach_clamp_max_(parts, limit)


def nonfinite_flag(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return a float32 tensor without dimensions: 1 if any element in this process is infinite or NaN, else 0.

    The gradients keep their values: the kernel that gradient scalers use multiplies by one while it looks.
    """
    flag = torch.zeros((), dtype=torch.float32, device=device)
    found = {device: flag}
    one: dict[torch.device, Tensor] = {}
    for where, _, parts in by_kind(local_parts(grads)):
        if where not in found:
            found[where] = torch.zeros((), dtype=torch.float32, device=where)
        if where not in one:
            one[where] = torch.ones((), dtype=torch.float32, device=where)
        torch._amp_foreach_non_finite_check_and_unscale_(parts, found[where], one[where])
    for where, other in found.items():
        if where != device:
            flag = torch.maximum(flag, other.to(device, non_blocking=True))
    return flag


def coalesce_(params: Iterable[Tensor]) -> None:
    """Sum the duplicates in sparse gradients, so that their stored values are the values of the gradient."""
    for param in params:
        if param.grad is not None and param.grad.layout is torch.sparse_coo and not param.grad.is_coalesced():
            param.grad = param.grad.coalesce()


def _powers(parts: Sequence[Tensor], order: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the sum of the `order`-th powers of all elements (the largest magnitude for infinity)."""
    norms = _norms(parts, order, dtype, device)
    return norms.amax() if order == inf else norms.pow_(order).sum()


def _norms(parts: Sequence[Tensor], order: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    norms: list[Tensor] = []
    for where, kind, members in by_kind(parts):
        wide = torch.float64 if kind is torch.float64 else torch.float32
        found = torch._foreach_norm(members, order, wide)
        norms.extend(found if where == device and wide is dtype else [norm.to(device, dtype) for norm in found])
    return torch.stack(norms) if norms else torch.zeros(1, dtype=dtype, device=device)


def total_norm(
    grads: Sequence[Tensor],
    order: float,
    device: torch.device,
    meshes: Sequence[Any] = (),
    reduce_norm: Reduce | None = None,
) -> Tensor:
    """Return the norm of all gradients together, without a host read.

    Norms are taken in float32 at least, so that finite half precision gradients have a finite norm. What a `DTensor`
    shards is summed over its mesh, dimension by dimension; what it replicates counts once. Every rank of a mesh joins
    its reductions whether or not it holds gradients.

    Args:
        grads: gradients, each once.
        order: order of the norm, positive or infinity.
        device: where the result is wanted.
        meshes: the device meshes of the parameters, in the same order on every rank.
        reduce_norm: called with the sum of powers (the maximum for infinity); returns it extended over further ranks,
            or extends it in place.

    Returns:
        A tensor without dimensions, float32, or float64 if there is a float64 gradient.
    """
    plain, sharded = _split(grads)
    dense = local_parts(plain)
    local = dense + [part for members in sharded.values() for part in members]
    dtype = torch.float64 if any(part.dtype is torch.float64 for part in local) else torch.float32
    if not meshes and not sharded and reduce_norm is None:
        norms = _norms(dense, order, dtype, device)
        return norms.amax() if order == inf else torch.linalg.vector_norm(norms, order)
    if meshes or reduce_norm is not None:
        # Ranks must agree on the dtype of what they exchange, whatever gradients they hold.
        dtype = torch.float32
    total = _powers(dense, order, dtype, device)
    for mesh in meshes:
        total = _join(total, _over_mesh(mesh, sharded, order, dtype, device), order)
    if reduce_norm is not None:
        reduced = reduce_norm(total)
        total = total if reduced is None else reduced
    return total if order == inf else total.pow(1.0 / order)


def _join(left: Tensor, right: Tensor, order: float) -> Tensor:
    return torch.maximum(left, right) if order == inf else left + right


def _split(grads: Sequence[Any]) -> tuple[list[Tensor], dict[tuple[Any, int], list[Tensor]]]:
    """Separate plain gradients from distributed ones, the latter by mesh and by the mesh dimensions that shard them."""
    distributed = _dtensor_type()
    if distributed is None:
        return list(grads), {}
    plain: list[Tensor] = []
    sharded: dict[tuple[Any, int], list[Tensor]] = {}
    for grad in grads:
        if not isinstance(grad, distributed):
            plain.append(grad)
            continue
        if any(placement.is_partial() for placement in grad.placements):
            # The norm of a sum is not the sum of norms: add up first.
            from torch.distributed.tensor import Replicate

            placements = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
            grad = grad.redistribute(placements=placements)
        pattern = sum(1 << dim for dim, placement in enumerate(grad.placements) if not placement.is_replicate())
        sharded.setdefault((grad.device_mesh, pattern), []).extend(local_parts([grad]))
    return plain, sharded


def _over_mesh(
    mesh: Any, sharded: dict[tuple[Any, int], list[Tensor]], order: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sum of powers of what lives on one mesh, the same on each of its ranks.

    One entry per set of sharding dimensions travels through one reduction per mesh dimension; an entry takes the
    reduced value only where that dimension shards it.
    """
    entries = [_powers(sharded.get((mesh, pattern), []), order, dtype, device) for pattern in range(1 << mesh.ndim)]
    vector = torch.stack(entries)
    for dim in range(mesh.ndim):
        if mesh.size(dim) == 1:
            continue
        reduced = _all_reduce(vector, mesh, dim, "max" if order == inf else "sum")
        shards = torch.tensor([bool(pattern >> dim & 1) for pattern in range(len(entries))]).to(
            device, non_blocking=True
        )
        vector = torch.where(shards, reduced, vector)
    return vector.amax() if order == inf else vector.sum()


def flag_over_mesh(flag: Tensor, mesh: Any) -> Tensor:
    """Return the largest flag of all ranks of a mesh."""
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            flag = _all_reduce(flag, mesh, dim, "max")
    return flag


def _all_reduce(tensor: Tensor, mesh: Any, dim: int, kind: str) -> Tensor:
    import torch.distributed as dist

    result = tensor.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return result


def mesh_of(param: Any) -> Any | None:
    """Return the device mesh of a distributed parameter, `None` for any other tensor."""
    distributed = _dtensor_type()
    return param.device_mesh if distributed is not None and isinstance(param, distributed) else None
