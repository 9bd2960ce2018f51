"""Calls on leases: handing jobs to engines, prolonging, taking back. Part of `headrace.ledger.Ledger`.

    waiting -> leased -> ended                     one job, in order (`finish` is in `headrace.ledger`)
                      -> later -> waiting          `release`: a drain, a retry, a job for a newer engine
                      -> suspect -> leased         `crashed`: its engine or a rank died under it

The fence: a consumer's name is unique to one engine boot, so "the pending list still names me" is the
proof that a lease stands, and every script that changes a leased job asks for it first.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from headrace.connection import MAX_BLOCK_MS
from headrace.keys import FIELD, GROUP, Keys
from headrace.messages import Priority
from headrace.parts import BATCH, BATCH_BYTES, as_is, parts, text, words
from headrace.store import Arg, Call, Flow, script

log = logging.getLogger("headrace.ledger")

PRIORITIES = tuple(Priority)
#: Shares of a lane's tokens where all priorities wait: 16 to 4 to 1.
WEIGHTS = (16, 4, 1)
#: Crashes after which a job that was alone in the last one is proven to be their cause. One is not enough: a
#: machine that fails, or an operator's kill, would condemn whatever happened to run alone.
PROOF = 2
#: Seconds of the first and the longest wait before a retry; the wait is drawn between 0 and the limit, which
#: doubles (full jitter).
RETRY_S, LONGEST_RETRY_S = 1.0, 300.0
#: Seconds until a job of a newer version is shown to engines again.
HOLD_S = 30.0
#: Expired leases that one sweep takes from each stream.
SWEEP = 1000


@dataclass(frozen=True, slots=True)
class Attempts:
    """Earlier deliveries of a job by how they failed, as the server keeps them: "CRASHES ERRORS RELEASES
    PROVEN CRASH". `crash` is the entry of the last crash in the lane's crash stream."""

    crashes: int = 0
    errors: int = 0
    releases: int = 0
    proven: bool = False
    crash: str = "-"

    @classmethod
    def parse(cls, raw: bytes) -> Attempts:
        if not raw:
            return _NONE
        crashes, errors, releases, proven, crash = raw.decode().split()
        return cls(int(crashes), int(errors), int(releases), proven == "1", crash)


_NONE = Attempts()


@dataclass(frozen=True, slots=True)
class Leased:
    """A job that a consumer holds. `cancelled`: somebody asked for its end before it was leased."""

    stream: str
    entry_id: str
    raw: bytes
    attempts: Attempts = _NONE
    cancelled: bool = False

    @property
    def failed(self) -> int:
        """Deliveries that ended in a crash, an expired lease or an error."""
        return self.attempts.crashes + self.attempts.errors

    @property
    def suspect(self) -> bool:
        """Whether it was in flight when an engine or a rank died, and must run beside no other job."""
        return self.attempts.crashes > 0 and not self.attempts.proven


