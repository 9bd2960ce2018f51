"""The only code that changes queue state. Every method builds a `Call` or a `Flow`; a store runs it.

    submit -> lease -> (renew)* -> finish          one job, in order
                    -> release | reclaim           back to the queue, for anyone

The fence: a consumer's name is unique to one engine boot, so "the pending list still names me" is the
proof that a lease stands, and every script that changes a leased job asks for it first. Every call may be
made again after a lost reply. Each script is described in its own file; `docs/wire.md` has the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.errors import StoreError
from headrace.keys import FIELD, FORGOTTEN, FREE, GROUP, QUEUED, REPLY_PREFIX, Keys
from headrace.messages import Completion, Job, Priority
from headrace.results import ResultCalls
from headrace.store import Call, Flow, script

#: Items in one script call: a script blocks the server while it runs.
BATCH = 200
#: Jobs of one run that a page of `forget_run` looks at.
PAGE = 1000
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


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Counters of a run. `total` is known once its producer has read all its input."""

    submitted: int = 0
    ok: int = 0
    error: int = 0
    expired: int = 0
    cancelled: int = 0
    dead: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    total: int | None = None

    @property
    def ended(self) -> int:
        return self.ok + self.error + self.expired + self.cancelled + self.dead

    @property
    def finished(self) -> bool:
        """Whether every row of the run has its completion."""
        return self.total is not None and self.ended >= self.total


