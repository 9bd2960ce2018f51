"""The commit thread: from finished requests to fenced completions, as many in one call as there are."""

from __future__ import annotations

import logging
import math

from engine.service.desk import Desk
from engine.service.held import Held
from engine.service.jobs import ended_early
from headrace.errors import StoreFull, StoreUnavailable
from headrace.keys import REPLY_PREFIX
from headrace.messages import Completion, Status
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
    for held, completion in items:
        if desk.jobs.again(held, completion):
            deadline = held.job.deadline if held.job is not None else None
            within = None if deadline is None else deadline - desk.clock.now()
            desk.store.run(desk.ledger.retry(desk.id, held.leased, within))
            desk.held.drop(held)
    items = [(held, c) for held, c in items if not desk.jobs.again(held, c)]
    states = _send(desk, items)
    asked = [i for i, state in enumerate(states) if state == "cancelled"]
    for i in asked:  # while the last tokens were on their way here
        held, c = items[i]
        items[i] = held, ended_early(c, Status.CANCELLED, "cancelled", "the job was cancelled while it ran")
    for i, state in zip(asked, _send(desk, [items[i] for i in asked]), strict=True):
        states[i] = state
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
        if (name or "").startswith(REPLY_PREFIX):
            continue  # an application's own: it expires, and must not hold up a run that others share
        if desk.store.run(desk.ledger.result_length(name)) >= desk.settings.result_bound:
            runs = {c.run for _, c in items if c.reply_to == name}
            desk.full[name] = desk.full.get(name, frozenset()) | runs
    desk.freed.set()


def _send(desk: Desk, items: list[tuple[Held, Completion]]) -> list[str]:
    letters = {h.leased.entry_id: letter for h, c in items if (letter := desk.jobs.letter(h, c)) is not None}
    return desk.store.run(desk.ledger.finish(desk.id, [(h.leased, c) for h, c in items], letters))
