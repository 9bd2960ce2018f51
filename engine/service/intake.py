"""The intake thread: from the lane's streams into the core, as far ahead as the core plans."""

from __future__ import annotations

import math
import time

from engine.errors import EngineError
from engine.service.desk import Desk
from engine.service.held import Held
from headrace.errors import StoreFull, StoreUnavailable
from headrace.ledger import BATCH, Leased
from headrace.messages import Priority
from headrace.patience import Patience

#: Jobs leased beyond the free rows at least, so that a row that ends finds the next job tokenised.
LOOK_AHEAD = 0.25
#: Seconds between looks at the other engines of the lane, and without a heartbeat after which one is gone.
COUNT_S, GONE_S = 2.0, 5.0
#: Milliseconds that an idle engine waits for a submit before it looks for released jobs.
IDLE_MS = 200


class Intake:
    """Leases, takes expired leases over, prepares jobs. `run` ends when the engine drains."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._cursors = dict.fromkeys(Priority, "0-0")
        self._swept = time.monotonic()
        self._lost_reply = False
        self._counted = -COUNT_S
        self._fair = 0

    def run(self) -> None:
        desk = self.desk
        patience = Patience(math.inf)
        while not desk.draining.is_set():
            try:
                room = self._room()
                if not room or self._results_full():
                    desk.freed.wait(0.05)
                    desk.freed.clear()
                    continue
                leased = self._lease(room)
                patience.over()
            except (StoreUnavailable, StoreFull) as e:
                self._lost_reply = True
                patience.wait(e, desk.draining)
                continue
            for one in leased:
                self._accept(one)

    def _room(self) -> int:
        """Jobs to lease now: none until a worthwhile number of places is free."""
        if self.desk.state != "ready":
            return 0
        rows = self.desk.config.max_num_seqs
        most = rows + max(int(rows * LOOK_AHEAD) + 1, self._ahead(rows))
        free = most - max(self.desk.held.requests, len(self.desk.held))
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

    def _results_full(self) -> bool:
        """Back-pressure: whether a result stream that this engine writes to is still at its bound."""
        desk = self.desk
        for name in list(desk.full):
            if desk.store.run(desk.ledger.result_length(name)) < desk.settings.result_bound:
                desk.full.discard(name)
        return bool(desk.full)

    def _lease(self, room: int) -> list[Leased]:
        desk = self.desk
        if self._lost_reply:  # what it handed over is ours, and nobody else would run it
            leased = desk.store.run(desk.ledger.held_by(desk.id))
            self._lost_reply = False
            return leased
        if time.monotonic() - self._swept > desk.settings.lease_s / 4:
            self._swept = time.monotonic()
            return self._sweep(room)
        leased = desk.store.run(desk.ledger.lease(desk.id, room))
        return leased or desk.store.run(desk.ledger.wait_for_jobs(desk.id, room, IDLE_MS))

    def _sweep(self, room: int) -> list[Leased]:
        """One page of expired leases of each priority."""
        desk, out = self.desk, list[Leased]()
        idle_ms = int(desk.settings.lease_s * 1000)
        for priority in Priority:
            if len(out) < room:
                cursor = self._cursors[priority]
                page = desk.store.run(
                    desk.ledger.reclaim(desk.id, priority, idle_ms, cursor, room - len(out))
                )
                self._cursors[priority] = page.cursor
                out += page.leased
        return out

    def _accept(self, leased: Leased) -> None:
        desk = self.desk
        held = Held(leased, time.time())
        if not desk.held.add(held):
            return  # its lease ran out and came back to us: it runs already
        requests = desk.jobs.prepare(held)
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
