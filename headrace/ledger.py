"""The only code that changes queue state. Every method builds a `Call` or a `Flow`; a store runs it.

    submit -> lease -> (renew)* -> finish          one job, in order
                    -> release | reclaim           back to the queue, for anyone

The fence: a consumer's name is unique to one engine boot, so "the pending list still names me" is the
proof that a lease stands, and every script that changes a leased job asks for it first. Every call may be
made again after a lost reply. Each script is described in its own file; `docs/wire.md` has the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.connection import MAX_BLOCK_MS
from headrace.errors import InvalidJob, StoreFull
from headrace.keys import FIELD, FREE, GROUP, REPLY_PREFIX, Keys
from headrace.messages import Completion, Job, Priority
from headrace.results import ResultCalls
from headrace.runs import RunCalls, RunProgress
from headrace.store import AsyncStore, Call, Flow, Store, script

__all__ = ["AsyncStore", "Leased", "Ledger", "Page", "RunProgress", "Store"]

log = logging.getLogger("headrace.ledger")

#: Items in one script call, and bytes of payload in it: a script blocks the server while it runs.
BATCH, BATCH_BYTES = 200, 4 << 20
#: Seconds that a run's marks and counters outlive its last change.
RETENTION_S = 7 * 86_400
#: Seconds that an answer for an awaiting application is kept.
KEEP_S = 3600
PRIORITIES = tuple(Priority)


@dataclass(frozen=True, slots=True)
class Leased:
    """A job that a consumer holds. `failed`: deliveries of it that ended in a death or an expired lease."""

    stream: str
    entry_id: str
    raw: bytes
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Leases taken over by one sweep call; sweep on from `cursor` until it is "0-0"."""

    cursor: str
    leased: list[Leased]
    ghosts: int  # entries that were pending but no longer in the stream


