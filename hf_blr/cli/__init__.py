"""The command line: `hf-blr compress`, `hf-blr demo` and the others of `COMMANDS`."""

from __future__ import annotations

import argparse
import sys

import hf_blr
from hf_blr.cli import (
    bench,
    card,
    compress,
    demo,
    evaluate,
    finetune,
    inspect,
    plan,
    report,
    roofline,
    run,
    saving,
    write,
)

COMMANDS = (compress, plan, write, evaluate, finetune, inspect, card, bench, roofline, report, demo, run)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit status. User mistakes end in one line on stderr and status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    try:
        if getattr(args, "json", None) is not None:
            saving.check_file(args.json)
        args.run(args)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if args.traceback:
            raise
        print(f"hf-blr {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-blr",
        description="Make Hugging Face models smaller with block low-rank layers (low-rank, Monarch, BLAST).",
        epilog="Start with `hf-blr demo`; `hf-blr COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"hf-blr {hf_blr.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        summary, _, details = (command.__doc__ or "").partition("\n")
        sub = commands.add_parser(
            name, help=summary, description=summary + "\n" + details, formatter_class=HelpFormatter
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the paragraphs of a description and shows each option's default, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, True, False) or "%(default)" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)