class Ledger(ResultCalls):
    """Calls on one lane."""

    def __init__(self, lane: str, retention_s: int = RETENTION_S) -> None:
        super().__init__(Keys(lane))
        self.lane = lane
        self.retention_s = retention_s
        self._streams = tuple(self.keys.jobs(p) for p in PRIORITIES)

    # -- producers -------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], bound: int) -> Flow[list[str]]:
        """Accept jobs. One word each, in order: "new", "queued" (accepted before), the status it ended
        with, or "full" (the lane holds `bound` jobs: wait and offer it again)."""
        states: list[str] = []
        for part in _batches(jobs):
            runs = list(dict.fromkeys(job.run for job in part))
            keys = [*self._streams, self.keys.runs]
            for run in runs:
                keys += (self.keys.marks(run), self.keys.run(run))
            args: list[Any] = [GROUP, FIELD, bound, self.retention_s, len(runs), *runs]
            for job in part:
                args += (
                    job.id,
                    PRIORITIES.index(job.priority) + 1,
                    runs.index(job.run) + 1,
                    job.to_bytes(),
                )
            states += yield Call(_words, script("submit"), tuple(keys), tuple(args))
        return states

    def reject(self, completions: Sequence[Completion]) -> Flow[list[str]]:
        """End rows that could not become jobs. "done" or "duplicate" each."""
        states: list[str] = []
        for part in _batches(completions):
            keys, args = [self.keys.runs], [FIELD, self.retention_s]
            for c in part:
                keys += (self.keys.marks(c.run), self.keys.run(c.run), self.keys.results(c.reply_to))
                args += (c.id, c.run, c.status.value, c.to_bytes())
            states += yield Call(_words, script("reject"), tuple(keys), tuple(args))
        return states

    def progress(self, run: str) -> Call[RunProgress]:
        return Call(_progress, None, (), ("HGETALL", self.keys.run(run)))

    def set_total(self, run: str, total: int) -> Call[Any]:
        """Say how many rows the run has in all."""
        return Call(_same, None, (), ("HSET", self.keys.run(run), "total", total))

    def forget_run(self, run: str) -> Flow[None]:
        """Forget a run, so that its rows can be submitted again. What is still queued of it is run in vain:
        its end is dropped without a completion."""
        marks, cursor = self.keys.marks(run), 0
        while True:
            reply = yield Call(_same, None, (), ("HSCAN", marks, cursor, "COUNT", PAGE))
            cursor, page = reply
            for job, mark in page.items():
                if mark == QUEUED.encode():
                    yield Call(_same, None, (), ("HSET", marks, job, FORGOTTEN))
                elif mark != FORGOTTEN.encode():
                    yield Call(_same, None, (), ("HDEL", marks, job))
            if cursor == 0:
                break
        yield Call(_same, None, (), ("DEL", self.keys.run(run)))
        yield Call(_same, None, (), ("ZREM", self.keys.runs, run))

    # -- engines ---------------------------------------------------------------------------------

    def lease(self, consumer: str, count: int) -> Call[list[Leased]]:
        """Up to `count` jobs, at once: released ones first, then by priority. Never sent twice; when its
        reply is lost, what it handed over is in `held_by`."""

        def parse(reply: Any) -> list[Leased]:
            return [Leased(self._streams[s - 1], _str(e), raw, int(failed)) for s, e, raw, failed in reply]

        keys = (*self._streams, self.keys.attempts)
        return Call(parse, script("lease"), keys, (GROUP, consumer, FREE, count, FIELD), "once")

    def wait_for_jobs(self, consumer: str, count: int, block_ms: int) -> Flow[list[Leased]]:
        """Like `lease`, for a consumer with nothing to do: blocks up to `block_ms` until a job is submitted.
        Up to `count` of each priority; sees no released jobs."""
        command = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "BLOCK", block_ms, "STREAMS")
        try:
            return (
                yield Call(
                    _entries, None, (), (*command, *self._streams, *[">"] * len(self._streams)), "once"
                )
            )
        except StoreError as e:
            if "NOGROUP" in str(e):  # the server lost its data; the next lease makes the groups again
                return []
            raise

    def held_by(self, consumer: str) -> Flow[list[Leased]]:
        """All that is pending for a consumer, leases unchanged: what a lost reply handed over."""
        held: list[Leased] = []
        for stream in self._streams:
            after = "-"
            while after:
                keys, args = (stream, self.keys.attempts), (GROUP, consumer, after, BATCH, FIELD)
                rows, last, _ = yield Call(_same, script("mine"), keys, args)
                held += [Leased(stream, _str(e), raw, int(n)) for e, raw, n in rows]
                after = f"({_str(last)}" if last else ""
        return held

    def renew(self, consumer: str, leased: Sequence[Leased]) -> Flow[list[Leased]]:
        """Prolong leases; returns those that are lost, whose work should stop."""
        lost: list[Leased] = []
        for part in _batches(leased):
            keys = tuple(one.stream for one in part)
            args = (GROUP, consumer, *(one.entry_id for one in part))
            numbers = yield Call(_same, script("renew"), keys, args, "renewal")
            lost += [part[n - 1] for n in numbers]
        return lost

    def finish(self, consumer: str, items: Sequence[tuple[Leased, Completion]]) -> Flow[list[str]]:
        """End jobs: "done"; "fenced" (the lease is another's now) or "duplicate" (it had ended before), where
        the completion is dropped."""
        states: list[str] = []
        for part in _batches(items):
            keys = [self.keys.attempts, self.keys.runs]
            args: list[Any] = [GROUP, consumer, FIELD, self.retention_s, KEEP_S]
            for one, c in part:
                keys += (
                    one.stream,
                    self.keys.marks(c.run),
                    self.keys.run(c.run),
                    self.keys.results(c.reply_to),
                    self.keys.kept(c.id),
                )
                usage = c.usage
                keep = "1" if (c.reply_to or "").startswith(REPLY_PREFIX) else "0"
                args += (one.entry_id, c.id, c.run, c.status.value, usage.prompt_tokens)
                args += (usage.cached_tokens, usage.completion_tokens, keep, c.to_bytes())
            states += yield Call(_words, script("finish"), tuple(keys), tuple(args))
        return states

    def release(self, consumer: str, leased: Sequence[Leased], failed: bool = False) -> Flow[int]:
        """Hand jobs back; the next lease gets them first. `failed` counts the delivery as a failed one (a
        rank died under it); a drain does not. Returns how many were still held."""
        n = 0
        for part in _batches(leased):
            keys = (self.keys.attempts, *(one.stream for one in part))
            args = (GROUP, consumer, FREE, int(failed), *(one.entry_id for one in part))
            n += yield Call(int, script("release"), keys, args)
        return n

    def reclaim(
        self, consumer: str, priority: Priority, min_idle_ms: int, cursor: str, count: int
    ) -> Call[Page]:
        """One page of leases of that priority which ran out, now held by `consumer`."""
        stream = self.keys.jobs(priority)

        def parse(reply: Any) -> Page:
            rows = [Leased(stream, _str(e), raw, int(n)) for e, raw, n in reply[1]]
            return Page(_str(reply[0]), rows, int(reply[2]))

        keys = (stream, self.keys.attempts)
        args = (GROUP, consumer, min_idle_ms, cursor, count, FIELD)
        return Call(parse, script("reclaim"), keys, args, "once")

    def release_dead(self, dead: str) -> Flow[int]:
        """Hand back all that a consumer holds which is known to be dead, and remove it."""
        n = 0
        for stream in self._streams:
            while True:
                args = (GROUP, dead, FREE, BATCH)
                page = yield Call(int, script("takeover"), (stream, self.keys.attempts), args)
                n += page
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


def _batches(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _same(reply: Any) -> Any:
    return reply


def _str(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _words(reply: Any) -> list[str]:
    return [_str(word) for word in reply]


def _progress(reply: Any) -> RunProgress:
    counters = {_str(k): int(v) for k, v in reply.items()}
    return RunProgress(**{k: v for k, v in counters.items() if k in RunProgress.__slots__})


def _entries(reply: Any) -> list[Leased]:
    """XREADGROUP's reply; a body without the field is handed over empty, to be refused by its reader."""
    return [
        Leased(_str(stream), _str(entry), body.get(FIELD.encode(), b""))
        for stream, entries in (reply or ())
        for entry, body in entries
        if body is not None
    ]
