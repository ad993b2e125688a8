"""Parameter groups from a few rules: multipliers by name, and no decay where decay makes no sense."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .names import nearest

RULE_KEYS = ("pattern", "lr_mult", "weight_decay_mult")
_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


class _Rule(NamedTuple):
    pattern: str
    search: Any
    lr_mult: float
    weight_decay_mult: float
    options: dict[str, Any]


def param_groups(
    source: Any,
    rules: Sequence[Mapping[str, Any]] = (),
    *,
    no_decay: bool = False,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Divide parameters into groups for an optimizer.

    Frozen parameters are left out, a shared one appears once, the order is that of the source, and no group is empty.
    Groups carry `name` and, if the parameters have names, `param_names`: qualified names without the prefixes
    `module.` and `_orig_mod.` of wrappers.

    Args:
        source: a module, or pairs of name and parameter; plain parameters too, as long as there are no rules.
        rules: mappings with `pattern`, a regular expression searched for in the qualified name; `lr_mult` and
            `weight_decay_mult`, factors of `lr` and `weight_decay`; and any option of an optimizer as an absolute
            value. The first rule that matches a parameter wins; the rest forms the default group.
        no_decay: give weight decay 0 to biases, to parameters with fewer than two dimensions, and to all parameters of
            normalisation layers, whatever the rules say.
        lr: the learning rate that `lr_mult` multiplies.
        weight_decay: the weight decay that `weight_decay_mult` multiplies.

    Raises:
        ValueError: a rule without or with a broken pattern, one that matches no parameter, one with an unknown key, a
            multiplier of a value that is not known, or rules for parameters without names.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> for group in param_groups(model, [{"pattern": "^0[.]", "lr_mult": 0.1}], no_decay=True, lr=1.0):
        ...     print(group["name"], group["param_names"], group.get("lr"), group.get("weight_decay"))
        ^0[.] ['0.weight'] 0.1 None
        ^0[.] without decay ['0.bias'] 0.1 0.0
        default without decay ['1.weight', '1.bias', '2.bias'] None 0.0
        default ['2.weight'] None None
    """
    return divide(source, rules, no_decay=no_decay, lr=lr, weight_decay=weight_decay)


def divide(
    source: Any,
    rules: Sequence[Mapping[str, Any]] = (),
    *,
    no_decay: bool = False,
    lr: Any = None,
    weight_decay: Any = None,
    options: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Do the work of `param_groups`; `options` are the options of the optimizer that the groups are for."""
    named, norms = _named(source)
    parsed = [_parse(rule, lr, weight_decay, options) for rule in rules or ()]
    if parsed and any(name is None for name, _ in named):
        raise ValueError(
            "rules go by name, but these parameters have none: pass the module, or model.named_parameters()"
        )
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    matched, chosen = set(), set()
    for name, param in named:
        index = len(parsed)
        for position, candidate in enumerate(parsed):
            if candidate.search(name):
                matched.add(position)
                index = min(index, position)
        chosen.add(index)
        if not param.requires_grad:
            continue
        bare = no_decay and (param.ndim < 2 or id(param) in norms or _is_bias(name))
        rule = parsed[index] if index < len(parsed) else None
        group = groups.setdefault((index, bare), {"params": []})
        if not group["params"]:
            _describe(group, rule, bare, lr, weight_decay, name is not None)
        group["params"].append(param)
        if name is not None:
            group["param_names"].append(name)
    for position, (pattern, *_) in enumerate(parsed):
        if position not in matched:
            offers = nearest(pattern, [name for name, _ in named if name is not None])[:3]
            raise ValueError(f"pattern {pattern!r} matches no parameter; names look like {', '.join(offers)}")
        if position not in chosen:
            raise ValueError(f"pattern {pattern!r} has no effect: earlier rules take every parameter it matches")
    return list(groups.values())


def _named(source: Any) -> tuple[list[tuple[str | None, Tensor]], set[int]]:
    """Return the unique parameters with their clean names, and the ids of those that belong to normalisation layers."""
    norms: set[int] = set()
    if isinstance(source, nn.Module):
        pairs: list[Any] = list(source.named_parameters())
        for module in source.modules():
            if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
                norms.update(id(param) for param in module.parameters(recurse=False))
    else:
        if isinstance(source, Tensor):
            raise TypeError("parameters come as a module or an iterable, not as a single tensor")
        pairs = list(source)
    named: dict[int, tuple[str | None, Tensor]] = {}
    for item in pairs:
        name, param = item if isinstance(item, tuple) else (None, item)
        if not isinstance(param, Tensor):
            raise TypeError(f"expected parameters or pairs of name and parameter, got {type(param).__name__}")
        named.setdefault(id(param), (None if name is None else clean_name(name), param))
    return list(named.values()), norms


def clean_name(name: str) -> str:
    """Remove what `DataParallel`, DDP and `torch.compile` add to a qualified name.

    Examples:
        >>> clean_name("module._orig_mod.head.weight")
        'head.weight'
    """
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _is_bias(name: str | None) -> bool:
    return name is not None and (name.rpartition(".")[2] == "bias" or name.endswith("_bias"))


def _parse(rule: Mapping[str, Any], lr: Any, weight_decay: Any, options: Iterable[str] | None) -> _Rule:
    if not isinstance(rule, Mapping) or not isinstance(rule.get("pattern"), str):
        raise ValueError(f"a rule is a mapping with a 'pattern', not {rule!r}")
    pattern = rule["pattern"]
    known = _known_options() if options is None else set(options)
    for key in rule:
        if key not in RULE_KEYS and key not in known:
            offers = ", ".join(nearest(key, {*RULE_KEYS, *known})[:3])
            raise ValueError(f"rule {pattern!r} has an unknown key {key!r}; the nearest are {offers}")
    for name, base in (("lr", lr), ("weight_decay", weight_decay)):
        mult = f"{name}_mult"
        if mult not in rule:
            continue
        if name in rule:
            raise ValueError(f"rule {pattern!r} has {name} and {mult}: keep one")
        if base is None and rule[mult] != 1:
            raise ValueError(f"rule {pattern!r} has {mult}, but no {name} to multiply: pass {name}=...")
        if not 0 <= rule[mult] < float("inf"):
            raise ValueError(f"rule {pattern!r} has {mult}={rule[mult]!r}, but a factor is finite and not negative")
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    rest = {key: value for key, value in rule.items() if key not in RULE_KEYS}
    return _Rule(pattern, search, rule.get("lr_mult", 1.0), rule.get("weight_decay_mult", 1.0), rest)


def _describe(group: dict[str, Any], rule: _Rule | None, bare: bool, lr: Any, weight_decay: Any, named: bool) -> None:
    """Fill a new group with everything but its parameters."""
    group["name"] = "default" if rule is None else rule.pattern
    if named:
        group["param_names"] = []
    if rule is not None:
        group.update(rule.options)
        if rule.lr_mult != 1:
            group["lr"] = lr * rule.lr_mult
        if rule.weight_decay_mult != 1:
            group["weight_decay"] = weight_decay * rule.weight_decay_mult
    if bare:
        group["name"] += " without decay"
        group["weight_decay"] = 0.0


def _known_options() -> set[str]:
    """Return the options of every optimizer that is registered and loaded."""
    from .optimizers import OPTIMIZERS

    return OPTIMIZERS.options()


def options_of(target: Any) -> set[str]:
    """Return what an optimizer's signature names besides its parameters."""
    parameters = inspect.signature(target).parameters.values()
    return {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in ("params", "model_params")
    }
