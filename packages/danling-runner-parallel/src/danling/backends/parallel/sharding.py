"""FSDP2 over the data axes: which modules are units, and what the `fsdp` section means for torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from danling.backends.torch.activation import matching_modules
from danling.backends.torch.export import DTYPES
from danling.runners.errors import ConfigError

from .context import ParallelContext

DTYPE_OPTIONS = ("param_dtype", "reduce_dtype", "output_dtype")


def data_mesh(ctx: ParallelContext) -> DeviceMesh:
    """The mesh over which FSDP2 averages gradients: `shard`, with `replicate × context` before it when that is above 1.

    Parameters are replicated over `context`, whose ranks hold other parts of the same sequences.
    """
    if ctx.degree("context") == 1:
        replicas = ctx.submesh("replicate")
    else:
        replicas = ctx.submesh("replicate", "context")._flatten("danling_replicas")
    if replicas.size() == 1:
        return ctx.submesh("shard")
    return DeviceMesh._concatenate([replicas, ctx.submesh("shard")])


def shard_model(part: nn.Module, mesh: DeviceMesh, options: Mapping[str, Any], *, pipelined: bool = False) -> nn.Module:
    """Apply FSDP2 to a model or a stage, children before parents, the root last, in place.

    Args:
        part: the module.
        mesh: of one dimension, or of two with the replicas first.
        options: the `fsdp` section.
        pipelined: keep parameters whole between forward and backward unless told otherwise.

    Raises:
        ConfigError: a class in `module_classes` that does not occur, an unknown option or dtype.
    """
    reshard = options["reshard_after_forward"]
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": (not pipelined) if reshard is None else reshard,
        "mp_policy": mixed_precision(options["mp_policy"]),
        "offload_policy": offload(options["offload_policy"]),
    }
    for unit in units(part, options["module_classes"]):
        fully_shard(unit, **arguments)
    fully_shard(part, **arguments)
    return part


def units(part: nn.Module, module_classes: Sequence[str] | None) -> list[nn.Module]:
    """The modules below the root that are gathered and reduced on their own, innermost first.

    `module_classes`, else the model's `_no_split_modules`, else transformer layers and children of `nn.ModuleList`.

    Raises:
        ConfigError: a class that does not occur.
    """
    if module_classes is not None and not module_classes:  # a pipeline stage without any of them
        return []
    try:
        found = matching_modules(part, module_classes)
    except ConfigError as error:
        if module_classes is not None or getattr(part, "_no_split_modules", None):
            raise ConfigError(f"fsdp.module_classes: {error}") from error
        return []  # nothing stands out: the root is the one unit
    return [module for _, module in reversed(found) if any(True for _ in module.parameters())]


def mixed_precision(options: Mapping[str, Any] | None) -> MixedPrecisionPolicy:
    """torch's policy from a mapping with names of dtypes.

    Raises:
        ConfigError: an unknown option or dtype.

    Example:
        >>> mixed_precision({"param_dtype": "bf16", "reduce_dtype": "fp32"}).reduce_dtype
        torch.float32
    """
    given = dict(options or {})
    known = (*DTYPE_OPTIONS, "cast_forward_inputs")
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"fsdp.mp_policy: {', '.join(unknown)}: unknown; it takes {', '.join(known)}")
    for name in DTYPE_OPTIONS:
        value = given.get(name)
        if value is not None and not isinstance(value, torch.dtype):
            if str(value).lower() not in DTYPES:
                raise ConfigError(f"fsdp.mp_policy.{name}: {value!r} is none of {', '.join(sorted(DTYPES))}")
            given[name] = DTYPES[str(value).lower()]
    return MixedPrecisionPolicy(**given)


def offload(options: Mapping[str, Any] | bool | None) -> OffloadPolicy:
    """torch's policy: False or None leaves shards on the device, True or a mapping keeps them on the host.

    Raises:
        ConfigError: an unknown option.

    Example:
        >>> offload({"pin_memory": False})
        CPUOffloadPolicy(pin_memory=False)
    """
    if options is None or options is False:
        return OffloadPolicy()
    given = {} if options is True else dict(options)
    if unknown := sorted(set(given) - {"pin_memory"}):
        raise ConfigError(f"fsdp.offload_policy: {', '.join(unknown)}: unknown; it takes pin_memory")
    return CPUOffloadPolicy(**({"pin_memory": torch.accelerator.is_available()} | given))


def sharded_modules(parts: Sequence[nn.Module]) -> Iterator[FSDPModule]:
    """The modules that FSDP2 manages, in all parts."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                yield module
