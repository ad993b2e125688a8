"""Parameters that several pipeline stages hold: one gradient, one value, counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling.backends.torch.local import local_tensor


class TiedParameters:
    """The parameters of this rank that other stages hold too.

    Args:
        tied: one mapping of stage to name for every such parameter.
        parts: module by stage, those of this rank.
        owners: global rank by stage.
        group: ranks of the pipeline.
    """

    def __init__(
        self,
        tied: Iterable[Mapping[int, str]],
        parts: Mapping[int, nn.Module],
        owners: Mapping[int, int],
        group: dist.ProcessGroup,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank()
        self._shared: list[tuple[list[int], list[nn.Parameter]]] = []
        for stages in tied:
            ranks = list(dict.fromkeys(owners[stage] for stage in sorted(stages)))
            found = [parts[stage].get_parameter(name) for stage, name in sorted(stages.items()) if stage in parts]
            self._shared.append((ranks, list({id(parameter): parameter for parameter in found}.values())))

    def __bool__(self) -> bool:
        return bool(self._shared)

    def copy_first(self) -> None:
        """Give all copies the values of the first stage that holds one."""
        for ranks, copies in self._shared:
            for own in copies[:1]:
                self._exchange(ranks, local_tensor(own.detach()), summed=False)
            for other in copies[1:]:
                local_tensor(other.detach()).copy_(local_tensor(copies[0].detach()))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give all copies the sum of their gradients."""
        for ranks, copies in self._shared:
            for copy in copies:
                if copy.grad is None:
                    copy.grad = torch.zeros_like(copy)
            for other in copies[1:]:
                local_tensor(copies[0].grad).add_(local_tensor(other.grad))  # type: ignore[arg-type]
            for own in copies[:1]:
                self._exchange(ranks, local_tensor(own.grad), summed=True)  # type: ignore[arg-type]
            for other in copies[1:]:
                local_tensor(other.grad).copy_(local_tensor(copies[0].grad))  # type: ignore[arg-type]

    def _exchange(self, ranks: Sequence[int], tensor: Tensor, *, summed: bool) -> None:
        """Bring the first owner's tensor, or the sum over all owners, to every owner."""
        first, *others = ranks
        whole = tensor.contiguous()
        if self.rank == first:
            for other in others if summed else ():
                received = torch.empty_like(whole)
                dist.recv(received, src=other, group=self.group)
                whole += received
            for other in others:
                dist.send(whole, dst=other, group=self.group)
        else:
            if summed:
                dist.send(whole, dst=first, group=self.group)
            dist.recv(whole, src=first, group=self.group)
        if whole is not tensor:
            tensor.copy_(whole)

    @torch.no_grad()
    def repeated(self) -> Any:
        """Sum of the squares of the gradients here that another copy counts already."""
        total: Any = 0.0
        for ranks, copies in self._shared:
            for copy in copies if self.rank != ranks[0] else copies[1:]:
                norm = torch.linalg.vector_norm(copy.grad.double())  # type: ignore[union-attr]
                total = total + (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        return total
