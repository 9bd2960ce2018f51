"""The keeper thread: heartbeats, lease renewals that stop when the step counter does, and the jobs whose time
is up or that somebody cancelled.

An engine whose ranks hang must lose its leases, or its jobs would wait for ever; so leases are prolonged
only while results arrive.
"""

from __future__ import annotations

import logging
import os
import time

from engine.service.desk import Desk
from engine.service.process import identity
from headrace.errors import StoreError
from headrace.messages import Status

log = logging.getLogger("headrace.engine")

#: Seconds between heartbeats.
HEARTBEAT_S = 1.0


def keep(desk: Desk) -> None:
    """Until the desk is closed."""
    renewed = moved_at = time.monotonic()
    seen, away = -1, 0.0
    emptied: set[str] = set()
    while not desk.closed.wait(HEARTBEAT_S):
        now = time.monotonic()
        if desk.engine.step_count != seen or not desk.engine.has_unfinished:
            seen, moved_at = desk.engine.step_count, now
        try:
            desk.clock.heard(desk.store.run(desk.ledger.heartbeat(desk.id, _report(desk))))
            emptied = _stop_what_must_end(desk, emptied)
            if now - renewed >= desk.settings.lease_s / 4:
                renewed = now
                if now - moved_at < desk.settings.lease_s:
                    _renew(desk)
                else:
                    log.error("stuck engine=%s seconds=%.0f: its leases run out", desk.id, now - moved_at)
        except StoreError as e:
            if not away:  # one line for an outage, not one for each second of it
                log.warning("keeper_failed engine=%s cause=%s", desk.id, e)
            away = away or now
        else:
            if away:
                log.warning("keeper_recovered engine=%s seconds=%.1f", desk.id, time.monotonic() - away)
            away = 0.0


def _stop_what_must_end(desk: Desk, emptied: set[str]) -> set[str]:
    """Between steps: the next one drops their rows, and their completions say why. Waiting jobs of a
    cancelled run end here and now, the first time that it is seen; returns the runs that were."""
    asked, now = desk.store.run(desk.ledger.cancelled()), desk.clock.now()
    runs = {member for member in asked if " " not in member}
    for run in runs - emptied:
        n = desk.store.run(desk.ledger.end_waiting(run))
        log.info("run_cancelled engine=%s run=%s jobs=%d", desk.id, run, n)
    for held in desk.held.all():
        job = held.job
        if job is None or held.stopped is not None:
            continue
        if asked and (job.run in asked or f"{job.run} {job.id}" in asked):
            held.stopped = Status.CANCELLED
        elif job.deadline is not None and now > job.deadline:
            held.stopped = Status.EXPIRED
        if held.stopped is not None:
            for request_id in desk.held.requests_of(held):
                desk.engine.cancel(request_id)
            desk.wake.set()
    return runs


def _renew(desk: Desk) -> None:
    held = {h.entry: h for h in desk.held.all()}
    lost = desk.store.run(desk.ledger.renew(desk.id, [h.leased for h in held.values()]))
    for one in lost:
        for request_id in desk.held.drop(held[one.stream, one.entry_id]):
            desk.engine.cancel(request_id)
    if lost:
        log.warning("leases_lost engine=%s jobs=%d", desk.id, len(lost))


def _report(desk: Desk) -> dict[str, object]:
    return {
        "state": desk.state,
        "model": desk.config.model_name,
        "pid": os.getpid(),
        "process": identity(),
        "held": len(desk.held),
        "committed": desk.committed,
        **desk.engine.stats.to_dict(),
    }
