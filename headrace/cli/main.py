"""The `headrace` command: finds the subcommand, runs it, turns what it raises into one line.

Building the parser imports nothing heavy, so that `--help` answers at once: each command file
imports its parts when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from headrace.cli import audit, demo, dlq, doctor, engine, run, sink, submit
from headrace.cli.common import CANNOT, INTERRUPTED
from headrace.errors import HeadraceError

_EPILOG = """examples:
  headrace demo
  headrace run prompts.jsonl -o answers.jsonl --model ./my-model
  headrace engine --model ./my-model --redis redis://queue:6379 --lane chat

`headrace COMMAND --help` explains a command with examples of its own."""


class Parser(argparse.ArgumentParser):
    """argparse with headrace's error line and exit code."""

    def error(self, message: str) -> NoReturn:
        print(f"headrace: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(CANNOT)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="headrace",
        description="Durable batch inference: prompts in on Redis streams, exactly one completion out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, demo, engine, submit, sink, doctor, audit, dlq):
        module.add_parser(commands)
    for command in set(commands.choices.values()):
        command.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return report(lambda: args.command(args), args.debug)


def report(command: Callable[[], int], debug: bool = False) -> int:
    """Run a command; what it raises becomes one line on standard error and an exit code."""
    try:
        return command()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as e:
        if debug:
            raise
        print(f"headrace: error: {_line(e)}", file=sys.stderr)
        return CANNOT


def _line(e: Exception) -> str:
    """What the user reads. An error that nobody raised on purpose says its type and how to see more."""
    text = " ".join(str(e).split())
    engine_errors = sys.modules.get("engine.errors")  # only there when a command has imported it
    ours = (HeadraceError, *((engine_errors.EngineError,) if engine_errors else ()))
    return text if isinstance(e, ours) else f"{type(e).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
