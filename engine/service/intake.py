"""The intake thread: from the lane's streams into the core, as far ahead as the core plans.

Suspects (jobs that were in flight when an engine or a rank died) run beside nothing else, so that the next
death says more: while a group of them is held, nothing is leased.
"""

from __future__ import annotations

import logging
import math
import time

from engine.errors import EngineError
from engine.service.desk import Desk
from engine.service.held import Held
from engine.service.process import known_dead
from headrace.errors import StoreFull, StoreUnavailable
from headrace.ledger import BATCH, Leased
from headrace.patience import Patience

log = logging.getLogger("headrace.engine")

#: Jobs leased beyond the free rows at least, so that a row that ends finds the next job tokenised.
LOOK_AHEAD = 0.25
#: Seconds between looks at the other engines of the lane, and without a heartbeat after which one is gone.
COUNT_S, GONE_S = 2.0, 5.0
#: Milliseconds that an idle engine waits for a submit before it looks for released jobs.
IDLE_MS = 200
#: Sweeps that find suspects waiting for an idle engine before this one lets its rows run out for them.
PATIENT_SWEEPS = 2


class Intake:
    """Leases, sweeps, prepares jobs. `run` ends when the engine drains."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._swept = -math.inf
        self._suspects_seen = 0
        self._emptying = False  # nothing is leased until what is held has ended
        self._lost_reply = False
        self._counted = -COUNT_S
        self._fair = 0

    def run(self) -> None:
        desk = self.desk
        patience = Patience(math.inf)
        while not desk.draining.is_set():
            try:
                self._sweep()
                room = self._room()
                for one in self._lease(room) if room else []:
                    self._accept(one)
                patience.over()
            except (StoreUnavailable, StoreFull) as e:
                self._lost_reply = True
                patience.wait(e, desk.draining)
                continue
            if not room:
                desk.freed.wait(0.05)
                desk.freed.clear()

    def _room(self) -> int:
        """Jobs to lease now: none until a worthwhile number of places is free."""
        if self.desk.state != "ready":
            return 0
        held = len(self.desk.held)
        self._emptying = self._emptying and held > 0
        if self._emptying:
            return 0
        rows = self.desk.config.max_num_seqs
        most = rows + max(int(rows * LOOK_AHEAD) + 1, self._ahead(rows))
        free = most - max(self.desk.held.requests, held)
        return min(free, BATCH) if free >= max(1, rows // 8) else 0

    def _ahead(self, rows: int) -> int:
        """Jobs to plan beyond the running ones: --lookahead, where other engines of the lane find work too.

        So no engine takes more than its part of all unfinished jobs, and none idles at the end of a backlog.
        """
        desk = self.desk
        if time.monotonic() - self._counted > COUNT_S:
            self._counted = time.monotonic()
            seen = {name: engine["at"] for name, engine in desk.store.run(desk.ledger.engines()).items()}
            others = sum(at > max(seen.values()) - GONE_S for name, at in seen.items() if name != desk.id)
            self._fair = desk.config.lookahead
            if others:
                self._fair = desk.store.run(desk.ledger.jobs_waiting()) // (others + 1) - rows
        return min(desk.config.lookahead, self._fair)

    def _lease(self, room: int) -> list[Leased]:
        desk = self.desk
        if self._lost_reply:  # what it handed over is ours, and nobody else would run it
            leased = desk.store.run(desk.ledger.held_by(desk.id))
            self._lost_reply = False
        else:
            blocked = self._blocked()
            leased = desk.store.run(desk.ledger.lease(desk.id, room, blocked)) or desk.store.run(
                desk.ledger.wait_for_jobs(desk.id, room, IDLE_MS, blocked)
            )
        self._emptying = any(one.suspect for one in leased)
        return leased

    def _blocked(self) -> set[str]:
        """Back-pressure: runs whose result stream is still at its bound. Only their jobs wait."""
        desk = self.desk
        for name in list(desk.full):
            if desk.store.run(desk.ledger.result_length(name)) < desk.settings.result_bound:
                desk.full.pop(name)
        return {run for runs in desk.full.values() for run in runs}

    def _sweep(self) -> None:
        """Four times in a lease: what other engines lost, what nobody would hand out, who waits for us."""
        desk = self.desk
        if time.monotonic() - self._swept <= desk.settings.lease_s / 4:
            return
        if self._swept == -math.inf:
            self._take_over_predecessors()
        self._swept = time.monotonic()
        if n := desk.store.run(desk.ledger.reclaim(int(desk.settings.lease_s * 1000))):
            log.warning("leases_ran_out lane=%s jobs=%d", desk.settings.lane, n)
        desk.store.run(desk.ledger.heal())
        waiting = desk.store.run(desk.ledger.suspect_groups()) > 0
        self._suspects_seen = self._suspects_seen + 1 if waiting else 0
        if self._suspects_seen >= PATIENT_SWEEPS:
            self._emptying, self._suspects_seen = True, 0

    def _take_over_predecessors(self) -> None:
        """At the first sweep: engines of this machine whose processes are gone will not come back."""
        desk = self.desk
        for engine, report in desk.store.run(desk.ledger.engines()).items():
            if engine != desk.id and known_dead(report["state"].get("process", {})):
                n = desk.store.run(desk.ledger.release_dead(engine))
                log.warning("predecessor_died engine=%s jobs=%d", engine, n)

    def _accept(self, leased: Leased) -> None:
        desk = self.desk
        held = Held(leased, time.time())
        if not desk.held.add(held):
            return  # its lease ran out and came back to us: it runs already
        requests = desk.jobs.prepare(held)
        if held.newer:
            desk.held.drop(held)
            desk.store.run(desk.ledger.hold(desk.id, [leased]))
            log.warning("held_for_newer_engine entry=%s", leased.entry_id)
            return
        desk.held.started(held, requests)
        try:
            for request in requests:
                desk.engine.add(request)
        except EngineError as e:
            for request_id in desk.held.drop(held):
                desk.engine.cancel(request_id)
            desk.jobs.refuse(held, e)
            desk.held.add(held)
        if held.completion is not None:
            desk.done.put(held)
        else:
            desk.wake.set()
