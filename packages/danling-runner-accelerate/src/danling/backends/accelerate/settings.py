"""From danling's configuration and Accelerate's environment to the arguments of an `accelerate.Accelerator`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from accelerate import Accelerator
from accelerate import utils as accelerate_utils

from danling.runners.errors import ConfigError

# Arguments that are given as mappings and built here.
CLASSES = {
    "dataloader_config": "DataLoaderConfiguration",
    "dynamo_plugin": "TorchDynamoPlugin",
    "parallelism_config": "ParallelismConfig",
    "project_config": "ProjectConfiguration",
}
HANDLERS = ("AutocastKwargs", "GradScalerKwargs")
# What danling does itself, or leaves to another stack: argument or handler, and the way out.
REFUSED = {
    "log_with": "danling has its own trackers: set `tensorboard` or `wandb.enabled`",
    "deepspeed_plugin": "use --stack deepspeed",
    "deepspeed_plugins": "use --stack deepspeed",
    "megatron_lm_plugin": "use --stack parallel",
    "torch_tp_plugin": "use --stack parallel",
    "gradient_accumulation_plugin": "windows are danling's: set `accum_steps`",
}
REFUSED_HANDLERS = {
    "DistributedDataParallelKwargs": "it is made from the section `ddp`",
    "InitProcessGroupKwargs": "danling makes the process group: set `comm.backend` and `comm.init_timeout_seconds`",
    "ProfileKwargs": "set `profiling`",
    "AORecipeKwargs": "set `precision` to fp8_torchao",
    "TERecipeKwargs": "set `precision` to fp8_te",
    "MSAMPRecipeKwargs": "set `precision` to fp8",
}
# The same, asked for by the environment that `accelerate launch` sets.
REFUSED_ENVIRONMENT = {
    "ACCELERATE_USE_DEEPSPEED": "use --stack deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "use --stack parallel",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use --stack parallel",
}
MIXED_PRECISION = {
    "fp32": "no",
    "float32": "no",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp8": "fp8",
    "fp8_torchao": "fp8",
    "fp8_te": "fp8",
}
# Under these an MPI launcher or torchrun announces several processes; Accelerate would make a group of its own.
WORLD_VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Settings:
    """What a configuration means for Accelerate.

    Attributes:
        arguments: for the constructor of `accelerate.Accelerator`.
        precision: danling's name of the precision, from wherever it was said.
        device: where Accelerate is told to run; None leaves the choice to the machine.
        fsdp: the FSDP2 plugin, if there is one.
    """

    arguments: dict[str, Any]
    precision: str | None
    device: torch.device | None
    fsdp: Any = None


def read_settings(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the section `accelerate` together with what else says the same thing.

    Args:
        config: a validated configuration.
        environ: the environment, as `accelerate launch` sets it.

    Raises:
        ConfigError: listing unknown arguments, each with the nearest known one, and contradictions.

    Examples:
        >>> from danling.runners import RunnerConfig
        >>> settings = read_settings(RunnerConfig({"stack": "accelerate", "precision": "bf16"}), {})
        >>> settings.arguments["mixed_precision"], settings.precision
        ('bf16', 'bf16')
    """
    given = dict(config["accelerate"] or {})
    problems: list[str] = []
    _check_names("accelerate", given, inspect.signature(Accelerator.__init__).parameters, problems)
    problems += [f"accelerate.{name}: {way_out}" for name, way_out in REFUSED.items() if given.get(name) is not None]
    problems += [f"{name} is set: {way_out}" for name, way_out in REFUSED_ENVIRONMENT.items() if _flag(environ, name)]
    precision = _precision(config["precision"], given.pop("mixed_precision", None), environ, problems)
    _check_accumulation(config["accum_steps"], given, environ, problems)
    _check_dynamo(config["compile"]["enable"], given, environ, problems)
    handlers = _handlers(given.pop("kwargs_handlers", None), problems)
    for name, class_name in CLASSES.items():
        if given.get(name) is not None and hasattr(accelerate_utils, class_name):  # not in every version
            given[name] = _build(f"accelerate.{name}", class_name, given[name], problems)
    given["fsdp_plugin"] = _fsdp(given.pop("fsdp_plugin", None), environ, problems)
    parallel = given.pop("parallelism_config", None)
    if parallel is not None and parallel.total_size > 1:
        problems.append("accelerate.parallelism_config: an axis is above 1; use --stack parallel")
    if problems:
        raise ConfigError("\n  ".join(problems))
    use_cpu = given.pop("cpu", False) or _flag(environ, "ACCELERATE_USE_CPU")
    device = "cpu" if use_cpu else environ.get("ACCELERATE_TORCH_DEVICE")
    arguments = {
        **given,
        "mixed_precision": _mixed(precision),
        "gradient_accumulation_plugin": accelerate_utils.GradientAccumulationPlugin(num_steps=1),
        "kwargs_handlers": [accelerate_utils.DistributedDataParallelKwargs(**_ddp(config["ddp"])), *handlers],
    }
    return Settings(arguments, precision, None if device is None else torch.device(device), given["fsdp_plugin"])


def _check_names(where: str, given: Mapping[str, Any], known: Any, problems: list[str]) -> bool:
    names = [name for name in known if name != "self"]
    wrong = [name for name in given if name not in names]
    for name in wrong:
        (near,) = get_close_matches(str(name), names, n=1, cutoff=0.0)
        problems.append(f"{where}.{name}: unknown argument; did you mean {near!r}?")
    return not wrong


