"""`headrace submit`: put a file on a lane that engines elsewhere serve."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.common import OK, ROWS_FAILED, add_queue_flags, name_from, settings

if TYPE_CHECKING:
    from headrace.ledger import Ledger
    from headrace.store import Store

#: Seconds between looks at a run that is waited for.
_LOOK_S = 0.5

_EPILOG = """The same file may be submitted again after an interruption: jobs that the lane knows are not
queued twice. With --wait the command ends when every row has, with exit code 2 if some failed.

examples:
  headrace submit rows.jsonl --redis redis://queue:6379 --lane chat --wait
  headrace submit rows.jsonl --redis redis://queue:6379 --lane chat --run nightly-2026-09-23"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "submit",
        help="put a file of prompts on a lane",
        description="Queue every row of INPUT; the forms of INPUT are those of `headrace run`.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="INPUT", help=".jsonl or .txt file, or - for standard input")
    add_queue_flags(parser)
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: made from INPUT's path)")
    parser.add_argument("--results", metavar="NAME", help="result stream (default: the lane's own)")
    parser.add_argument("--wait", action="store_true", help="wait until every row has ended")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from headrace.connection import connect
    from headrace.ledger import Ledger
    from headrace.store import Store
    from producer.admitted import AdmittedRows
    from producer.lines import STDIN
    from producer.load import Loader, parser_for

    chosen = settings(args)
    run = args.run or (f"stdin-{time.time_ns():x}" if args.input == STDIN else name_from(args.input))
    store, ledger = (
        Store(connect(chosen.redis, chosen.allow_volatile)),
        Ledger(chosen.lane, int(chosen.retention_days * 86_400)),
    )
    with tempfile.TemporaryDirectory(prefix="headrace-submit-") as folder:
        admitted = AdmittedRows(Path(folder) / "rows.sqlite")
        parser = parser_for(args.input, run, chosen.lane, args.results)
        loader = Loader(store, ledger, parser, admitted, bound=chosen.lane_bound)
        loaded = loader.run(args.input)
        admitted.close()
    print(
        f"run {run}: {loaded.rows:,} rows, {loaded.queued:,} queued, {loaded.known:,} known before, "
        f"{loaded.rejected:,} rejected",
        file=sys.stderr,
    )
    return _wait(store, ledger, run) if args.wait else OK


def _wait(store: Store, ledger: Ledger, run: str) -> int:
    """Until every row of the run has ended; shows the run's own counters."""
    from headrace.cli.progress import Progress, Snapshot, summary

    progress, started = Progress(), time.monotonic()
    while True:
        now = store.run(ledger.progress(run))
        snapshot = Snapshot(
            done=now.ended,
            failed=now.ended - now.ok,
            total=now.submitted,
            prompt_tokens=now.prompt_tokens,
            cached_tokens=now.cached_tokens,
            completion_tokens=now.completion_tokens,
        )
        progress.show(snapshot)
        if now.ended >= now.submitted:
            break
        time.sleep(_LOOK_S)
    progress.close()
    rows = {name: getattr(now, name) for name in ("ok", "error", "expired", "cancelled", "dead")}
    print(
        summary(
            {k: v for k, v in rows.items() if v},
            snapshot,
            snapshot.completion_tokens,
            time.monotonic() - started,
        )
    )
    return ROWS_FAILED if snapshot.failed else OK
