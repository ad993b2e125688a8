"""Activation checkpointing: chosen modules keep no activations and run their forward again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from danling.runners.errors import ConfigError


class _Checkpointed:
    """Mixed in front of a module's class: names, parameters and `isinstance` stay as they are, and copies work."""

    _use_reentrant: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._use_reentrant:
            # The reentrant form takes no keywords.
            return checkpoint(lambda *inputs: forward(*inputs, **kwargs), *args, use_reentrant=True)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@cache
def _checkpointed_class(cls: type, use_reentrant: bool) -> type:
    body = {"_use_reentrant": use_reentrant, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Checkpointed, cls), body)


def matching_modules(model: nn.Module, names: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules of the given classes, with their qualified names.

    Args:
        model: where to look; the root itself never matches.
        names: class names or qualified class names. None means the model's `_no_split_modules`, else torch's
            transformer layers and the children of every `nn.ModuleList`.

    Raises:
        ConfigError: a class that does not occur in the model; the message lists those that do.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
        >>> [name for name, _ in matching_modules(model, ["Linear"])]
        ['0', '1.1']
    """
    children = {id(child) for part in model.modules() if isinstance(part, nn.ModuleList) for child in part}
    default = names is None
    if names is None:
        names = getattr(model, "_no_split_modules", None) or None
    matches: list[tuple[str, nn.Module]] = []
    found: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        spellings = {cls_name for cls in type(module).__mro__[:-1] for cls_name in class_names(cls)}
        if names is None:
            chosen = (
                isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or id(module) in children
            )
        else:
            hits = spellings & set(names)
            found |= hits
            chosen = bool(hits)
        if chosen:
            matches.append((name, module))
            inside += (f"{name}.",)
    missing = [] if default or names is None else [name for name in names if name not in found]
    if missing or not matches:
        classes = sorted({type(module).__name__ for name, module in model.named_modules() if name})
        what = f"the classes {missing} do not occur" if missing else "no transformer layer and no nn.ModuleList occurs"
        raise ConfigError(
            f"{what} in {type(model).__name__}; module_classes may name {', '.join(classes) or 'nothing'}"
        )
    return matches


def class_names(cls: type) -> tuple[str, str]:
    """The names of a class: short and qualified.

    >>> class_names(nn.Linear)
    ('Linear', 'torch.nn.modules.linear.Linear')
    """
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


def apply_activation_checkpointing(
    model: nn.Module, module_classes: Sequence[str] | None = None, impl: str = "no_reentrant"
) -> list[str]:
    """Make the matching modules of `model` checkpoint their activations, in place; return their names.

    Losses and gradients stay the same (torch restores the RNG for the second forward), parameter names too.

    Raises:
        ConfigError: no class matches, or an unknown `impl`.
    """
    if impl not in ("no_reentrant", "reentrant"):
        raise ConfigError(f"activation_checkpoint.checkpoint_impl is {impl!r}; it is no_reentrant or reentrant")
    matches = matching_modules(model, module_classes)
    for _, module in matches:
        if not isinstance(module, _Checkpointed):
            module.__class__ = _checkpointed_class(type(module), impl == "reentrant")  # type: ignore[arg-type]
    return [name for name, _ in matches]
