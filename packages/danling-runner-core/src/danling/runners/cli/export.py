"""``danling export CHECKPOINT OUT.safetensors``"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckpointError, StackError
from ..manifest import require_whole
from .checkpoints import find_checkpoint
from .main import CommandError

DTYPES = ("fp32", "fp16", "bf16", "fp64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, alias or run directory")
    parser.add_argument("output", metavar="OUT.safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="cast floating tensors; default: as they are")
    parser.add_argument("--no-ema", action="store_true", help="the model's own weights, not their average")
    parser.add_argument("--force", action="store_true", help="overwrite OUT.safetensors")


def run(args: argparse.Namespace) -> int:
    """Write the weights."""
    from ..discovery import load_engine

    checkpoint = find_checkpoint(args.checkpoint)
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise CommandError(f"{output}: must end in .safetensors")
    if output.exists() and not args.force:
        raise CommandError(f"{output} exists; --force overwrites it")
    if not output.parent.is_dir():
        raise CommandError(f"{output.parent}: no such directory")
    try:
        stack = require_whole(checkpoint).get("stack") or "torch"
        export = getattr(load_engine(stack), "export_checkpoint", None)
        if export is None:
            raise CommandError(f"{checkpoint}: stack {stack!r} has no export")
        export(checkpoint, output, dtype=args.dtype, ema=not args.no_ema)
    except (CheckpointError, StackError) as error:
        raise CommandError(str(error)) from error
    print(output)
    return 0
