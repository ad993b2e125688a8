"""The one table of every configuration key danling knows: type, default, meaning, and whether it identifies the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from . import kinds


class _Absent:
    """The default of a key that is only there when somebody gives it."""

    def __repr__(self) -> str:
        return "absent"

    def __copy__(self) -> _Absent:
        return self

    def __deepcopy__(self, memo: Any) -> _Absent:
        return self


ABSENT = _Absent()


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type; `accepts` may also return the canonical form of the value."""

    text: str
    accepts: Callable[[Any], Any]

    def apply(self, value: Any) -> Any:
        """Return the canonical value, or raise `ValueError` with what is allowed."""
        result = self.accepts(value)
        if result is False:
            raise ValueError(self.text)
        return value if result is True else result


def at_least(low: float) -> Rule:
    """Numbers from `low` on."""
    return Rule(f">= {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """Numbers larger than `low`."""
    return Rule(f"> {low}", lambda value: value > low)


def one_of(*choices: str, **synonyms: str) -> Rule:
    """Any of `choices` whatever its case and with `-` for `_`; `synonyms` are accepted and replaced."""
    known = {choice.lower(): choice for choice in choices} | synonyms
    text = f"one of {', '.join([*choices, *synonyms])}"
    return Rule(text, lambda value: known.get(value.strip().lower().replace("-", "_"), False))


def no_separator(value: str) -> bool:
    """Accept a name that stays one directory level."""
    return bool(value) and value not in (".", "..") and not any(sign in value for sign in "/\\\0")


NAME = Rule("that is not empty and has no path separators", no_separator)
RELATIVE = Rule(
    "relative to the run directory",
    lambda value: bool(value) and not value.startswith(("/", "\\")) and ".." not in value.replace("\\", "/").split("/"),
)
DTYPE = one_of("fp32", "fp16", "bf16", "fp64", float32="fp32", float16="fp16", bfloat16="bf16", float64="fp64")
PRECISION = one_of(
    "fp32", "bf16", "fp16", "fp8", "fp8_torchao", "fp8_te",
    float32="fp32", bfloat16="bf16", float16="fp16", half="fp16",
)  # fmt: skip
TEXTS = Rule(
    "a list of names", lambda value: not isinstance(value, list) or all(isinstance(item, str) for item in value)
)
TEXT_OR_TEXTS = Rule("a name or a list of names", TEXTS.accepts)
RULES = Rule("a list of mappings", lambda value: all(isinstance(item, Mapping) for item in value))
POLICY = Rule(
    "a mapping with param_dtype, reduce_dtype, output_dtype, cast_forward_inputs",
    lambda value: set(value) <= {"param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs"},
)
BUCKET = Rule("between 0 and 1, both excluded", lambda value: 0 < value < 1)


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Attributes:
        name: dotted name.
        kind: type, written as in `danling.runners.kinds`.
        default: danling's own default; `ABSENT` when the key exists only if given.
        meaning: one line.
        identity: whether the key is part of what identifies a run.
        rule: what is checked beyond the type.
        neutral: values that mean the same as the default.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    identity: bool = False
    rule: Rule | None = None
    neutral: tuple[Any, ...] = field(default=())

    def convert(self, value: Any) -> Any:
        """Return the typed value.

        Raises:
            ValueError: when the value is not allowed; the message says what is.
        """
        try:
            value = kinds.convert(self.kind, value)
            return value if value is None or self.rule is None else self.rule.apply(value)
        except (ValueError, OverflowError):
            raise ValueError(self.allowed) from None

    @property
    def allowed(self) -> str:
        """What the key allows, in words."""
        alternatives, optional = kinds.split_kind(self.kind)
        if self.rule is None:
            return kinds.allowed(self.kind)
        if self.rule.text.startswith(("one of", "a ")):
            return self.rule.text + " or None" * optional
        return f"{kinds.allowed('|'.join(alternatives))} {self.rule.text}" + " or None" * optional


ID = {"identity": True}


def _section(prefix: str, *rows: tuple[Any, ...]) -> list[Key]:
    """Return the rows of one section; a row is (name, kind, default, meaning[, rule[, options]])."""
    keys = []
    for name, kind, default, meaning, *rest in rows:
        rule = next((item for item in rest if isinstance(item, Rule)), None)
        options = next((item for item in rest if isinstance(item, dict)), {})
        keys.append(Key(prefix + name, kind, default, meaning, rule=rule, **options))
    return keys


KEYS: dict[str, Key] = {
    key.name: key
    for key in [
        *_section(
            "",
            ("stack", "str", "auto", "the engine: auto, torch, parallel, deepspeed, accelerate, or an installed one"),
            ("name", "str?", None, "name of the run; None takes the value of experiment", NAME),
            ("workspace_root", "str", "experiments", "directory that holds all runs", Rule("that is not empty", bool)),
            ("lineage", "str", "lin", "directory level above the experiment; a namespace only", NAME),
            ("experiment", "str", "exp", "directory level above the run", NAME),
            ("seed", "int?", 1016, "seed of every random number generator; None draws one", at_least(0), ID),
            ("deterministic", "bool", False, "deterministic algorithms, TF32 off; put back at close", ID),
            ("steps", "int?", None, "budget in optimizer updates; excludes epochs", at_least(1)),
            ("epochs", "int?", None, "budget in epochs; excludes steps", at_least(1)),
            ("accum_steps", "int", 1, "micro-batches behind one optimizer update", at_least(1), ID),
            (
                "precision",
                "str?",
                None,
                "precision of the forward pass; None and fp32 are the same",
                PRECISION,
                ID | {"neutral": ("fp32",)},
            ),
            ("max_grad_value", "float?", None, "clip each gradient element to this magnitude", above(0), ID),
            ("max_grad_norm", "float?", None, "clip the global gradient norm to this", above(0), ID),
            ("skip_nonfinite_grad", "bool", False, "skip updates whose gradients are not finite", ID),
            ("train_splits", "list?", None, "splits to train on, in order; None finds them", TEXTS, ID),
            (
                "evaluate_splits",
                "list?",
                None,
                "splits to evaluate; None takes every other but infer* and predict*",
                TEXTS,
            ),
            (
                "score_split",
                "str?",
                None,
                "split of the score; None takes val, validate, validation, dev, else the first",
            ),
            ("score_name", "str", "loss", "metric that is the score; a dotted path reaches nested metrics"),
            (
                "score_mode",
                "str",
                "auto",
                "whether a smaller or a larger score is better",
                one_of("auto", "min", "max"),
            ),
            ("patience", "int?", None, "stop after this many evaluations in a row without a new best", at_least(1)),
            (
                "eval_interval",
                "interval?",
                None,
                "how often to evaluate; None: every epoch, or 20 times; 0: at the end",
            ),
            ("log_interval", "int?", None, "updates between logs; None fits the budget; 0: never", at_least(0)),
            ("progress", "bool?", None, "progress bar; None shows it on a terminal"),
            ("auto_resume", "bool", False, "resume the newest checkpoint of the run directory, if there is one"),
            ("resume", "str?", None, "checkpoint to continue from, with its full state"),
            ("pretrained", "str?", None, "weights to start from", ID),
            ("log", "bool", True, "write the log to a file"),
            ("tensorboard", "bool", False, "write TensorBoard event files"),
            ("deepspeed", "mapping?", None, "DeepSpeed's own configuration"),
            ("accelerate", "mapping?", None, "arguments of accelerate.Accelerator"),
        ),
        *_section(
            "checkpoint.",
            ("dir_name", "str", "checkpoints", "directory of the checkpoints", RELATIVE),
            (
                "interval",
                "interval?",
                None,
                "how often to save; None: every epoch, or 20 times; 0: best, final, requested",
            ),
            ("keep_latest_k", "int", 0, "regular checkpoints to keep; 0 keeps all", at_least(0)),
            ("async_enabled", "bool", True, "write checkpoints in the background"),
            (
                "async_mode",
                "str?",
                None,
                "how to write in the background; None follows async_enabled",
                one_of("disabled", "async", "async_with_pinned_mem"),
            ),
            ("dedicated_async_process_group", "bool", True, "a process group of its own for background commits"),
            ("async_process_group_backend", "str", "gloo", "backend of that group", one_of("gloo", "nccl")),
            (
                "backend",
                "str",
                "auto",
                "store of the tensors; auto: dcp when state is sharded, else file",
                one_of("auto", "file", "dcp"),
            ),
            ("wait_timeout", "float?", None, "seconds to wait for pending saves at close; None waits", above(0)),
            ("load_only", "bool", False, "write no checkpoint at all; reading works"),
            (
                "exclude_from_loading",
                "list|str?",
                None,
                "components or name patterns to leave out when resuming",
                TEXT_OR_TEXTS,
            ),
            ("last_save_model_only", "bool", False, "make the final save weights alone"),
            ("export_dtype", "str?", None, "precision of that final save", DTYPE),
            ("enable_ft_dataloader_checkpoints", "bool", False, "each fault-tolerant replica saves its data position"),
            ("ft_replica_id", "str?", None, "name of this replica in those saves"),
            ("ft_dataloader_checkpoint_prefix", "str", "dataloader-replica", "file name prefix of those saves", NAME),
        ),
        *_section(
            "optim.",
            ("type", "str?", None, "name of the optimizer; None builds none", ID),
            ("lr", "float", ABSENT, "learning rate", ID),
            ("weight_decay", "float", ABSENT, "weight decay", ID),
            ("betas", "list", ABSENT, "decay rates of the moments", ID),
            ("momentum", "float", ABSENT, "momentum", ID),
            ("eps", "float|list?", ABSENT, "added to denominators", ID),
            (
                "param_groups",
                "list?",
                None,
                "rules that give parameters options of their own, first match wins",
                RULES,
                ID,
            ),
            ("no_decay", "bool", False, "no weight decay for biases and norms", ID),
        ),
        *_section(
            "scheduler.",
            ("type", "str?", None, "name of the learning rate scheduler; None builds none", ID),
            (
                "interval",
                "str",
                "auto",
                "when to step it; auto: epoch for metric schedulers, else step",
                one_of("auto", "step", "epoch"),
                ID,
            ),
            ("monitor", "str?", None, "metric or split.metric for metric schedulers; None takes the score", ID),
        ),
        *_section(
            "ema.",
            ("enabled", "bool", False, "keep an exponential moving average of the weights", ID),
            ("decay", "float", 0.999, "weight of the past", BUCKET, ID),
            ("interval", "int", 1, "updates between averages", at_least(1), ID),
            ("start_step", "int", 0, "first update that is averaged", at_least(0), ID),
        ),
        *_section(
            "activation_checkpoint.",
            ("enabled", "bool", False, "recompute activations in the backward pass"),
            ("module_classes", "list?", None, "class names of the modules to recompute", TEXTS),
            ("checkpoint_impl", "str", "no_reentrant", "implementation", one_of("no_reentrant", "reentrant")),
        ),
        *_section(
            "dataloader.",
            (
                "batch_size",
                "int?",
                1,
                "samples per micro-batch and rank; None: the dataset yields batches",
                at_least(1),
                ID,
            ),
            ("shuffle", "bool?", None, "random order; None: for train splits", ID),
            ("drop_last", "bool?", None, "leave out the incomplete last batch; None: for train splits", ID),
            ("num_workers", "int", 0, "worker processes", at_least(0)),
            ("prefetch_factor", "int?", None, "batches each worker loads ahead", at_least(1)),
            ("persistent_workers", "bool", False, "keep workers between epochs"),
            ("pin_memory", "bool?", None, "page-locked host memory; None: with an accelerator"),
            ("pin_memory_device", "str", "", "device to pin memory for"),
            ("timeout", "float", 0.0, "seconds to wait for a batch of the workers; 0 waits", at_least(0)),
            ("in_order", "bool", True, "yield batches in order; False gives up exact resume"),
            (
                "multiprocessing_context",
                "str?",
                None,
                "how workers start: fork, spawn, forkserver",
                one_of("fork", "spawn", "forkserver"),
            ),
            ("snapshot_every_n_steps", "int", 1, "batches between snapshots of the workers' state", at_least(1)),
            (
                "shard",
                "str",
                "auto",
                "how iterable datasets are divided over ranks",
                one_of("auto", "stride", "none"),
                ID,
            ),
        ),
        *_section(
            "ddp.",
            ("find_unused_parameters", "bool", False, "as in DistributedDataParallel"),
            ("static_graph", "bool", False, "as in DistributedDataParallel"),
            ("gradient_as_bucket_view", "bool", True, "as in DistributedDataParallel"),
            ("broadcast_buffers", "bool", True, "as in DistributedDataParallel"),
            ("bucket_cap_mb", "float", 25.0, "size of a gradient bucket in MiB", above(0)),
        ),
        *_section(
            "fsdp.",
            ("enabled", "bool?", None, "shard parameters; None: when parallel.axes.shard is above 1"),
            ("reshard_after_forward", "bool|int?", None, "as in fully_shard"),
            (
                "mp_policy",
                "mapping?",
                None,
                "mixed precision: param_dtype, reduce_dtype, output_dtype, cast_forward_inputs",
                POLICY,
            ),
            ("offload_policy", "bool|mapping?", None, "keep sharded state in host memory"),
            ("module_classes", "list?", None, "class names of the modules to shard one by one", TEXTS),
        ),
        *_section(
            "parallel.",
            *(
                (
                    f"axes.{axis}",
                    "int",
                    1,
                    f"degree of the {axis} axis; -1 takes what is left",
                    Rule(">= 1, or -1", lambda value: value >= 1 or value == -1),
                )
                for axis in ("replicate", "shard", "context", "pipeline", "tensor", "expert", "expert_tensor")
            ),
            ("pipeline_schedule", "str", "1F1B", "pipeline schedule"),
            ("pipeline_microbatch_size", "int", 1, "samples per pipeline micro-batch", at_least(1)),
            (
                "pipeline_n_microbatches",
                "int?",
                None,
                "pipeline micro-batches; None follows from their size",
                at_least(1),
            ),
            ("module_fqns_per_model_part", "list?", None, "module names of each pipeline stage"),
        ),
        *_section(
            "compile.",
            ("enable", "bool", False, "compile the model with torch.compile"),
            ("backend", "str?", None, "as in torch.compile"),
            ("mode", "str?", None, "as in torch.compile"),
            ("fullgraph", "bool?", None, "as in torch.compile"),
            ("dynamic", "bool?", None, "as in torch.compile"),
            ("options", "mapping?", None, "as in torch.compile"),
            ("optimize_ddp", "str?", None, "torch's optimize_ddp setting for compiled DDP models"),
            ("precompile_artifact_dir", "str?", None, "directory of compiler cache artifacts"),
            ("memory_policy", "str?", None, "compiler memory policy", one_of("default")),
        ),
        *_section(
            "comm.",
            ("backend", "str?", None, "process group backend; None: nccl with CUDA, else gloo"),
            ("init_timeout_seconds", "int?", None, "time-out of collectives until the first update", above(0)),
            ("train_timeout_seconds", "int?", None, "time-out of collectives after it", above(0)),
        ),
        *_section(
            "gc.",
            ("interval", "int?", None, "updates between garbage collections; None leaves Python's own", at_least(1)),
            ("generation", "int", 1, "generation to collect", Rule("0, 1 or 2", lambda value: 0 <= value <= 2)),
            ("disable_automatic", "bool", True, "switch Python's automatic collection off meanwhile"),
        ),
        *_section(
            "wandb.",
            ("enabled", "bool", False, "log to Weights & Biases"),
            ("project", "str?", None, "None: the lineage"),
            ("entity", "str?", None, "as in wandb.init"),
            ("group", "str?", None, "None: the experiment"),
            ("name", "str?", None, "None: the run's name"),
            ("job_type", "str?", None, "as in wandb.init"),
            ("tags", "list?", None, "as in wandb.init", TEXTS),
            ("dir", "str?", None, "None: the run directory"),
            ("mode", "str?", None, "as in wandb.init", one_of("online", "offline", "disabled")),
        ),
        *_section(
            "ft.",
            ("enabled", "bool", False, "fault-tolerant training with TorchFT"),
            ("process_group", "str", "gloo", "backend between replicas", one_of("gloo", "nccl")),
            ("process_group_timeout_ms", "int", 10000, "time-out between replicas", at_least(1)),
            ("replica_id", "int", 0, "number of this replica", at_least(0)),
            ("group_size", "int", 1, "number of replicas", at_least(1)),
            ("min_replica_size", "int", 1, "replicas that must be alive to go on", at_least(1)),
        ),
        *_section(
            "profiling.",
            ("enabled", "bool", False, "record profiler traces"),
            ("wait", "int", 1, "updates to leave out", at_least(0)),
            ("warmup", "int", 1, "updates to warm up", at_least(0)),
            ("active", "int", 3, "updates to record", at_least(1)),
            ("repeat", "int?", 1, "how many recordings", at_least(1)),
            ("record_shapes", "bool", False, "as in torch.profiler"),
            ("profile_memory", "bool", False, "as in torch.profiler"),
            ("with_stack", "bool", False, "as in torch.profiler"),
            ("with_flops", "bool", False, "as in torch.profiler"),
            ("trace_dir", "str", "profiles", "directory of the traces", RELATIVE),
        ),
        *_section(
            "heartbeat.",
            ("enabled", "bool", False, "write a sign of life for each rank"),
            ("interval_seconds", "float", 60.0, "seconds between them", above(0)),
            ("dir_name", "str", "heartbeats", "their directory", RELATIVE),
        ),
        *_section(
            "performance.",
            (
                "model_flops_per_sample",
                "float?",
                None,
                "floating point operations per sample, for tflops and mfu",
                above(0),
            ),
            (
                "model_flops_per_token",
                "float?",
                None,
                "floating point operations per token, for tflops and mfu",
                above(0),
            ),
            ("peak_flops", "float?", None, "peak floating point operations per second of one device", above(0)),
        ),
    ]
}

SECTIONS: frozenset[str] = frozenset(
    ".".join(parts[:depth]) for parts in (name.split(".") for name in KEYS) for depth in range(1, len(parts))
)
TOP_LEVEL: frozenset[str] = frozenset(name.split(".")[0] for name in KEYS)
ENVIRONMENT = frozenset({"world_size", "rank", "local_rank", "master_addr", "master_port"})
CONSTRUCTOR_SECTIONS = frozenset({"optim", "scheduler"})
SPLIT_SECTIONS = frozenset({"dataloader"})


def lookup(name: str) -> Key | None:
    """Return the row that governs a dotted name, also `dataloader.<split>.<key>`, or None.

    Examples:
        >>> lookup("dataloader.val.batch_size").kind
        'int?'
    """
    parts = name.split(".")
    if parts[0] in SPLIT_SECTIONS and len(parts) == 3:
        return KEYS.get(f"{parts[0]}.{parts[2]}")
    return KEYS.get(name)


def nearest(name: str, candidates: Any) -> str:
    """Return the candidate most like `name`, comparing the whole name and its last part.

    Examples:
        >>> nearest("checkpoint.intervall", KEYS)
        'checkpoint.interval'
    """
    names = sorted(map(str, candidates))
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [item for item in names if "." in item and item.rsplit(".", 1)[-1] == leaf]  # the wrong section
    found = get_close_matches(name, names, n=1, cutoff=0.75) or same_leaf
    return (found or get_close_matches(name, names, n=1, cutoff=0.0))[0]


def one_edit_away(name: str, other: str) -> bool:
    """Return whether one insertion, deletion, replacement or swap of neighbours makes `name` into `other`.

    Examples:
        >>> [one_edit_away(name, "optim") for name in ("optin", "optmi", "optims", "optical", "optim")]
        [True, True, True, False, False]
    """
    if name == other or abs(len(name) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))
    if len(name) == len(other):
        swapped = name[start : start + 2] == other[start : start + 2][::-1] and name[start + 2 :] == other[start + 2 :]
        return swapped or name[start + 1 :] == other[start + 1 :]
    longer, shorter = (name, other) if len(name) > len(other) else (other, name)
    return longer[start + 1 :] == shorter[start:]
