"""`headrace sink jsonl`: write a lane's completions to a file, as a process of its own."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import threading
from pathlib import Path

from headrace.cli.common import OK, CommandError, add_queue_flags, log_to_stderr, settings

_EPILOG = """Every completion is written once and acknowledged after it is on the disk. Sinks with different
--group names each get all completions; an entry leaves the server when all groups have it.

examples:
  headrace sink jsonl out.jsonl --redis redis://queue:6379 --lane chat
  headrace sink jsonl night.jsonl --redis redis://queue:6379 --lane chat --results nightly --until-idle 60"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sink",
        help="write a lane's completions to a store",
        description="Consume a lane's result stream into a store, exactly once.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=["jsonl"], help="kind of store")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="file to append to")
    parser.add_argument("--error-file", type=Path, metavar="FILE", help="write failed rows here instead")
    add_queue_flags(parser)
    parser.add_argument("--results", metavar="NAME", help="result stream (default: the lane's own)")
    parser.add_argument(
        "--group", metavar="NAME", help="name of this sink (default: made from OUTPUT's name)"
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--follow", action="store_true", help="run until SIGTERM (the default)")
    idle = "end after this long without results"
    end.add_argument("--until-idle", type=float, metavar="SECONDS", default=math.inf, help=idle)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from headrace.cli.workdir import Workdir
    from headrace.connection import connect
    from headrace.ledger import Ledger
    from headrace.store import Store
    from sink.base import Consumer
    from sink.jsonl import JsonlTarget

    if not args.until_idle > 0:
        raise CommandError(f"--until-idle {args.until_idle} must be above 0 seconds")
    log_to_stderr()
    chosen = settings(args)
    workdir = Workdir(args.output)
    workdir.check()
    store = Store(connect(chosen.redis, chosen.allow_volatile))
    target = JsonlTarget(args.output, workdir.written, args.error_file)
    target.recover()
    group = args.group or "jsonl-" + re.sub(r"[^A-Za-z0-9._-]+", "-", args.output.name)[:100]
    stop = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: stop.set())
    before = target.tally.total
    try:
        Consumer(store, Ledger(chosen.lane), args.results, group, target).run(stop, args.until_idle)
    finally:
        target.close()
        print(f"{target.tally.total - before:,} rows written to {args.output}", file=sys.stderr)
    return OK
