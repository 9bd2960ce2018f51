"""`headrace doctor`: is this server fit for a queue? A table of checks, each with what mends it."""

from __future__ import annotations

import argparse

from headrace.cli.common import CANNOT, OK, add_queue_flags, settings

_EPILOG = """Each check says what was found and how to mend it. Nothing on the server is changed.

exit code: 0 the server is fit, 1 it is refused

examples:
  headrace doctor --redis redis://queue:6379
  headrace doctor --redis rediss://engine:secret@queue:6380 --role engine --lane chat"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check that a Redis or Valkey server is fit for a queue",
        description="Check a server: version, eviction, persistence, who may enter, clocks, rights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_queue_flags(parser)
    parser.add_argument(
        "--role",
        action="append",
        choices=["producer", "engine", "sink", "admin"],
        help="check the rights that this part needs; may be given again (default: producer, engine, sink)",
    )
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from headrace.doctor import examine, fit
    from headrace.rights import Role

    chosen = settings(args)
    roles = [Role(r) for r in args.role or ("producer", "engine", "sink")]
    findings = examine(chosen.redis, chosen.lane, roles, chosen.allow_volatile)
    table = Table(box=None, pad_edge=False)
    for head in ("check", "verdict", "found, and what mends it"):
        table.add_column(head, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "refused": "bold red"}
    for f in findings:
        said = Text(f.found)
        if f.fix:
            said.append(f"\n-> {f.fix}", style="dim" if f.verdict.value == "warning" else "")
        table.add_row(f.check, Text(f.verdict.value, style=colours[f.verdict.value]), said)
    Console().print(table)
    return OK if fit(findings) else CANNOT