class Ledger(ResultCalls, RunCalls):
    """Calls on one lane."""

    def __init__(self, lane: str, retention_s: int = RETENTION_S) -> None:
        super().__init__(Keys(lane))
        self.lane = lane
        self.retention_s = retention_s
        self._streams = tuple(self.keys.jobs(p) for p in PRIORITIES)

    # -- producers -------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], bound: int) -> Flow[list[str]]:
        """Accept jobs. One word each, in order: "new", "queued" (accepted before), the status it ended
        with, or "full": the lane holds `bound` jobs as urgent as this one or more, or the server is at its
        maxmemory; wait and offer it again. Raises InvalidJob for a job of another lane."""
        for job in jobs:
            if job.lane != self.lane:
                raise InvalidJob(f"job {job.id} is for lane {job.lane}, not {self.lane}: submit it there")
        states: list[str] = []
        for part in _batches([(job, job.to_bytes()) for job in jobs]):
            runs = _numbered(job.run for job, _ in part)
            keys = [*self._streams, self.keys.runs]
            for run in runs:
                keys += (self.keys.marks(run), self.keys.run(run))
            args: list[Any] = [GROUP, FIELD, bound, self.retention_s, len(runs), *runs]
            for job, raw in part:
                args += (job.id, _STREAM_NO[job.priority], runs[job.run], raw)
            try:
                states += yield Call(_words, script("submit"), tuple(keys), tuple(args))
            except StoreFull:
                states += ["full"] * len(part)
        return states

    def reject(self, completions: Sequence[Completion]) -> Flow[list[str]]:
        """End rows that could not become jobs. "done" or "duplicate" each."""
        states: list[str] = []
        for part in _batches([(c, c.to_bytes()) for c in completions]):
            keys: list[str] = [self.keys.runs]
            args: list[Any] = [FIELD, self.retention_s]
            for c, raw in part:
                keys += (self.keys.marks(c.run), self.keys.run(c.run), self.keys.results(c.reply_to))
                args += (c.id, c.run, c.status.value, raw)
            states += yield Call(_words, script("reject"), tuple(keys), tuple(args))
        return states

    # -- engines ---------------------------------------------------------------------------------

    def lease(self, consumer: str, count: int) -> Call[list[Leased]]:
        """Up to `count` jobs, at once: by priority, of each priority released ones first. Never sent twice;
        when its reply is lost, what it handed over is in `held_by`."""

        def parse(reply: Any) -> list[Leased]:
            made, ghosts, rows = reply
            if made:  # at an engine's first start, and after the server lost its data
                log.warning("queue_groups_made lane=%s streams=%d", self.lane, made)
            _report_ghosts(self.lane, ghosts)
            return [Leased(self._streams[s - 1], _str(e), raw, int(failed)) for s, e, raw, failed in rows]

        keys = (*self._streams, self.keys.attempts)
        return Call(parse, script("lease"), keys, (GROUP, consumer, FREE, count, FIELD), "once")

    def wait_for_jobs(self, consumer: str, count: int, block_ms: int) -> Flow[list[Leased]]:
        """Like `lease`, for a consumer with nothing to do: waits up to `block_ms` (1 to 1000) for a submit.

        It waits with XREAD, which hands nothing over, from where the group stands: a reply that is lost
        costs no lease, and an entry that came before the wait ends it at once. Does not wake for released
        jobs; the next `lease` finds them.
        """
        positions = yield Call(_words, script("position"), self._streams, (GROUP,))
        block = min(max(block_ms, 1), MAX_BLOCK_MS)  # 0 would block for ever
        command: tuple[Any, ...] = (
            "XREAD",
            "COUNT",
            1,
            "BLOCK",
            block,
            "STREAMS",
            *self._streams,
            *positions,
        )
        if not (yield Call(bool, None, (), command, "once")):
            return []
        return (yield self.lease(consumer, count))

    def held_by(self, consumer: str) -> Flow[list[Leased]]:
        """All that is pending for a consumer, leases unchanged: what a lost reply handed over."""
        held: list[Leased] = []
        for stream in self._streams:
            after = "-"
            while after:
                keys, args = (stream, self.keys.attempts), (GROUP, consumer, after, BATCH, FIELD)
                rows, last, ghosts = yield Call(_same, script("mine"), keys, args)
                _report_ghosts(self.lane, ghosts)
                held += [Leased(stream, _str(e), raw, int(n)) for e, raw, n in rows]
                after = f"({_str(last)}" if last else ""
        return held

    def renew(self, consumer: str, leased: Sequence[Leased]) -> Flow[list[Leased]]:
        """Prolong leases; returns those that are lost, whose work should stop."""
        lost: list[Leased] = []
        for part in _parts(leased):
            keys = tuple(one.stream for one in part)
            args = (GROUP, consumer, *(one.entry_id for one in part))
            numbers = yield Call(_same, script("renew"), keys, args, "renewal")
            lost += [part[n - 1] for n in numbers]
        return lost

    def finish(self, consumer: str, items: Sequence[tuple[Leased, Completion]]) -> Flow[list[str]]:
        """End jobs. One word each: "done"; or the completion is dropped, because of "fenced" (the lease is
        another's now), "duplicate" (the job had ended before) or "forgotten" (`forget_run`)."""
        states: list[str] = []
        for part in _batches([(one, c, c.to_bytes()) for one, c in items]):
            streams = _numbered(one.stream for one, _, _ in part)
            runs = _numbered(c.run for _, c, _ in part)
            results = _numbered(self.keys.results(c.reply_to) for _, c, _ in part)
            kept = _numbered(c.id for _, c, _ in part if (c.reply_to or "").startswith(REPLY_PREFIX))
            keys = [self.keys.attempts, self.keys.runs, *streams]
            for run in runs:
                keys += (self.keys.marks(run), self.keys.run(run))
            keys += [*results, *map(self.keys.kept, kept)]
            args: list[Any] = [GROUP, consumer, FIELD, self.retention_s, KEEP_S]
            args += (len(streams), len(runs), len(results), *runs)
            for one, c, raw in part:
                usage = c.usage
                args += (streams[one.stream], one.entry_id, runs[c.run], c.id, c.status.value)
                args += (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
                args += (results[self.keys.results(c.reply_to)], kept.get(c.id, 0), raw)
            states += yield Call(_words, script("finish"), tuple(keys), tuple(args))
        return states

    def release(self, consumer: str, leased: Sequence[Leased], failed: bool = False) -> Flow[int]:
        """Hand jobs back; the next lease gets them first. `failed` counts the delivery as a failed one (a
        rank died under it); a drain does not. Returns how many were still held."""
        n = 0
        for part in _parts(leased):
            keys = (self.keys.attempts, *(one.stream for one in part))
            args: tuple[Any, ...] = (GROUP, consumer, FREE, int(failed), *(one.entry_id for one in part))
            n += yield Call(int, script("release"), keys, args)
        return n

    def reclaim(
        self, consumer: str, priority: Priority, min_idle_ms: int, cursor: str, count: int
    ) -> Call[Page]:
        """One page of leases of that priority which ran out, now held by `consumer`. Sweep on from the page's
        cursor. Entries that the caller holds may be among them where their renewal is late."""
        stream = self.keys.jobs(priority)

        def parse(reply: Any) -> Page:
            _report_ghosts(self.lane, reply[2])
            rows = [Leased(stream, _str(e), raw, int(n)) for e, raw, n in reply[1]]
            return Page(_str(reply[0]), rows, int(reply[2]))

        keys = (stream, self.keys.attempts)
        args = (GROUP, consumer, min_idle_ms, cursor, count, FIELD, FREE)
        return Call(parse, script("reclaim"), keys, args, "once")

    def release_dead(self, dead: str) -> Flow[int]:
        """Hand back all that a consumer holds which is known to be dead, and remove it."""
        n = 0
        for stream in self._streams:
            while True:
                args = (GROUP, dead, FREE, BATCH)
                page, moved = yield Call(_same, script("takeover"), (stream, self.keys.attempts), args)
                _report_ghosts(self.lane, page - moved)
                n += moved
                if page == 0:
                    break
        yield Call(_same, None, (), ("HDEL", self.keys.engines, dead))
        return n

    def leave(self, consumer: str) -> Flow[None]:
        """Remove a consumer that holds nothing, and its heartbeat."""
        yield Call(int, script("leave"), self._streams, (GROUP, consumer))
        yield Call(_same, None, (), ("HDEL", self.keys.engines, consumer))

    def heartbeat(self, engine: str, state: Mapping[str, Any]) -> Call[Any]:
        args = (engine, orjson.dumps(dict(state)))
        return Call(_same, script("heartbeat"), (self.keys.engines,), args, "renewal")

    def engines(self) -> Call[dict[str, dict[str, Any]]]:
        """Boot id -> {"at": unix seconds by the server's clock, "state": {...}}."""

        def parse(flat: Any) -> dict[str, dict[str, Any]]:
            return {_str(k): orjson.loads(v) for k, v in flat.items()}

        return Call(parse, None, (), ("HGETALL", self.keys.engines))

    def jobs_waiting(self) -> Flow[int]:
        """Jobs in the lane, waiting or leased."""
        n = 0
        for stream in self._streams:
            n += yield Call(int, None, (), ("XLEN", stream))
        return n


#: Number of each priority's stream in scripts.
_STREAM_NO = {priority: n for n, priority in enumerate(PRIORITIES, start=1)}


def _batches(items: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Items (payload last) in script-sized parts: a script holds the server up, and its payloads sit in
    the server's memory twice. At least one item each."""
    part: list[Any] = []
    size = 0
    for item in items:
        if part and (len(part) == BATCH or size + len(item[-1]) > BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += len(item[-1])
    if part:
        yield part


def _parts(items: Sequence[Leased]) -> Iterator[Sequence[Leased]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Each name once, in order, with its number from 1."""
    return {name: n for n, name in enumerate(dict.fromkeys(names), start=1)}


def _report_ghosts(lane: str, ghosts: int) -> None:
    if ghosts:
        # Deleted by somebody else than the ledger, so nobody can say which jobs they were.
        log.error("lost_payloads lane=%s entries=%d", lane, ghosts)


def _same(reply: Any) -> Any:
    return reply


def _str(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _words(reply: Any) -> list[str]:
    return [_str(word) for word in reply]
