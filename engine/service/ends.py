"""How finished jobs leave an engine: ended, tried again, or ended as what somebody made of them meanwhile.

Called by the commit thread, which keeps what cannot be sent yet; every call here may be made again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.service.desk import Desk
from engine.service.held import Held
from engine.service.jobs import ended_early
from headrace.keys import REPLY_PREFIX
from headrace.messages import Completion, Status

log = logging.getLogger("headrace.engine")

Ended = tuple[Held, Completion]


def end(desk: Desk, items: Sequence[Ended]) -> None:
    """Commit jobs, and forget them once the server has. Raises StoreError, and then nothing is forgotten."""
    again = [item for item in items if desk.jobs.again(*item)]
    for held, _ in again:
        deadline = held.job.deadline if held.job is not None else None
        within_s = None if deadline is None else deadline - desk.clock.now()
        desk.store.run(desk.ledger.retry(desk.id, held.leased, within_s))
    last = [item for item in items if not desk.jobs.again(*item)]
    states = _finish(desk, last)
    asked = [i for i, state in enumerate(states) if state == "cancelled"]
    for i in asked:  # while the last tokens were on their way here
        held, done = last[i]
        last[i] = held, ended_early(done, Status.CANCELLED, "cancelled", "the job was cancelled while it ran")
    for i, state in zip(asked, _finish(desk, [last[i] for i in asked]), strict=True):
        states[i] = state
    wasted = 0
    for (held, completion), state in zip(last, states, strict=True):
        desk.held.drop(held)
        if state == "done":
            desk.committed += 1
        else:
            wasted += completion.usage.completion_tokens
    for held, _ in again:
        desk.held.drop(held)
    if wasted:
        log.warning("fenced engine=%s wasted_tokens=%d", desk.id, wasted)
    desk.freed.set()


def note_full_results(desk: Desk, items: Sequence[Ended]) -> None:
    """Runs whose result stream is at its bound are leased no more until a sink has taken from it."""
    for name in {c.reply_to for _, c in items}:
        if (name or "").startswith(REPLY_PREFIX):
            continue  # an application's own: it expires, and must not hold up a run that others share
        if desk.store.run(desk.ledger.result_length(name)) >= desk.settings.result_bound:
            runs = {c.run for _, c in items if c.reply_to == name}
            desk.full[name] = desk.full.get(name, frozenset()) | runs


def _finish(desk: Desk, items: Sequence[Ended]) -> list[str]:
    letters = {h.leased.entry_id: letter for h, c in items if (letter := desk.jobs.letter(h, c)) is not None}
    return desk.store.run(desk.ledger.finish(desk.id, [(h.leased, c) for h, c in items], letters))
