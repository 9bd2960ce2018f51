"""The commit thread: from finished requests to fenced completions, as many in one call as there are."""

from __future__ import annotations

import logging
import math

from engine.service.desk import Desk
from engine.service.ends import end, note_full_results
from headrace.errors import StoreFull, StoreUnavailable
from headrace.patience import Patience

log = logging.getLogger("headrace.engine")

#: Completions that one finish call carries at most.
BATCH = 200


def commit_until_done(desk: Desk) -> None:
    """Until the None in `desk.done`. While the server is away, completions wait here with their leases."""
    patience = Patience(math.inf)
    last = False
    while not last:
        batch = [desk.done.get()]
        while len(batch) < BATCH and not desk.done.empty():
            batch.append(desk.done.get())
        last = None in batch
        items = [(held, desk.jobs.completion(held)) for held in batch if held is not None]
        while items:
            try:
                end(desk, items)
                note_full_results(desk, items)
                patience.over()
                break
            except (StoreUnavailable, StoreFull) as e:
                if desk.draining.is_set():
                    log.warning("uncommitted engine=%s jobs=%d: they are run again", desk.id, len(items))
                    break
                patience.wait(e, desk.draining)
