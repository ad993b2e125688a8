"""The passes over gradients that an update needs, each fused over all tensors and free of host reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Any]
Kinds = dict[tuple[torch.device, torch.dtype], list[Tensor]]


def _dtensor_type() -> Any:
    # A DTensor can only exist once its module has been imported, so nothing is imported for its sake.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def mesh_of(param: Any) -> Any | None:
    """Return the device mesh of a distributed parameter, `None` for any other tensor."""
    distributed = _dtensor_type()
    return param.device_mesh if distributed is not None and isinstance(param, distributed) else None


class Gradients:
    """The gradients of an update as the dense tensors in which this process stores them.

    They are collected once and sorted by device and dtype, the granularity of torch's foreach functions. Writing to
    the tensors changes the gradients, which may be dense, sparse, complex or distributed (`DTensor`).

    Args:
        params: parameters, each once. Sparse gradients are coalesced, so that what they store are their values.
        device: where norms and flags are wanted.
        meshes: device meshes of the parameters, in the same order on every rank.
    """

    __slots__ = ("device", "kinds", "meshes", "plain", "sharded")

    def __init__(self, params: Iterable[Tensor], device: torch.device, meshes: Sequence[Any] = ()) -> None:
        self.device = device
        self.meshes = meshes
        self.kinds: Kinds = {}
        # What counts towards the norm here: ordinary gradients, and shards by mesh and sharded dimensions. Without
        # distributed gradients the first is all there is.
        self.plain: Kinds = self.kinds
        self.sharded: dict[tuple[Any, int], Kinds] = {}
        if not meshes:
            for param in params:
                if param.grad is not None:
                    _add(self.kinds, _dense(param, param.grad))
            return
        self.plain = {}
        distributed = _dtensor_type()
        for param in params:
            grad: Any = param.grad
            if grad is None:
                continue
            if not isinstance(grad, distributed):
                part = _dense(param, grad)
                _add(self.kinds, part)
                _add(self.plain, part)
                continue
            _add(self.kinds, _real(grad.to_local()))
            grad = _summed(grad)
            pattern = sum(1 << dim for dim, kind in enumerate(grad.placements) if not kind.is_replicate())
            _add(self.sharded.setdefault((grad.device_mesh, pattern), {}), _real(grad.to_local()))

    def scale_(self, factor: float | Tensor) -> None:
        """Multiply all gradients in place by a number or by a tensor without dimensions."""
        for (device, dtype), parts in self.kinds.items():
            if isinstance(factor, Tensor):
                # One kernel for all wants equal dtypes. float16 has too little range for a factor: it keeps float32.
                kind = factor.dtype if dtype is torch.float16 else dtype
                torch._foreach_mul_(parts, moved(factor, device, kind))
            else:
                torch._foreach_mul_(parts, float(factor))

    def clamp_(self, limit: float) -> None:
        """Limit every element to [-limit, limit], in place."""
        for parts in self.kinds.values():
            torch._foreach_clamp_min_(parts, -limit)
            torch._foreach_clamp_max_(parts, limit)

    def nonfinite(self) -> Tensor:
        """Return 1 if any element in this process is infinite or NaN, else 0: float32, without dimensions.

        The gradients keep their values: the kernel that gradient scalers use multiplies by one while it looks.
        """
        flag = torch.zeros((), dtype=torch.float32, device=self.device)
        for (device, _), parts in self.kinds.items():
            found = flag if device == self.device else torch.zeros((), dtype=torch.float32, device=device)
            one = torch.ones((), dtype=torch.float32, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(parts, found, one)
            if found is not flag:
                flag = torch.maximum(flag, moved(found, self.device))
        return flag

    def norm(self, order: float, reduce_norm: Reduce | None = None) -> Tensor:
        """Return the norm of all gradients together, without dimensions.

        It is float64 where one of them is, and wherever ranks sum it together; else float32.

        Norms are taken in float32 at least, so that finite half precision gradients have a finite norm. What a
        `DTensor` shards is summed over its mesh, one reduction per mesh dimension for all gradients; what it
        replicates counts once. Every rank of a mesh joins its reductions whether or not it holds gradients.

        Args:
            order: order of the norm, positive or infinity.
            reduce_norm: called with the sum of powers (the maximum for infinity); returns it extended over further
                ranks, or extends it in place.
        """
        if not self.meshes and reduce_norm is None:
            norms = _norms(self.plain, order, self.device)
            return torch.linalg.vector_norm(norms, order)
        total = _powers(self.plain, order, self.device)
        for mesh in self.meshes:
            part = self._over_mesh(mesh, order)
            total = torch.maximum(total, part) if order == inf else total + part
        if reduce_norm is not None:
            reduced = reduce_norm(total)
            total = total if reduced is None else reduced
        return total if order == inf else total.pow(1.0 / order)

    def _over_mesh(self, mesh: Any, order: float) -> Tensor:
        """Return the sum of powers of what lives on one mesh, the same on each of its ranks.

        One entry per set of sharded dimensions travels through one reduction per mesh dimension; an entry takes the
        reduced value only where that dimension shards it.
        """
        patterns = range(1 << mesh.ndim)
        vector = torch.stack([_powers(self.sharded.get((mesh, p), {}), order, self.device) for p in patterns])
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                reduced = _all_reduce(vector, mesh, dim, largest=order == inf)
                shards = torch.tensor([bool(pattern >> dim & 1) for pattern in patterns])
                vector = torch.where(moved(shards, self.device), reduced, vector)
        return vector.amax() if order == inf else vector.sum()


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device. The host waits only if it is to hold the result, which it could read too early."""
    return tensor.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def largest_over_mesh(flag: Tensor, mesh: Any) -> Tensor:
    """Return the largest flag of all ranks of a mesh."""
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            flag = _all_reduce(flag, mesh, dim, largest=True)
    return flag


