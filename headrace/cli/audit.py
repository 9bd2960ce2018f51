"""`headrace audit`: prove that a run lost nothing and doubled nothing."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from headrace.cli.common import CANNOT, OK, CommandError, add_queue_flags, settings

_EPILOG = """Compares what the run's producer put in (the ledger's counters and marks, and the input index of
`headrace run`), what waits, what lies in result streams, and what the output holds. With --output, each job
of the run must be in it; an output that other runs share may hold more. Without --redis, the output of a
`headrace run` on its own embedded server is checked with that server's files.

exit code: 0 the run balances, 1 it does not, or has not ended

examples:
  headrace audit nightly-2026-09-23 --redis redis://queue:6379 --lane chat --output out.jsonl
  headrace audit answers-3f2a1b --output answers.jsonl"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "audit",
        help="prove that a run lost nothing and doubled nothing",
        description="Compare a run's counters, marks, streams and output.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="name of the run")
    add_queue_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL output that took the completions")
    parser.add_argument("--error-file", type=Path, metavar="FILE", help="its file of failed rows")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from headrace.audit import balance, gather
    from headrace.cli.workdir import Workdir
    from headrace.connection import connect
    from headrace.embedded import EmbeddedServer
    from headrace.ledger import Ledger
    from headrace.store import Store

    chosen = settings(args)
    with ExitStack() as stack:
        url, lane = chosen.redis, chosen.lane
        workdir = Workdir(args.output) if args.output else None
        manifest = workdir.previous() if workdir else None
        if manifest is not None and manifest.run != args.run:
            raise CommandError(f"{args.output} is the output of run {manifest.run}, not {args.run}")
        if manifest is not None:
            lane = args.lane or manifest.lane
        if workdir and args.redis is None and workdir.server.exists():
            stack.enter_context(workdir.locked())
            url = stack.enter_context(EmbeddedServer(workdir.server)).url
        store = Store(connect(url, chosen.allow_volatile))
        stack.callback(store.close)
        evidence = store.run(gather(Ledger(lane), args.run))
        if workdir is not None:
            if manifest is not None:
                evidence.manifest = _admitted(workdir.rows)
            evidence.written = _written(args.output, args.error_file)
    if not evidence.counters.submitted and not evidence.manifest:
        raise CommandError(f"lane {lane} knows no run {args.run}: check --lane, or its marks have expired")
    report = balance(evidence)
    print("\n".join(report.lines()))
    return OK if report.balanced else CANNOT


def _admitted(path: Path) -> set[str]:
    from producer.admitted import AdmittedRows

    if not path.exists():
        return set()
    rows = AdmittedRows(path)
    try:
        return set(rows.ids())
    finally:
        rows.close()


def _written(output: Path, error_file: Path | None) -> Counter[str]:
    from sink.jsonl import written_ids

    found = Counter(written_ids(output))
    if error_file is not None:
        found.update(written_ids(error_file))
    return found
