"""From danling's configuration to the mapping that a DeepSpeed engine is made with."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from danling.runners.errors import ConfigError

AUTO = "auto"
PRECISIONS = {
    "fp32": None,
    "float32": None,
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    # 8-bit products are in layers of danling's, and around them runs bf16.
    "fp8": "bf16",
    "fp8_torchao": "bf16",
    "fp8_te": "bf16",
}
# What would change who counts windows, deals data, averages gradients or reads files: path, the values that do, the way out.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("managed_gradient_accumulation", False, "windows are danling's: set `accum_steps`"),
    ("gradient_allreduce_op", "sum", "window factors are made for gradients that are averaged"),
    ("tensor_parallel.autotp_size", 2, "ranks of this stack read different data: use --stack parallel"),
    ("sequence_parallel_size", 2, "ranks of this stack read different data: use --stack parallel"),
    ("pipeline.stages", 2, "use --stack parallel"),
    ("hybrid_engine.enabled", True, "it generates text, and this runner trains"),
    ("data_efficiency.enabled", True, "loaders and sampling are danling's"),
    ("curriculum_learning.enabled", True, "loaders and sampling are danling's"),
    ("autotuning.enabled", True, "it ends the process: tune with DeepSpeed's own launcher"),
    ("checkpoint.load_universal", True, "its files run code when they are read; take weights over with `pretrained`"),
    ("checkpoint.use_node_local_storage", True, "all ranks of a run save to one directory"),
    ("checkpoint.writer", {}, "danling writes the files of a checkpoint, so that all are committed together"),
    ("datastates_ckpt.enabled", True, "danling writes the files of a checkpoint, so that all are committed together"),
)


@dataclass(frozen=True)
class Settings:
    """What a configuration means for DeepSpeed.

    Attributes:
        engine: the mapping for `deepspeed.initialize`.
        precision: danling's name of the precision, from wherever it was said.
        stage: of ZeRO.
        makes_optimizer: whether the engine makes the optimizer.
    """

    engine: dict[str, Any]
    precision: str | None
    stage: int
    makes_optimizer: bool


def read_settings(config: Mapping[str, Any], *, world_size: int = 1, device: str = "cpu") -> Settings:
    """Read the section `deepspeed` together with what else says the same thing; nothing is changed.

    Args:
        config: a validated configuration.
        world_size: processes of the run.
        device: type of the accelerator that DeepSpeed drives.

    Raises:
        ConfigError: listing all contradictions.

    Examples:
        >>> from danling.runners import RunnerConfig
        >>> config = RunnerConfig({"stack": "deepspeed", "max_grad_norm": 1.0, "deepspeed.zero_optimization.stage": 2})
        >>> settings = read_settings(config)
        >>> settings.stage, settings.engine["gradient_clipping"], settings.engine["gradient_accumulation_steps"]
        (2, 1.0, 1)
    """
    given = _plain(config["deepspeed"] or {})
    problems: list[str] = []
    _fill_auto(given, config, problems)
    _accumulation(given, config["accum_steps"], problems)
    _batch(given, config, world_size, problems)
    _clipping(given, config, problems)
    precision = _precision(given, config["precision"], device, problems)
    if config["skip_nonfinite_grad"] and _find(given, "bf16.check_grad_overflow") is False:
        problems.append(
            "deepspeed.bf16.check_grad_overflow: False contradicts skip_nonfinite_grad: True; leave one of them out"
        )
    makes_optimizer = _optimizer(given, config, problems)
    stage = _stage(given, problems)
    if config["ema"]["enabled"] and stage == 3:
        problems.append("ema.enabled: ZeRO 3 leaves no rank with whole weights to average; use stage 0, 1 or 2")
    _checkpoints(config["checkpoint"], problems)
    problems += [
        f"deepspeed.{path}: {value!r} is not possible here; {way_out}"
        for path, limit, way_out in REFUSED
        if _is_refused(value := _find(given, path), limit)
    ]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return Settings(given, precision, stage, makes_optimizer)


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else deepcopy(tree)


def _find(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _is_refused(value: Any, limit: Any) -> bool:
    if value is None or value == AUTO:
        return False
    if isinstance(limit, bool | str):
        return str(value).lower() == str(limit).lower()
    return isinstance(limit, dict) or (isinstance(value, int | float) and value >= limit)


def _fill_auto(given: dict[str, Any], config: Mapping[str, Any], problems: list[str]) -> None:
    """Fill `auto` under `optimizer`, `scheduler` and `zero_optimization`; where danling has no value, the engine's counts."""
    optim, schedule = config["optim"], {"warmup_max_lr": config["optim"].get("lr"), "total_num_steps": config["steps"]}
    for section, values in (("optimizer", optim), ("scheduler", schedule)):
        params = _find(given, f"{section}.params")
        for name in [name for name, value in (params or {}).items() if value == AUTO]:
            if values.get(name) is not None:
                params[name] = _plain(values[name])
            elif section == "optimizer":
                del params[name]
            else:
                problems.append(f"deepspeed.scheduler.params.{name}: danling has no value for 'auto'; give a number")
    zero = given.get("zero_optimization")
    if isinstance(zero, dict):
        for name in [name for name, value in zero.items() if value == AUTO]:
            del zero[name]


