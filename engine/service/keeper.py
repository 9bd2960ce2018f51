"""The keeper thread: heartbeats, and lease renewals that stop when the step counter does.

An engine whose ranks hang must lose its leases, or its jobs would wait for ever; so leases are prolonged
only while results arrive.
"""

from __future__ import annotations

import logging
import os
import time

from engine.service.desk import Desk
from headrace.errors import StoreError

log = logging.getLogger("headrace.engine")

#: Seconds between heartbeats.
HEARTBEAT_S = 1.0


def keep(desk: Desk) -> None:
    """Until the desk is closed."""
    renewed = moved_at = time.monotonic()
    seen = -1
    while not desk.closed.wait(HEARTBEAT_S):
        now = time.monotonic()
        if desk.engine.step_count != seen or not desk.engine.has_unfinished:
            seen, moved_at = desk.engine.step_count, now
        try:
            desk.store.run(desk.ledger.heartbeat(desk.id, _report(desk)))
            if now - renewed >= desk.settings.lease_s / 4:
                renewed = now
                if now - moved_at < desk.settings.lease_s:
                    _renew(desk)
                else:
                    log.error("stuck engine=%s seconds=%.0f: its leases run out", desk.id, now - moved_at)
        except StoreError as e:
            log.warning("keeper_failed engine=%s cause=%s", desk.id, e)


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
        "held": len(desk.held),
        "committed": desk.committed,
        **desk.engine.stats.to_dict(),
    }
