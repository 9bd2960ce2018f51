"""`headrace dlq`: the jobs that were given up. List them, look at one, run them again, drop them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from headrace.cli.common import CANNOT, OK, CommandError, add_queue_flags, settings

if TYPE_CHECKING:
    from headrace.deadletters import DeadLetter
    from headrace.ledger import Ledger
    from headrace.store import Store

_EPILOG = """A job comes here when it killed an engine or a rank twice, the last time alone; when it failed by
a fault of the engine's own as often as max_attempts allows; or when its bytes were no job. It has ended, and
its run adds up; here is what happened, and what it was. Prompts are shown to those who ask with --raw.

examples:
  headrace dlq ls --redis redis://queue:6379 --lane chat
  headrace dlq show 1764000000000-0 --lane chat
  headrace dlq redrive --run night-3 --lane chat
  headrace dlq purge --all --lane chat"""

_LS = """examples:
  headrace dlq ls --lane chat
  headrace dlq ls --lane chat --run night-3"""

_SHOW = """What is printed is JSON: how the job ended, its failed deliveries by cause, and the evidence of the
last crash (engine, rank, its traceback, versions).

examples:
  headrace dlq show 1764000000000-0 --lane chat
  headrace dlq show 1764000000000-0 --lane chat --raw > job.json"""

_REDRIVE = """The job is submitted again under its id, without its deadline and with nothing counted against
it; its run counts it as unfinished again. A sink keeps one row for each job id: one that has written the
failed row passes the new one over, so let --results name another stream, with a sink of its own.

examples:
  headrace dlq redrive 1764000000000-0 --lane chat
  headrace dlq redrive --run night-3 --lane chat --results night-3-again
  headrace dlq redrive --all --lane chat"""

_PURGE = """examples:
  headrace dlq purge 1764000000000-0 --lane chat
  headrace dlq purge --run night-3 --lane chat
  headrace dlq purge --all --lane chat"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    text: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser(
        "dlq",
        help="jobs that were given up: list, show, run again, drop",
        description="Dead letters: the jobs that were given up, with the evidence.",
        epilog=_EPILOG,
        **text,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    ls = verbs.add_parser("ls", help="one line for each letter, oldest first", epilog=_LS, **text)
    ls.add_argument("--run", metavar="NAME", help="only letters of this run")
    ls.set_defaults(verb=_ls)
    show = verbs.add_parser("show", help="all that is known of one", epilog=_SHOW, **text)
    show.add_argument("letter", metavar="LETTER", help="first column of `dlq ls`")
    show.add_argument("--raw", action="store_true", help="print the job's bytes instead, prompt and all")
    show.set_defaults(verb=_show)
    redrive = verbs.add_parser("redrive", help="submit the jobs again", epilog=_REDRIVE, **text)
    redrive.add_argument("--results", metavar="NAME", help="result stream (default: the job's own)")
    redrive.set_defaults(verb=_redrive)
    purge = verbs.add_parser("purge", help="drop letters for good", epilog=_PURGE, **text)
    purge.set_defaults(verb=_purge)
    for one in (redrive, purge):
        one.add_argument("letters", metavar="LETTER", nargs="*", help="first column of `dlq ls`")
        one.add_argument("--run", metavar="NAME", help="all letters of this run")
        one.add_argument("--all", action="store_true", help="all letters of the lane")
    for one in (ls, show, redrive, purge):
        add_queue_flags(one)
        one.add_argument("--debug", action="store_true", help="show tracebacks instead of one line")
        one.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from headrace.connection import connect
    from headrace.ledger import Ledger
    from headrace.store import Store

    chosen = settings(args)
    store = Store(connect(chosen.redis, chosen.allow_volatile))
    ledger = Ledger(chosen.lane, int(chosen.retention_days * 86_400))
    try:
        return args.verb(args, store, ledger, chosen.lane_bound)
    finally:
        store.close()


def _ls(args: argparse.Namespace, store: Store, ledger: Ledger, bound: int) -> int:
    letters = [x for x in store.run(ledger.dead_letters()) if args.run in (None, x.info.get("run"))]
    for x in letters:
        when = datetime.fromtimestamp(x.info.get("at", 0), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        job, run, code = (x.info.get(key, "?") for key in ("id", "run", "code"))
        tries = f"crashes={x.attempts.crashes} errors={x.attempts.errors}"
        print(f"{x.letter_id}  {when}  run={run} job={job} {code} {tries} bytes={len(x.raw)}")
    print(f"{len(letters)} dead letters in lane {ledger.lane}", file=sys.stderr)
    return OK


def _show(args: argparse.Namespace, store: Store, ledger: Ledger, bound: int) -> int:
    import orjson

    letter = store.run(ledger.dead_letter(args.letter))
    if letter is None:
        raise CommandError(f"lane {ledger.lane} has no letter {args.letter}: `headrace dlq ls` lists them")
    if args.raw:
        sys.stdout.buffer.write(letter.raw)
        sys.stdout.buffer.flush()
        return OK
    shown = dataclasses.asdict(letter) | {"raw": f"{len(letter.raw)} bytes; --raw prints them"}
    print(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
    return OK


def _redrive(args: argparse.Namespace, store: Store, ledger: Ledger, bound: int) -> int:
    from headrace.errors import InvalidJob
    from headrace.messages import Job

    code = OK
    for letter in _chosen(args, store, ledger):
        try:
            job = Job.parse(letter.raw)
        except InvalidJob as e:
            print(f"{letter.letter_id}  stays: its bytes are no job: {e}")
            code = CANNOT
            continue
        changes: dict[str, Any] = {"deadline": None} | ({"reply_to": args.results} if args.results else {})
        state = store.run(ledger.redrive(letter, job.model_copy(update=changes), bound))
        print(f"{letter.letter_id}  job={job.id} {'stays: the lane is full' if state == 'full' else state}")
        code = CANNOT if state == "full" else code
    return code


def _purge(args: argparse.Namespace, store: Store, ledger: Ledger, bound: int) -> int:
    n = sum(store.run(ledger.purge(letter.letter_id)) for letter in _chosen(args, store, ledger))
    print(f"{n} dead letters dropped")
    return OK


def _chosen(args: argparse.Namespace, store: Store, ledger: Ledger) -> Iterable[DeadLetter]:
    if bool(args.letters) + bool(args.run) + bool(args.all) != 1:
        raise CommandError("name letters, or a run with --run, or --all: exactly one of the three")
    letters = {x.letter_id: x for x in store.run(ledger.dead_letters())}
    if not args.letters:
        return [x for x in letters.values() if args.run in (None, x.info.get("run"))]
    if missing := [name for name in args.letters if name not in letters]:
        raise CommandError(f"lane {ledger.lane} has no letter {missing[0]}: `headrace dlq ls` lists them")
    return [letters[name] for name in args.letters]
