"""The consumer loop that all sinks share, and the protocol a store keeps to be one.

read -> write -> commit -> acknowledge, in this order and no other: an entry is acknowledged only once
its row is durable, and a row that is durable already is not written again (the store knows job ids),
so a crash between any two of the steps neither loses nor doubles a row. Knows nothing of files.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from headrace.errors import StoreError, StoreUnavailable
from headrace.ledger import Ledger
from headrace.messages import Completion, ErrorInfo, Status
from headrace.patience import Patience
from headrace.results import Delivered
from headrace.store import Store

log = logging.getLogger("headrace.sink")

#: Completions in one commit, and milliseconds that one read waits for the first of them.
BATCH, BLOCK_MS = 500, 250
#: Name under which a group's one consumer reads. It is stable, so that a restart finds what it had read.
CONSUMER = "sink"


@dataclass(slots=True)
class Tally:
    """Rows by status and their tokens."""

    rows: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def copy(self) -> Tally:
        return Tally(dict(self.rows), self.prompt_tokens, self.cached_tokens, self.completion_tokens)

    def add(self, completion: Completion) -> None:
        usage = completion.usage
        self.count(completion.status, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def count(self, status: Status, prompt: int, cached: int, completed: int) -> None:
        self.rows[status.value] = self.rows.get(status.value, 0) + 1
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completed

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @property
    def ok(self) -> int:
        return self.rows.get(Status.OK.value, 0)

    @property
    def failed(self) -> int:
        return self.total - self.ok


class Target(Protocol):
    """A store of rows. Every method raises SinkError where the store cannot be written."""

    tally: Tally
    """Of everything that is committed, earlier passes included."""

    def recover(self) -> None:
        """Take the store over and undo what an earlier process left half done; before the first write."""
        ...

    def write(self, batch: list[Completion]) -> None:
        """Stage completions; those whose job id is in the store already, or staged, are passed over."""
        ...

    def commit(self) -> None:
        """Make what was staged durable: all of it, or none of it and SinkError."""
        ...

    def close(self) -> None: ...


class Consumer:
    """Moves completions of one result stream into one target. One thread at a time.

    `results` is the stream's name (None: the lane's own), `group` the sink's name. `patience_s` is how long
    the server may be away. `owns_run` names a run whose producer asks the target, not the server, which rows
    are done: its marks are dropped as its rows become durable, so that they do not pile up.
    Raises StoreError when the server stays away, and SinkError where the target cannot write.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        results: str | None,
        group: str,
        target: Target,
        patience_s: float = math.inf,
        owns_run: str | None = None,
    ) -> None:
        self._store, self._ledger, self._target = store, ledger, target
        self._owns_run = owns_run
        self._results, self._group = results, group
        self._patience = Patience(patience_s)
        self._replay = True  # what an earlier process, or a lost reply, left unacknowledged comes first

    def run(self, stop: threading.Event, until_idle_s: float = math.inf) -> None:
        """Until `stop`, or until nothing came for `until_idle_s`."""
        idle_since = time.monotonic()
        while not stop.is_set():
            try:
                moved = self.step()
                self._patience.over()
            except StoreUnavailable as e:
                self._replay = True
                self._patience.wait(e, stop)
                continue
            if moved:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > until_idle_s:
                return

    def step(self, block_ms: int = BLOCK_MS) -> int:
        """Move what is there, at most a batch; returns how many entries were acknowledged."""
        delivered = self._read(block_ms)
        if delivered:
            batch = [_completion(d) for d in delivered]
            self._target.write(batch)
            self._target.commit()
            entries = [d.entry_id for d in delivered]
            self._store.run(self._ledger.ack_results(self._results, self._group, entries))
            if self._owns_run is not None:
                self._store.run(self._ledger.drop_marks(self._owns_run, [c.id for c in batch]))
        return len(delivered)

    def lag(self) -> int:
        """Completions on the server that are not acknowledged yet."""
        return self._store.run(self._ledger.result_lag(self._results, self._group))

    def _read(self, block_ms: int) -> list[Delivered]:
        if self._replay:
            self._store.run(self._ledger.ensure_sink(self._results, self._group))
            left = self._store.run(self._ledger.unacknowledged(self._results, self._group, CONSUMER))
            self._replay = False
            if left:
                return left
        try:
            read = self._ledger.read_results(self._results, self._group, CONSUMER, BATCH, block_ms)
            return self._store.run(read)
        except StoreUnavailable:
            raise
        except StoreError as e:
            if "NOGROUP" not in str(e):
                raise
            self._replay = True  # the server lost its data: make the group again, slowly
            raise StoreUnavailable(str(e)) from None


def _completion(delivered: Delivered) -> Completion:
    """The completion; one that nobody can read becomes an error row: it blocks nothing and is seen."""
    try:
        return Completion.parse(delivered.raw)
    except ValueError as e:
        log.error("unreadable_completion entry=%s bytes=%d", delivered.entry_id, len(delivered.raw))
        return Completion(
            id=f"unreadable-{delivered.entry_id}",
            run="",
            lane="",
            status=Status.ERROR,
            error=ErrorInfo(
                code="unreadable_completion",
                message=f"result entry {delivered.entry_id} is no completion: {str(e)[:200]}",
            ),
        )
