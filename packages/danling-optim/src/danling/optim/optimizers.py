"""Optimizers by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .groups import divide, options_of
from .names import normalize
from .registry import Component, ComponentRegistry, Lazy

_EXTRA = 'pip install "danling-optim[optimizers]"'
_DEEPSPEED = 'pip install "danling-optim[deepspeed]"'


class OptimizerRegistry(ComponentRegistry):
    """Builds optimizers by name, from parameters, pairs of name and parameter, group dicts, or a module.

    Besides the arguments of the optimizer, `build` takes those of `param_groups`: `param_groups`, a list of rules, and
    `no_decay`.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = OPTIMIZERS.build("adamw", model, lr=1e-3, no_decay=True)
        >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['weight'], 0.01), (['bias'], 0.0)]
        >>> OPTIMIZERS.build("adamw", model, learning_rate=1e-3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: optimizer 'adamw' has no argument 'learning_rate'; accepted are lr, ...
    """

    def _extras(self, component: Component) -> tuple[str, ...]:
        return tuple(name for name in ("param_groups", "no_decay") if name not in self._own(component))

    def _own(self, component: Component) -> set[str]:
        return options_of(component.target)

    def options(self) -> set[str]:
        """Return the options of all optimizers that need no further library."""
        found: set[str] = set()
        for entry in self.values():
            target = entry.target if isinstance(entry, Component) else entry
            if not isinstance(target, Lazy):
                found |= options_of(target)
        return found

    def _prepare(self, component: Component, subject: Any, extras: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        rules = extras.get("param_groups") or ()
        no_decay = extras.get("no_decay") or False
        items = subject if isinstance(subject, (nn.Module, Tensor)) else list(subject)
        if isinstance(items, list) and not any(isinstance(item, tuple) for item in items):
            if any(isinstance(item, Mapping) for item in items):
                if rules or no_decay:
                    raise ValueError("param_groups and no_decay make groups, but these parameters are groups already")
                return [dict(item) if isinstance(item, Mapping) else item for item in items]
            if not rules and not no_decay:
                return items
        defaults = inspect.signature(component.target).parameters
        given = {name: kwargs[name] if name in kwargs else _default(defaults, name) for name in ("lr", "weight_decay")}
        return divide(
            items,
            rules,
            no_decay=no_decay and "weight_decay" in defaults,
            options=self._own(component),
            **given,
        )


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    parameter = parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


OPTIMIZERS = OptimizerRegistry(
    "optimizer",
    "params",
    positions=("model_params", "parameters"),
    hints={
        "adafactor": "This torch is too old for it: pip install -U torch",
        "muon": "This torch is too old for it: pip install -U torch",
    },
)


def _lazy(module: str, name: str, install: str) -> Lazy:
    return Lazy(lambda: getattr(importlib.import_module(module), name), install)


def _register() -> None:
    names = {normalize(name): name for name in torch.optim.__all__}
    for name in (
        "sgd asgd adam adamw adadelta adagrad adamax nadam radam rmsprop rprop lbfgs sparse_adam adafactor muon"
    ).split():
        if normalize(name) in names:
            OPTIMIZERS.set(name, Component(getattr(torch.optim, names[normalize(name)]), "params"))
    OPTIMIZERS.alias("torch_adam", "adam")
    OPTIMIZERS.alias("torch_adamw", "adamw")
    for name, kind in (("lamb", "Lamb"), ("lion", "Lion")):
        OPTIMIZERS.set(name, Component(_lazy("pytorch_optimizer", kind, _EXTRA), "params"))
    for name, alias, module, kind, fixed in (
        ("fused_adam", "ds_adam", "adam", "FusedAdam", {"adam_w_mode": False}),
        ("fused_adamw", "ds_adamw", "adam", "FusedAdam", {"adam_w_mode": True}),
        ("fused_lamb", "ds_lamb", "lamb", "FusedLamb", {}),
        ("fused_lion", "ds_lion", "lion", "FusedLion", {}),
        ("cpu_adam", None, "adam", "DeepSpeedCPUAdam", {"adamw_mode": False}),
        ("cpu_adamw", None, "adam", "DeepSpeedCPUAdam", {"adamw_mode": True}),
        ("cpu_adagrad", "ds_adagrad", "adagrad", "DeepSpeedCPUAdagrad", {}),
        ("cpu_lion", None, "lion", "DeepSpeedCPULion", {}),
    ):
        subject = "model_params" if name.startswith("cpu_") else "params"
        OPTIMIZERS.set(name, Component(_lazy(f"deepspeed.ops.{module}", kind, _DEEPSPEED), subject, fixed))
        if alias is not None:
            OPTIMIZERS.alias(alias, name)


_register()
