"""The commit thread: from finished requests to fenced completions, as many in one call as there are."""

from __future__ import annotations

import logging
import math

from engine.service.desk import Desk
from engine.service.held import Held
from headrace.errors import StoreFull, StoreUnavailable
from headrace.messages import Completion
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
                _finish(desk, items)
                patience.over()
                break
            except (StoreUnavailable, StoreFull) as e:
                if desk.draining.is_set():
                    log.warning("uncommitted engine=%s jobs=%d: they are run again", desk.id, len(items))
                    break
                patience.wait(e, desk.draining)


def _finish(desk: Desk, items: list[tuple[Held, Completion]]) -> None:
    states = desk.store.run(desk.ledger.finish(desk.id, [(h.leased, c) for h, c in items]))
    wasted = 0
    for (held, completion), state in zip(items, states, strict=True):
        desk.held.drop(held)
        if state == "done":
            desk.committed += 1
        else:
            wasted += completion.usage.completion_tokens
    if wasted:
        log.warning("fenced engine=%s wasted_tokens=%d", desk.id, wasted)
    for name in {c.reply_to for _, c in items}:
        if desk.store.run(desk.ledger.result_length(name)) >= desk.settings.result_bound:
            desk.full.add(name)
    desk.freed.set()
