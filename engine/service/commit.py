"""The commit thread: from finished requests to fenced completions, as many in one call as there are.

While the server is away, completions wait here with their leases, and on the disk (`engine.service.spool`).
"""

from __future__ import annotations

import logging
import math
import time

from engine.service.desk import Desk
from engine.service.ends import Ended, end, note_full_results
from engine.service.spool import left_behind
from headrace.errors import StoreError, StoreFull, StoreUnavailable
from headrace.patience import Patience

log = logging.getLogger("headrace.engine")

#: Completions that one finish call carries at most.
BATCH = 200
#: Seconds that a draining engine waits for a server that is away before it leaves with a full spool.
LAST_S = 2.0


def commit_until_done(desk: Desk) -> None:
    """Until the None in `desk.done`, and until what came before it is committed or spooled for good."""
    Committer(desk).run()


def commit_left_behind(desk: Desk) -> None:
    """What dead engines of this machine had finished and could not commit, in their names.

    Before this engine takes jobs of the dead: a completion that exists is cheaper than one made again. Where
    the server does not take them, the files stay for the next start.
    """
    if desk.spool is None:
        return
    try:
        for dead, items in left_behind(desk.spool.path.parent):
            if not items:
                continue
            states = desk.store.run(desk.ledger.finish(dead, items))
            done = states.count("done")
            fenced = len(states) - done
            log.warning("spool_flushed engine=%s dead=%s done=%d fenced=%d", desk.id, dead, done, fenced)
    except StoreError as e:
        log.warning("spool_kept engine=%s cause=%s", desk.id, e)


class Committer:
    """Collects, commits, and keeps what cannot be committed yet."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.pending: list[Ended] = []
        self.spooled = 0  # of pending, counted from its start
        self.last: float | None = None  # when the last job came

    def run(self) -> None:
        desk, patience = self.desk, Patience(math.inf)
        while True:
            self._collect()
            try:
                while self.pending:
                    items = self.pending[:BATCH]
                    end(desk, items)
                    self._forget(len(items))
                    note_full_results(desk, items)
                patience.over()
            except (StoreUnavailable, StoreFull) as e:
                self._spool()
                if self._gives_up():
                    self._leave()
                    return
                patience.wait(e, desk.hurry)
            if self.last is not None and not self.pending:
                return

    def _collect(self) -> None:
        """What is done; waits for it where nothing is pending, or where nothing else can be done."""
        done, hurry = self.desk.done, self.desk.hurry
        while self.last is None:
            if self.pending and not hurry.is_set() and done.empty():
                return
            held = done.get()
            if held is None:
                self.last = time.monotonic()
                return
            self.pending.append((held, self.desk.jobs.completion(held)))

    def _forget(self, n: int) -> None:
        """The first `n` pending ones are committed."""
        del self.pending[:n]
        self.spooled = max(0, self.spooled - n)
        if not self.spooled and self.desk.spool is not None:
            self.desk.spool.clear()

    def _spool(self) -> None:
        """Put on the disk what is not there yet, but what is to be tried again. What does not fit stays in
        memory alone."""
        desk = self.desk
        fresh = self.pending[self.spooled :]
        if not fresh or desk.spool is None:
            return
        if desk.spool.add([(h.leased, c) for h, c in fresh if not desk.jobs.again(h, c)]):
            self.spooled = len(self.pending)
            log.warning("spooled engine=%s completions=%d", desk.id, self.spooled)

    def _gives_up(self) -> bool:
        if self.last is None:
            return False
        return self.desk.hurry.is_set() or time.monotonic() - self.last > LAST_S

    def _leave(self) -> None:
        unsafe = len(self.pending) - self.spooled
        if self.spooled and self.desk.spool is not None:
            file = self.desk.spool.path
            log.warning("left_in_spool engine=%s jobs=%d file=%s", self.desk.id, self.spooled, file)
        if unsafe:
            log.warning("uncommitted engine=%s jobs=%d: they are run again", self.desk.id, unsafe)