def _build(where: str, class_name: str, given: Any, problems: list[str]) -> Any:
    """An object of a class of `accelerate.utils` from a mapping; None when it cannot be built."""
    cls = getattr(accelerate_utils, class_name)
    if not isinstance(given, Mapping):
        problems.append(f"{where}: a mapping of arguments of {class_name} is expected, got {given!r}")
    elif _check_names(where, given, inspect.signature(cls).parameters, problems):
        try:
            return cls(**given)
        except (TypeError, ValueError, NotImplementedError) as error:
            problems.append(f"{where}: {error}")
    return None


def _fsdp(given: Any, environ: Mapping[str, str], problems: list[str]) -> Any:
    """The FSDP2 plugin that the section or the launcher asks for; None without one."""
    launched = _flag(environ, "ACCELERATE_USE_FSDP")
    if given is None and not launched:
        return None
    where = "ACCELERATE_USE_FSDP is set" if given is None else "accelerate.fsdp_plugin"
    if given is None or isinstance(given, Mapping):
        given = {"fsdp_version": environ.get("FSDP_VERSION", "1" if launched else "2"), **(given or {})}
        if str(given["fsdp_version"]) != "2":
            problems.append(
                f"{where}: fsdp_version is {given['fsdp_version']}, and danling drives FSDP2 alone: set it to 2"
            )
            return None
        given["fsdp_version"] = 2
    with kept_environment():
        plugin = _build(where, "FullyShardedDataParallelPlugin", given, problems)
    if getattr(plugin, "activation_checkpointing", False):
        problems.append(f"{where}: activation_checkpointing is danling's: set `activation_checkpoint.enabled`")
    return plugin


def _handlers(given: Any, problems: list[str]) -> list[Any]:
    """Handlers from a mapping of class names to arguments, or from a list of such mappings."""
    groups = [given] if isinstance(given, Mapping) else list(given or ())
    built = []
    for group in groups:
        if not isinstance(group, Mapping):
            problems.append(
                f"accelerate.kwargs_handlers: a mapping of class names to arguments is expected, got {group!r}"
            )
            continue
        for name, arguments in group.items():
            where = f"accelerate.kwargs_handlers.{name}"
            if name in REFUSED_HANDLERS:
                problems.append(f"{where}: {REFUSED_HANDLERS[name]}")
            elif _check_names("accelerate.kwargs_handlers", {name: None}, HANDLERS, problems):
                built.append(_build(where, name, arguments or {}, problems))
    return built


def _precision(asked: str | None, argument: str | None, environ: Mapping[str, str], problems: list[str]) -> str | None:
    """The one precision that configuration, argument and environment agree on, under a name of danling's."""
    said = {
        "accelerate.mixed_precision": argument,
        "ACCELERATE_MIXED_PRECISION": environ.get("ACCELERATE_MIXED_PRECISION"),
    }
    found = None
    for where, value in said.items():
        if value is None:
            continue
        value = str(value).lower()
        if value not in MIXED_PRECISION.values():
            problems.append(f"{where}: {value!r} is none of {', '.join(dict.fromkeys(MIXED_PRECISION.values()))}")
        elif asked is not None and value != MIXED_PRECISION.get(asked.lower(), value):
            problems.append(
                f"{where}: {value!r} contradicts precision: {asked!r}; leave one of them out, or let them agree"
            )
        elif found is None:  # an argument goes before the environment
            found = "fp32" if value == "no" else value
    return found if asked is None else asked.lower()


def _mixed(precision: str | None) -> str:
    mixed = MIXED_PRECISION[precision or "fp32"]
    return "bf16" if mixed == "fp8" else mixed  # 8-bit products are in layers of danling's, and around them runs bf16


def _check_accumulation(
    accum_steps: int, given: dict[str, Any], environ: Mapping[str, str], problems: list[str]
) -> None:
    said = {
        "accelerate.gradient_accumulation_steps": given.pop("gradient_accumulation_steps", None),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    for where, value in said.items():
        if value is not None and str(value) not in ("1", str(accum_steps)):
            problems.append(f"{where}: {value} contradicts accum_steps: {accum_steps}, which is what counts")


def _check_dynamo(compiles: bool, given: Mapping[str, Any], environ: Mapping[str, str], problems: list[str]) -> None:
    launched = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    said = {
        "accelerate.dynamo_plugin": given.get("dynamo_plugin") is not None,
        "accelerate.dynamo_backend": str(given.get("dynamo_backend") or "no").lower() != "no",
        f"ACCELERATE_DYNAMO_BACKEND: {launched}": launched.lower() != "no",
    }
    if compiles:
        problems += [
            f"{name} and compile.enable would both compile the model; leave one out" for name in said if said[name]
        ]


def _ddp(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if value is not None}


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


@contextmanager
def launch_environment(world_size: int) -> Iterator[None]:
    """The environment in which an Accelerator is made; whatever it changes there is put back.

    One process must not look like one rank of several, and the number of threads must look chosen, or Accelerate would
    make a process group and change the threads.

    Args:
        world_size: processes of the run.
    """
    with kept_environment():
        if world_size == 1:
            for name in WORLD_VARIABLES:
                os.environ.pop(name, None)
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


@contextmanager
def kept_environment() -> Iterator[None]:
    """Put back at the end whatever is changed in the environment meanwhile."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
