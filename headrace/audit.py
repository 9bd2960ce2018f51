"""The proof that a run lost nothing and doubled nothing, from what the server and the output still hold.

`balance` is a pure function of the `Evidence`; `gather` reads it, changing nothing. An id is *lost* when it
was accepted and neither waits, nor lies in a result stream, nor is written; *doubled* when it stands twice
where once is allowed: in the job streams, in the result streams, or in the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from headrace.keys import DEFAULT_RESULTS, FIELD, FORGOTTEN, QUEUED
from headrace.ledger import Ledger
from headrace.messages import Priority, Status
from headrace.runs import RunProgress
from headrace.store import Call, Flow

#: Entries or fields in one read.
PAGE = 1000
#: Ids that a report names of each kind.
NAMED = 5
ENDS = tuple(s.value for s in Status)


@dataclass(slots=True)
class Evidence:
    """What is known of one run, by job id. `manifest` and `written` are None where nobody gave them."""

    counters: RunProgress
    marks: dict[str, str] = field(default_factory=dict)
    waiting: Counter[str] = field(default_factory=Counter)  # entries in the job streams
    results: Counter[str] = field(default_factory=Counter)  # completions that some sink has yet to take
    manifest: set[str] | None = None  # ids that the producer's own index admitted
    written: Counter[str] | None = None  # rows of the output


@dataclass(frozen=True, slots=True)
class Report:
    """The sums of a run and the ids that do not add up. `unproven`: accepted and ended, but with no trace in
    what was looked at; the output that took them settles it."""

    submitted: int
    ended: dict[str, int]
    waiting: int
    lost: list[str]
    doubled: list[str]
    unproven: int

    @property
    def balanced(self) -> bool:
        return self.submitted == sum(self.ended.values()) and not (self.lost or self.doubled or self.unproven)

    def lines(self) -> list[str]:
        """For people: the equation, then what breaks it."""
        parts = " + ".join(f"{n:,} {name}" for name, n in self.ended.items())
        sign = "=" if self.submitted == sum(self.ended.values()) else "!="
        out = [f"submitted {self.submitted:,} {sign} {parts}"]
        out.append(f"lost {len(self.lost):,}, doubled {len(self.doubled):,}")
        if self.waiting:
            out.append(f"{self.waiting:,} jobs wait or run: the run has not ended")
        if self.unproven:
            out.append(f"{self.unproven:,} ended jobs left no mark: give --output, which took them")
        for what, ids in (("lost", self.lost), ("doubled", self.doubled)):
            out += [f"  {what}: {i}" for i in ids[:NAMED]]
            if len(ids) > NAMED:
                out.append(f"  {what}: and {len(ids) - NAMED:,} more")
        return out


def balance(e: Evidence) -> Report:
    """The report. A completion that is written and still unacknowledged is one completion, not two: sinks
    write first and acknowledge then."""
    written = e.written if e.written is not None else Counter[str]()
    ours = e.marks.keys() | (e.manifest or set())
    doubled = {i for c in (e.waiting, e.results, written) for i, n in c.items() if n > 1}
    lost = set()
    for job in ours:
        mark = e.marks.get(job)
        found = job in e.waiting or job in e.results or job in written
        if mark == FORGOTTEN or found:
            continue
        # Without an output to look into, an ended job was taken: only what sinks acknowledged is deleted.
        if mark in (None, QUEUED) or e.written is not None:
            lost.add(job)
    ended = {name: getattr(e.counters, name) for name in ENDS}
    submitted = max(e.counters.submitted, len(e.manifest or ()))
    marked = sum(1 for m in e.marks.values() if m in ENDS)
    dropped = sum(ended.values()) - marked  # by a sink that owns the run: its output knows them
    seen = sum(1 for job in written if e.marks.get(job) not in ENDS)
    unproven = max(0, dropped - (seen if e.written is not None else 0))
    return Report(
        submitted, ended, e.waiting.total(), sorted(lost), sorted(doubled), unproven if not lost else 0
    )


def gather(ledger: Ledger, run: str) -> Flow[Evidence]:
    """The server's part of the evidence, read in the order in which jobs move, so that none slips past."""
    keys = ledger.keys
    evidence = Evidence((yield ledger.progress(run)))
    cursor = 0
    while True:
        cursor, page = yield _call("HSCAN", keys.marks(run), cursor, "COUNT", PAGE)
        evidence.marks |= {k.decode(): v.decode() for k, v in page.items()}
        if cursor == 0:
            break
    for priority in Priority:
        yield from _count(keys.jobs(priority), run, evidence.waiting)
    streams = set[str]()
    every = _literal(keys.results(DEFAULT_RESULTS).removesuffix(DEFAULT_RESULTS)) + "*"
    while True:
        cursor, names = yield _call("SCAN", cursor, "MATCH", every, "COUNT", PAGE)
        streams |= {name.decode() for name in names}
        if cursor == 0:
            break
    for stream in sorted(streams):
        yield from _count(stream, run, evidence.results)
    for job, mark in evidence.marks.items():  # those that ended, and were taken, while we read
        if mark == QUEUED and job not in evidence.waiting and job not in evidence.results:
            evidence.marks[job] = (yield ledger.mark(run, job)) or mark
    return evidence


def _count(stream: str, run: str, found: Counter[str]) -> Flow[None]:
    """Count a run's ids in a stream, a page at a time."""
    start = "-"
    while True:
        entries = yield _call("XRANGE", stream, start, "+", "COUNT", PAGE)
        for entry, fields in entries:
            if b"r" in fields:  # a large job, kept beside its entry
                fields = {FIELD.encode(): (yield _call("GET", f"{stream}#{entry.decode()}")) or b""}
            for job in _ids(fields, run):
                found[job] += 1
        if len(entries) < PAGE:
            return
        start = f"({entries[-1][0].decode()}"


def _ids(fields: dict[bytes, bytes], run: str) -> Iterator[str]:
    try:
        value = orjson.loads(fields.get(FIELD.encode(), b""))
    except orjson.JSONDecodeError:  # no job of anybody's: the engine ends it as unreadable
        return
    if isinstance(value, dict) and value.get("run") == run and isinstance(value.get("id"), str):
        yield value["id"]


def _call(*command: str | int) -> Call[Any]:
    return Call(lambda reply: reply, None, (), command)


def _literal(text: str) -> str:
    """As a pattern that matches only itself."""
    return "".join(f"\\{c}" if c in "*?[]\\^" else c for c in text)