def _accumulation(given: dict[str, Any], accum_steps: int, problems: list[str]) -> None:
    name = "gradient_accumulation_steps"
    value = given.get(name)
    if value not in (None, AUTO, 1, accum_steps):
        problems.append(f"deepspeed.{name}: {value} contradicts accum_steps: {accum_steps}, which is what counts")
    given[name] = 1


def _batch(given: dict[str, Any], config: Mapping[str, Any], world_size: int, problems: list[str]) -> None:
    name, size = "train_micro_batch_size_per_gpu", config["dataloader"]["batch_size"] or 1
    value = given.get(name)
    if value not in (None, AUTO, size):
        problems.append(f"deepspeed.{name}: {value} contradicts dataloader.batch_size: {size}")
    given[name] = size
    whole, value = size * world_size * config["accum_steps"], given.pop("train_batch_size", None)
    if value not in (None, AUTO, whole):
        problems.append(
            f"deepspeed.train_batch_size: {value} is not dataloader.batch_size × ranks × accum_steps = "
            f"{size} × {world_size} × {config['accum_steps']} = {whole}"
        )


def _clipping(given: dict[str, Any], config: Mapping[str, Any], problems: list[str]) -> None:
    norm, value = config["max_grad_norm"], given.pop("gradient_clipping", None)
    value = None if value == AUTO else value
    if norm is not None and value is not None and float(value) != norm:
        problems.append(f"deepspeed.gradient_clipping: {value} contradicts max_grad_norm: {norm}")
    given["gradient_clipping"] = float(norm if norm is not None else value or 0.0)
    if config["max_grad_value"] is not None:
        problems.append("max_grad_value: DeepSpeed clips by norm alone; use max_grad_norm")


def _precision(given: dict[str, Any], asked: str | None, device: str, problems: list[str]) -> str | None:
    """The one precision that configuration and mapping agree on, under a name of danling's."""
    if "bfloat16" in given:  # DeepSpeed's older name
        given.setdefault("bf16", given.pop("bfloat16"))
    wanted = None if asked is None else PRECISIONS[asked.lower()]
    found = asked
    for name in ("bf16", "fp16"):
        section = given.get(name)
        enabled = _find(given, f"{name}.enabled")
        if enabled is None or enabled == AUTO:
            enabled = wanted == name
        elif asked is not None and bool(enabled) != (wanted == name):
            problems.append(f"deepspeed.{name}.enabled: {enabled} contradicts precision: {asked!r}")
        elif enabled and found not in (None, asked):
            problems.append("deepspeed.bf16.enabled and deepspeed.fp16.enabled exclude each other")
        elif enabled and asked is None:
            found = name
        if enabled or section:
            given[name] = {**(section if isinstance(section, dict) else {}), "enabled": bool(enabled)}
        else:
            given.pop(name, None)
    if found is not None and PRECISIONS[found.lower()] == "fp16" and device == "cpu":
        problems.append("precision: fp16 needs an accelerator, and DeepSpeed drives the CPU here; use bf16 or fp32")
    return None if found is None else found.lower()


def _optimizer(given: dict[str, Any], config: Mapping[str, Any], problems: list[str]) -> bool:
    for name, key in (("optimizer", "optim"), ("scheduler", "scheduler")):
        if given.get(name) is None:
            given.pop(name, None)
        elif (kind := config[key].get("type")) is not None:
            problems.append(f"deepspeed.{name}: given together with {key}.type: {kind!r}; leave one of them out")
    if "optimizer" not in given:
        given.setdefault("zero_allow_untested_optimizer", True)
        given.setdefault("zero_force_ds_cpu_optimizer", False)
    return "optimizer" in given


def _stage(given: Mapping[str, Any], problems: list[str]) -> int:
    stage = _find(given, "zero_optimization.stage") or 0
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(f"deepspeed.zero_optimization.stage: {stage!r} is none of 0, 1, 2, 3")
        return 0
    return int(stage)


def _checkpoints(checkpoint: Mapping[str, Any], problems: list[str]) -> None:
    if str(checkpoint["backend"]).lower() == "dcp":
        problems.append("checkpoint.backend: 'dcp' is not DeepSpeed's format; use 'auto'")
    if checkpoint["async_mode"] not in (None, "disabled"):
        problems.append(
            f"checkpoint.async_mode: {checkpoint['async_mode']!r} is not possible: saves of DeepSpeed are synchronous; "
            "leave it out"
        )
