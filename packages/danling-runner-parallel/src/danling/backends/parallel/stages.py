"""Pipeline stages: cutting a model into parts that together hold every parameter once, under the names of the whole model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from danling.runners.errors import ConfigError

WAYS = (
    "give the model a method build_pipeline_model_part(stage_index, num_stages), or list the module names of every "
    "stage in parallel.module_fqns_per_model_part; an nn.Sequential is cut without either"
)


class ModelPart(nn.Module):
    """Modules of a larger model that run one after the other and keep the names they have there.

    Args:
        modules: name in the whole model to module, in the order in which they run.
        whole: the whole model; containers between it and the modules keep their kind.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Linear(2, 3), "layers": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])})
        >>> part = ModelPart({"embed": model["embed"], "layers.1": model["layers"][1]})
        >>> list(part.state_dict())
        ['embed.weight', 'embed.bias', 'layers.1.weight', 'layers.1.bias']
        >>> part
        ModelPart(
          (embed): Linear(in_features=2, out_features=3, bias=True)
          (layers): Module(
            (1): Linear(in_features=3, out_features=1, bias=True)
          )
        )
    """

    def __init__(self, modules: Mapping[str, nn.Module], whole: nn.Module | None = None) -> None:
        super().__init__()
        for name, module in modules.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for depth, step in enumerate(path, 1):
                if step not in parent._modules:
                    original = None if whole is None else whole.get_submodule(".".join(path[:depth]))
                    parent.add_module(step, nn.ModuleList() if isinstance(original, nn.ModuleList) else nn.Module())
                parent = parent._modules[step]  # type: ignore[assignment]
            parent.add_module(last, module)
        self._order = tuple(modules)
        for name in ("_no_split_modules", "_tied_weights_keys"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the modules in order; a tuple is passed on as several inputs."""
        output: Any = inputs
        for name in self._order:
            inputs = output if isinstance(output, tuple) else (output,)
            output = self.get_submodule(name)(*inputs, **keywords)
            keywords = {}
        return output


