"""`headrace engine`: a long-lived engine that serves one lane until it is told to stop."""

from __future__ import annotations

import argparse
import logging

from headrace.cli.common import (
    CommandError,
    add_engine_flags,
    add_queue_flags,
    engine_config,
    given_engine_flags,
    log_to_stderr,
    settings,
)
from headrace.errors import HeadraceError

_EPILOG = """SIGTERM stops intake, finishes what runs within the drain time and hands the rest back; a second
SIGTERM hands everything back at once. Several engines may serve one lane.

examples:
  headrace engine --model ./my-model --redis redis://queue:6379 --lane chat
  headrace engine --model ./my-model --redis unix:///run/valkey.sock --tensor-parallel-size 4"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "engine",
        help="serve a lane with a model, until SIGTERM",
        description="Take jobs from a lane, run them through a model, publish the completions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the model's files")
    add_queue_flags(parser)
    parser.add_argument(
        "--drain-timeout",
        type=float,
        metavar="SECONDS",
        dest="drain_s",
        help="after SIGTERM, what runs gets this long to finish before it is handed back (default: 20)",
    )
    add_engine_flags(parser)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from headrace.cli.child import die_with_parent

    die_with_parent()
    log_to_stderr()
    from engine.errors import EngineError
    from engine.service import serve

    try:
        return serve(engine_config(args.model, given_engine_flags(args)), settings(args))
    except (EngineError, HeadraceError):
        raise
    except Exception as e:  # a fault of ours or of a library: the log keeps where it came from
        logging.getLogger("headrace.engine").exception("engine_failed")
        raise CommandError(f"the engine failed: {type(e).__name__}: {e}") from e