class LeaseCalls:
    """Lease calls of one lane."""

    keys: Keys
    lane: str
    _streams: tuple[str, ...]

    def lease(self, consumer: str, count: int, blocked: Collection[str] = ()) -> Flow[list[Leased]]:
        """Up to `count` jobs, at once; none of the runs in `blocked`.

        A consumer that holds nothing is given a group of suspects first, where one waits, and nothing else
        with it: it should ask for more only when they have ended. Everybody else gets jobs by priority (16
        to 4 to 1, in estimated tokens), within one by tenant and run (least served first), within a run in
        submit order. Never sent twice; when its reply is lost, what it handed over is in `held_by`.
        """
        args: tuple[Arg, ...] = (GROUP, consumer, count, FIELD, BATCH_BYTES, *WEIGHTS, *blocked)
        keys = (*self._streams, self.keys.attempts, self.keys.later, self.keys.suspects, self.keys.shares)
        reply = yield Call(as_is, script("lease"), (*keys, self.keys.cancels), args, "once")
        made, ghosts, cancels, rows = reply
        if made:  # at an engine's first start, and after the server lost its data
            log.warning("queue_groups_made lane=%s streams=%d", self.lane, made)
        report_ghosts(self.lane, ghosts)
        return (yield from self._with_payloads(rows, cancels))

    def wait_for_jobs(
        self, consumer: str, count: int, block_ms: int, blocked: Collection[str] = ()
    ) -> Flow[list[Leased]]:
        """Like `lease`, for a consumer with nothing to do: waits up to `block_ms` (1 to 1000) for a submit.

        It waits with XREAD, which hands nothing over, from where the streams stood before a look for jobs: a
        reply that is lost costs no lease, and no submit is missed. Does not wake for released jobs; the next
        `lease` finds them.
        """
        positions = yield Call(words, script("position"), self._streams, (GROUP,))
        if leased := (yield from self.lease(consumer, count, blocked)):
            return leased
        block = min(max(block_ms, 1), MAX_BLOCK_MS)  # 0 would block for ever
        command = ("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *self._streams, *positions)
        if not (yield Call(bool, None, (), command, "once")):
            return []
        return (yield from self.lease(consumer, count, blocked))

    def held_by(self, consumer: str) -> Flow[list[Leased]]:
        """All that is pending for a consumer, leases unchanged: what a lost reply handed over."""
        held: list[Leased] = []
        for number, stream in enumerate(self._streams, start=1):
            after = "-"
            while after:
                keys, args = (stream, self.keys.attempts), (GROUP, consumer, after, BATCH, FIELD)
                rows, last, ghosts = yield Call(as_is, script("mine"), keys, args)
                report_ghosts(self.lane, ghosts)
                held += yield from self._with_payloads([(number, *row) for row in rows], cancels=1)
                after = f"({text(last)}" if last else ""
        return held

    def renew(self, consumer: str, leased: Sequence[Leased]) -> Flow[list[Leased]]:
        """Prolong leases; returns those that are lost, whose work should stop."""
        lost: list[Leased] = []
        for part in parts(leased):
            keys = tuple(one.stream for one in part)
            args = (GROUP, consumer, *(one.entry_id for one in part))
            numbers = yield Call(as_is, script("renew"), keys, args, "renewal")
            lost += [part[n - 1] for n in numbers]
        return lost

    def release(self, consumer: str, leased: Sequence[Leased]) -> Flow[int]:
        """Hand jobs back, as a drain does; they keep their places. Returns how many were still held."""
        return (yield from self._release(consumer, leased, 0, "released"))

    def retry(self, consumer: str, leased: Leased, within_s: float | None = None) -> Flow[int]:
        """Hand a job back that failed, to be tried again after a wait that the server keeps, at most
        `within_s` long (a deadline goes before a retry)."""
        limit = min(LONGEST_RETRY_S, RETRY_S * 2**leased.attempts.errors)
        wait = min(random.uniform(0, limit), _seconds(within_s))
        return (yield from self._release(consumer, [leased], max(1, int(wait * 1000)), "error"))

    def hold(self, consumer: str, leased: Sequence[Leased]) -> Flow[int]:
        """Hand jobs back that only a newer engine can read. They are offered again every half minute."""
        return (yield from self._release(consumer, leased, int(HOLD_S * 1000), "held"))

    def _release(self, consumer: str, leased: Sequence[Leased], delay_ms: int, cause: str) -> Flow[int]:
        n = 0
        for part in parts(leased):
            args: list[Any] = [GROUP, consumer, delay_ms, cause]
            for one in part:
                args += (self._number(one.stream), one.entry_id)
            keys = (*self._streams, self.keys.attempts, self.keys.later, self.keys.suspects)
            n += yield Call(int, script("release"), keys, tuple(args))
        return n

    def crashed(self, consumer: str, leased: Sequence[Leased], evidence: Mapping[str, Any]) -> Flow[int]:
        """A rank died under these jobs: they become suspects, to be run in halves until its cause is alone.

        `evidence`: what is known of the death (rank, traceback, build); kept for a job that turns out to be
        the cause. Returns how many were still held.
        """
        entries = [(self._number(one.stream), one.entry_id) for one in leased]
        return (yield self._crash(consumer, entries, 0, evidence))

    def release_dead(self, dead: str, evidence: Mapping[str, Any] | None = None) -> Flow[int]:
        """All that a consumer holds which is known to be dead becomes suspect, at once; then the consumer is
        removed. Returns how many jobs that were."""
        held = yield from self.held_by(dead)
        n = yield from self.crashed(dead, held, evidence or {"engine": dead, "error": "the engine died"})
        yield from self.leave(dead)
        return n

    def reclaim(self, min_idle_ms: int) -> Flow[int]:
        """Leases that were not renewed for that long: their jobs become suspects, together with what else
        their engine lost. Returns how many."""
        args = (GROUP, min_idle_ms, SWEEP)
        found = yield Call(as_is, script("expired"), self._streams, args)
        by_owner: dict[str, list[tuple[int, str]]] = {}
        for number, entry, owner in found:
            by_owner.setdefault(text(owner), []).append((number, text(entry)))
        n = 0
        for owner, entries in by_owner.items():
            error = f"leases were not renewed for {min_idle_ms / 1000:g} s"
            n += yield self._crash(owner, entries, min_idle_ms, {"engine": owner, "error": error})
        return n

    def _crash(
        self, consumer: str, entries: Sequence[tuple[int, str]], idle_ms: int, evidence: Mapping[str, Any]
    ) -> Call[int]:
        """One call for all, however many: halves of a page would not be halves."""

        def parse(reply: Any) -> int:
            report_ghosts(self.lane, reply[1])
            return int(reply[0])

        keys = (*self._streams, self.keys.attempts, self.keys.later, self.keys.suspects, self.keys.crashes)
        args: list[Any] = [GROUP, consumer, idle_ms, orjson.dumps(dict(evidence)), PROOF]
        for number, entry in entries:
            args += (number, entry)
        return Call(parse, script("crash"), keys, tuple(args))

    def suspect_groups(self) -> Call[int]:
        """Groups of suspects that wait for an engine that holds nothing."""
        return Call(int, None, (), ("LLEN", self.keys.suspects))

    def heal(self) -> Call[int]:
        """Find jobs that nothing would hand out any more, because a key was deleted by hand. Returns how many
        jobs were put back into lists."""

        def parse(put: Any) -> int:
            if put >= 0:
                log.error("index_made_again lane=%s jobs=%d", self.lane, put)
            return max(0, int(put))

        return Call(parse, script("heal"), (*self._streams, self.keys.later, self.keys.suspects), (GROUP,))

    def leave(self, consumer: str) -> Flow[None]:
        """Remove a consumer that holds nothing, and its heartbeat."""
        yield Call(int, script("leave"), self._streams, (GROUP, consumer))
        yield Call(as_is, None, (), ("HDEL", self.keys.engines, consumer))

    def _number(self, stream: str) -> int:
        return self._streams.index(stream) + 1

    def _with_payloads(self, rows: Sequence[Sequence[Any]], cancels: int) -> Flow[list[Leased]]:
        """Rows of a script as leased jobs: large payloads are fetched one by one, so that no reply is larger
        than a batch of small ones."""
        leased = []
        for number, entry, raw, attempts, apart in rows:
            stream, entry_id = self._streams[number - 1], text(entry)
            if apart:
                raw = (yield Call(as_is, None, (), ("GET", f"{stream}#{entry_id}"))) or b""
            leased.append(Leased(stream, entry_id, raw, Attempts.parse(attempts)))
        if not cancels or not leased:
            return leased
        asked = yield self.cancelled()
        return [replace(one, cancelled=True) if asked and _named(one.raw, asked) else one for one in leased]

    def cancelled(self) -> Call[frozenset[str]]:
        """What is being cancelled: "RUN" and "RUN ID" each."""
        args = ("ZRANGE", self.keys.cancels, 0, -1)
        return Call(lambda members: frozenset(words(members)), None, (), args)


def _named(raw: bytes, asked: Collection[str]) -> bool:
    try:
        job = orjson.loads(raw)
        return job["run"] in asked or f"{job['run']} {job['id']}" in asked
    except (orjson.JSONDecodeError, KeyError, TypeError):  # no job: the engine says so
        return False


def _seconds(seconds: float | None) -> float:
    return float("inf") if seconds is None else max(0.0, seconds)


def report_ghosts(lane: str, ghosts: int) -> None:
    if ghosts:
        # Deleted by somebody else than the ledger, so nobody can say which jobs they were.
        log.error("lost_payloads lane=%s entries=%d", lane, ghosts)