def even_split(sizes: Sequence[int], parts: int) -> list[range]:
    """Cut a sequence into consecutive parts so that the largest sum is as small as can be, each part with something in it.

    Elements of size 0 stay with what precedes them.

    Args:
        sizes: of the elements, such as parameters per layer.
        parts: how many.

    Raises:
        ConfigError: there are fewer elements with a size than parts.

    Example:
        >>> even_split([4, 0, 4, 0, 3, 3], 3)
        [range(0, 2), range(2, 4), range(4, 6)]
    """
    starts = [index for index, size in enumerate(sizes) if size]
    if len(starts) < parts:
        raise ConfigError(
            f"the model has {len(starts)} modules with parameters, too few for {parts} pipeline stages: "
            "a stage would be empty"
        )
    starts[0] = 0
    units = [sum(sizes[a:b]) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]
    # best[k][i]: (largest sum, sum of squares, start of the last part) of the first i units in k parts
    best: list[list[Any]] = [[(0, 0, 0) if i == 0 else None for i in range(len(units) + 1)]]
    for part in range(1, parts + 1):
        row: list[Any] = [None] * (len(units) + 1)
        for end in range(part, len(units) + 1):
            total = 0
            for start in range(end - 1, part - 2, -1):
                total += units[start]
                before = best[part - 1][start]
                if before is not None:
                    found = (max(before[0], total), before[1] + total * total, start)
                    row[end] = found if row[end] is None else min(row[end], found)
        best.append(row)
    ends = [len(units)]
    for part in range(parts, 0, -1):
        ends.append(best[part][ends[-1]][2])
    bounds = [starts[end] if end < len(units) else len(sizes) for end in reversed(ends)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def sequential_names(model: nn.Sequential, num_stages: int) -> list[list[str]]:
    """Return the names of the children of an `nn.Sequential` for each stage, even by parameters.

    Example:
        >>> layers = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
        >>> sequential_names(nn.Sequential(*layers), 2)
        [['0', '1'], ['2', '3']]

    Raises:
        ConfigError: fewer children with parameters than stages.
    """
    children = list(model._modules.items())
    sizes = [sum(p.numel() for p in child.parameters()) if child is not None else 0 for _, child in children]
    return [[children[index][0] for index in indices] for indices in even_split(sizes, num_stages)]


def cut_by_names(model: nn.Module, names: Sequence[Sequence[str]], stages: Iterable[int]) -> dict[int, nn.Module]:
    """Build some of the stages that `names` describes; the modules are those of the model, not copies.

    Args:
        model: the whole model.
        names: module names of every stage, in the order in which they run.
        stages: which to build.

    Raises:
        ConfigError: an empty stage, a module that does not exist, or one that is named twice or inside another.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    seen: dict[str, int] = {}
    for stage, group in enumerate(names):
        if not group:
            raise ConfigError(f"parallel.module_fqns_per_model_part: stage {stage} is empty")
        for name in group:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ConfigError(
                    f"parallel.module_fqns_per_model_part: stage {stage} names the module {name!r}, which "
                    f"{type(model).__name__} does not have{f'; did you mean {near[0]!r}?' if near else ''}"
                )
            for other, owner in seen.items():
                if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                    raise ConfigError(
                        f"parallel.module_fqns_per_model_part: {name!r} of stage {stage} overlaps with {other!r} of "
                        f"stage {owner}; a module belongs to one stage"
                    )
            seen[name] = stage
    return {stage: ModelPart({name: model.get_submodule(name) for name in names[stage]}, model) for stage in stages}


def state_names(module: nn.Module) -> list[str]:
    """Names of the parameters and persistent buffers of a module.

    >>> state_names(nn.BatchNorm1d(2, affine=False))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return [name for name in module.state_dict(keep_vars=True) if not name.endswith("_extra_state")]


def declared_tied(model: nn.Module) -> set[str]:
    """Names that a model declares as tied, in `_tied_weights_keys` as Hugging Face's models do.

    >>> model = nn.Linear(1, 1)
    >>> model._tied_weights_keys = {"head.weight": "embed.weight"}
    >>> sorted(declared_tied(model))
    ['embed.weight', 'head.weight']
    """
    keys = getattr(model, "_tied_weights_keys", None) or ()
    return {*keys, *keys.values()} if isinstance(keys, Mapping) else set(keys)


def shared_names(model: nn.Module) -> list[set[str]]:
    """Groups of names under which a model holds one and the same parameter.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> [sorted(group) for group in shared_names(nn.Sequential(layer, nn.ReLU(), layer))]
    [['0.weight', '2.weight']]
    """
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [group for group in groups.values() if len(group) > 1]


def check_stages(
    stages: Mapping[int, Collection[str]],
    *,
    whole: Collection[str] | None = None,
    shared: Iterable[Collection[str]] = (),
    tied: Collection[str] = (),
) -> list[dict[int, str]]:
    """Check that the stages of a pipeline hold the whole model once.

    Args:
        stages: names of parameters and buffers by stage.
        whole: names in the whole model, where that is known.
        shared: groups of names that stand for one parameter in the whole model.
        tied: names that the model declares as tied: these may live on several stages.

    Returns:
        Parameters that live on several stages, each as stage to its name there.

    Raises:
        ConfigError: a stage is empty, something is missing, unknown, or on two stages without being declared as tied.

    Example:
        >>> check_stages({0: ["0.weight"], 1: ["1.weight"]}, whole=["0.weight", "1.weight"])
        []
        >>> pair = {"embed.weight", "head.weight"}
        >>> check_stages({0: ["embed.weight"], 1: ["head.weight"]}, shared=[pair], tied=pair)
        [{0: 'embed.weight', 1: 'head.weight'}]
    """
    owners: dict[str, list[int]] = {}
    for stage, names in sorted(stages.items()):
        if not names:
            raise ConfigError(f"pipeline stage {stage} of {len(stages)} is empty: it holds no parameter")
        for name in names:
            owners.setdefault(name, []).append(stage)
    if whole is not None:
        if missing := [name for name in whole if name not in owners]:
            modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in missing))
            raise ConfigError(
                f"no pipeline stage holds {', '.join(map(repr, modules[:5]))}{' and more' if len(modules) > 5 else ''}; "
                "the stages must cover the whole model"
            )
        if unknown := [name for name in owners if name not in set(whole)]:
            raise ConfigError(
                f"pipeline stage {owners[unknown[0]][0]} stores {unknown[0]!r}, a name that the whole model does not "
                "have; parts keep the names of the whole model, so that checkpoints fit every layout"
            )
    groups = [{name} for name, found in owners.items() if len(found) > 1]
    groups += [{name for name in group if name in owners} for group in shared]
    found: list[dict[int, str]] = []
    for group in groups:
        where = {stage: name for name in sorted(group, reverse=True) for stage in owners[name]}
        if len(where) < 2:
            continue
        if not group & set(tied):
            raise ConfigError(
                f"{' and '.join(map(repr, sorted(group)))} would be trained apart on pipeline stages "
                f"{', '.join(map(str, sorted(where)))}; put what uses it on one stage, or declare it as tied in the "
                "model's _tied_weights_keys"
            )
        if dict(sorted(where.items())) not in found:
            found.append(dict(sorted(where.items())))
    return found
