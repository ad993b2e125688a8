"""Values that are fine one by one and exclude each other, or that the chosen engine cannot honour."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .aliases import find


def contradictions(config: Mapping[str, Any]) -> list[str]:
    """Return a line for each pair of valid values of a configuration that exclude each other."""

    def value(name: str) -> Any:
        return find(config, name)[1]

    lines = []
    if value("steps") is not None and value("epochs") is not None:
        lines.append(
            f"steps: {value('steps')} and epochs: {value('epochs')} are both set; the budget is one or the other"
        )
    mode = value("checkpoint.async_mode")
    if not value("checkpoint.async_enabled") and mode not in (None, "disabled"):
        lines.append(
            f"checkpoint.async_enabled: False contradicts checkpoint.async_mode: {mode!r}; leave one of them out"
        )
    if value("compile.mode") is not None and value("compile.options") is not None:
        lines.append(
            f"compile.mode: {value('compile.mode')!r} and compile.options exclude each other in torch.compile; give one"
        )
    axes = value("parallel.axes")
    if sum(degree == -1 for degree in axes.values()) > 1:
        filled = ", ".join(f"parallel.axes.{axis}" for axis, degree in axes.items() if degree == -1)
        lines.append(f"{filled}: only one axis can be -1, to be filled with what is left")
    if value("fsdp.enabled") is False and axes["shard"] > 1:
        lines.append(f"fsdp.enabled: False contradicts parallel.axes.shard: {axes['shard']}")
    ft = value("ft")
    if not ft["replica_id"] < ft["group_size"]:
        lines.append(f"ft.replica_id: {ft['replica_id']} must be below ft.group_size: {ft['group_size']}")
    if not ft["min_replica_size"] <= ft["group_size"]:
        lines.append(f"ft.min_replica_size: {ft['min_replica_size']} must not exceed ft.group_size: {ft['group_size']}")
    for engine, stacks in {"deepspeed": ("auto", "deepspeed", "ds"), "accelerate": ("auto", "accelerate")}.items():
        if value(engine) is not None and value("stack").lower().replace("-", "_") not in stacks:
            lines.append(
                f"{engine}: given, but stack is {value('stack')!r}; use stack {engine!r}, or leave the section out"
            )
    loader = value("dataloader")
    splits = {name: options for name, options in loader.items() if isinstance(options, Mapping)}
    for path, options in [
        ("dataloader", loader),
        *((f"dataloader.{name}", {**loader, **split}) for name, split in splits.items()),
    ]:
        if not options["num_workers"]:
            given = loader if path == "dataloader" else splits[path.split(".", 1)[1]]
            for name in ("prefetch_factor", "persistent_workers"):
                if options[name] and (name in given or "num_workers" in given):
                    lines.append(f"{path}.{name}: {options[name]!r} needs workers, but {path}.num_workers is 0")
    return lines


def misgivings(config: Mapping[str, Any]) -> list[str]:
    """Return a line for each valid setting that costs more than its name says."""
    loader = find(config, "dataloader")[1]
    if all(part.get("in_order", True) for part in (loader, *loader.values()) if isinstance(part, Mapping)):
        return []
    return ["dataloader.in_order: False gives up exact resume: batches arrive in the order workers finish"]


# What only some engines can do: key, value, the feature that an engine declares, the way out
FEATURES = (
    ("checkpoint.backend", "dcp", "dcp", "it is for sharded state; use 'file'"),
    ("fsdp.enabled", True, "fsdp", "stack 'parallel' shards the model"),
    ("ft.enabled", True, "ft", "replica groups go with stack 'torch' or 'parallel'"),
)


def unsupported(config: Mapping[str, Any], stack: str, axes: Collection[str], features: Collection[str]) -> list[str]:
    """Return a line for each setting of a validated configuration that an engine would have to ignore.

    Args:
        config: a validated configuration.
        stack: name of the engine.
        axes: parallel axes it understands.
        features: what it can do of `dcp` (sharded checkpoints), `fsdp` and `ft` (fault tolerance).
    """
    lines = [
        f"parallel.axes.{axis}: {degree}, but stack {stack!r} {f'knows only {sorted(axes)}' if axes else 'has no axes'}; "
        "use stack 'parallel', or leave the axis at 1"
        for axis, degree in find(config, "parallel.axes")[1].items()
        if degree != 1 and axis not in axes
    ]
    lines += [
        f"{key}: {value!r} is not supported by stack {stack!r}; {way_out}"
        for key, value, feature, way_out in FEATURES
        if find(config, key)[1] == value and feature not in features
    ]
    lines += [
        f"{engine}: this section belongs to stack {engine!r}, and the stack is {stack!r}"
        for engine in ("deepspeed", "accelerate")
        if find(config, engine)[1] is not None and stack != engine
    ]
    return lines