def _all_reduce(tensor: Tensor, mesh: Any, dim: int, largest: bool) -> Tensor:
    import torch.distributed as dist

    result = tensor.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return result


def _summed(grad: Any) -> Any:
    """Return a distributed gradient without pending sums: the norm of a sum is not the sum of norms."""
    if not any(kind.is_partial() for kind in grad.placements):
        return grad
    from torch.distributed.tensor import Replicate

    return grad.redistribute(placements=[Replicate() if kind.is_partial() else kind for kind in grad.placements])


def _dense(param: Tensor, grad: Tensor) -> Tensor:
    """Return the elements of an ordinary gradient as a dense real tensor."""
    if grad.layout is not torch.strided:
        if grad.layout is torch.sparse_coo:
            if not grad.is_coalesced():
                grad = param.grad = grad.coalesce()
            grad = grad._values()
        else:
            grad = grad.values()
    return _real(grad)


def _real(part: Tensor) -> Tensor:
    return torch.view_as_real(part) if part.is_complex() else part


def _add(kinds: Kinds, part: Tensor) -> None:
    if part.numel():
        key = part.device, part.dtype
        if key in kinds:
            kinds[key].append(part)
        else:
            kinds[key] = [part]


def _norms(kinds: Kinds, order: float, device: torch.device) -> Tensor:
    """Return the norm of each tensor, one vector on one device."""
    norms: list[Tensor] = []
    wide = torch.float64 if any(dtype is torch.float64 for _, dtype in kinds) else torch.float32
    for (where, dtype), parts in kinds.items():
        found = torch._foreach_norm(parts, order, torch.float64 if dtype is torch.float64 else torch.float32)
        exact = where == device and (dtype is torch.float64 or wide is torch.float32)
        norms.extend(found if exact else [moved(norm, device, wide) for norm in found])
    return torch.stack(norms) if norms else torch.zeros(1, device=device)


def _powers(kinds: Kinds, order: float, device: torch.device) -> Tensor:
    """Return the sum of the powers of all elements (the largest magnitude for infinity), in the widest dtype there is.

    Ranks exchange this value, so its dtype must not depend on what a rank happens to hold.
    """
    norms = _norms(kinds, order, device).to(torch.float32 if device.type == "mps" else torch.float64)
    return norms.amax() if order == inf else norms.pow(order).sum()
