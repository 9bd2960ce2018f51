"""Loading an input into a lane: batch after batch, as fast as the lane takes it and no faster.

A load may be cut anywhere and given again: job ids come from the rows' content, so the ledger knows
what it has, and rows that the caller's output holds already are not even sent. Memory stays flat
whatever the input's length. Knows the ledger's calls, nothing of engines or sinks.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from headrace.errors import StoreFull, StoreUnavailable
from headrace.ledger import Ledger
from headrace.messages import Completion, Job
from headrace.patience import Patience
from headrace.store import Store, Work
from producer.admitted import AdmittedRows
from producer.lines import Line, is_text, open_input, read_lines
from producer.rows import RowParser

T = TypeVar("T")

#: Rows in one round trip.
BATCH = 200
#: Jobs that may wait in the lane at once; the rest of the input waits on disk.
BOUND = 10_000
#: Seconds between attempts while the lane is full; each wait is drawn between half and all of it.
FULL_WAIT_S = 0.25


@dataclass(slots=True)
class Loaded:
    """Rows of this pass so far. Read by other threads while a load runs: plain integers only."""

    rows: int = 0
    queued: int = 0  # jobs that the lane took now
    known: int = 0  # jobs that the lane or the output had already
    rejected: int = 0  # rows that could not become jobs
    full: bool = False  # the lane is at its bound at this moment
    complete: bool = False  # the input was read to its end


@dataclass(slots=True)
class Loader:
    """One load of one input.

    `written` answers which of some job ids the output holds already. `stop` ends the load between batches.
    Raises InputError, RowChanged and StoreError from `run`.
    """

    store: Store
    ledger: Ledger
    parser: RowParser
    admitted: AdmittedRows
    written: Callable[[Collection[str]], Collection[str]] = lambda ids: ()
    bound: int = BOUND
    patience_s: float = 60.0  # how long the server may be away
    stop: threading.Event = field(default_factory=threading.Event)
    unfinished: threading.Event = field(default_factory=threading.Event)
    """Set as soon as the lane holds a job of this load that an engine must run."""
    loaded: Loaded = field(default_factory=Loaded)

    def run(self, path: str) -> Loaded:
        """Load the file (or `-`) to its end, or until `stop`. Returns the counts."""
        with open_input(path) as stream:
            lines = read_lines(stream)
            while not self.stop.is_set() and (batch := list(islice(lines, BATCH))):
                self._load(batch)
        if not self.stop.is_set():
            self._send(lambda: self.ledger.set_total(self.parser.run, len(self.admitted)))
            self.loaded.complete = True
        return self.loaded

    def _load(self, lines: list[Line]) -> None:
        by_number = {line.number: line for line in lines}
        admission = self.admitted.admit([self.parser.parse(line) for line in lines])
        doubled = [self.parser.duplicate(row, by_number[row.line]) for row in admission.twice]
        rows = admission.fresh + self.admitted.admit(doubled).fresh
        written = self.written([row.id for row in rows])
        left = [row for row in rows if row.id not in written]
        self.loaded.rows += len(lines)
        self.loaded.known += len(rows) - len(left)
        self._reject([row.item for row in left if isinstance(row.item, Completion)])
        self._submit([row.item for row in left if isinstance(row.item, Job)])

    def _reject(self, completions: list[Completion]) -> None:
        if completions:
            self._send(lambda: self.ledger.reject(completions))
            self.loaded.rejected += len(completions)

    def _submit(self, jobs: list[Job]) -> None:
        """Offer the jobs until the lane has taken them all."""
        while jobs and not self.stop.is_set():
            jobs = self._offer(jobs)
            self.loaded.full = bool(jobs)
            if jobs:
                self.unfinished.set()
                self.stop.wait(FULL_WAIT_S * random.uniform(0.5, 1))

    def _offer(self, jobs: list[Job]) -> list[Job]:
        """One round; returns the jobs that the lane had no room for."""
        states = self._send(lambda: self.ledger.submit(jobs, self.bound))
        if states is None:
            return jobs
        refused = [job for job, state in zip(jobs, states, strict=True) if state == "full"]
        new = states.count("new")
        self.loaded.queued += new
        self.loaded.known += len(jobs) - len(refused) - new
        if new or "queued" in states:
            self.unfinished.set()
        return refused

    def _send(self, call: Callable[[], Work[T]]) -> T | None:
        """Run a call, also through an outage. None where `stop` came before an answer."""
        patience = Patience(self.patience_s)
        while not self.stop.is_set():
            try:
                return self.store.run(call())
            except (StoreUnavailable, StoreFull) as e:
                patience.wait(e, self.stop)
        return None


def parser_for(path: str, run: str, lane: str, reply_to: str | None) -> RowParser:
    return RowParser(run=run, lane=lane, reply_to=reply_to, text=is_text(path))
