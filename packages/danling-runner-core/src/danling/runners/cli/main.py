"""Parses the command line and hands over to the verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "stacks": "list the engines: installed ones with version, the others with the command that installs them",
    "runs": "table of the runs below a directory",
    "show": "identity, configuration, results, checkpoints and problems of one run",
    "plot": "curves of one or more runs on one step axis",
    "diff": "what differs between two runs: configuration, code, results",
    "verify": "check a checkpoint against its manifest",
    "export": "write a checkpoint's weights as safetensors",
}


class CommandError(Exception):
    """What the user has to be told in one line; ends the command with status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where a check failed, 2 for a wrong command line or path.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(next((arg for arg in argv if not arg.startswith("-")), None))
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
        return 2
    try:
        return args.command(args)
    except (CommandError, ImportError) as error:
        return _fail(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `danling runs | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(error)


def _fail(error: BaseException) -> int:
    print(f"danling: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; of the verbs only the one that is going to run is imported and gets its arguments."""
    parser = argparse.ArgumentParser(prog="danling", description="What ran, how it went, and what differs.")
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, about in VERBS.items():
        sub = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name == verb:
            module = import_module(f"{__package__}.{name}")
            module.add_arguments(sub)
            sub.set_defaults(command=module.run)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"danling {version('danling-runner-core')}")
        parser.exit()
