"""Calls on result streams: what sinks and awaiting applications use. Part of `headrace.ledger.Ledger`.

One consumer group per sink. A sink's consumer name is stable, so that after a crash it finds what it had
read and not acknowledged (`unacknowledged`) before it reads on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.keys import DEFAULT_RESULTS, FIELD, Keys
from headrace.store import Arg, Call, Flow, script

#: Entries that one call acknowledges or replays.
PAGE = 500


@dataclass(frozen=True, slots=True)
class Delivered:
    """A completion, as bytes, and the entry to acknowledge once it is durable."""

    entry_id: str
    raw: bytes


class ResultCalls:
    """Result-stream calls of one lane. `name` is a job's `reply_to`, None the lane's default stream."""

    def __init__(self, keys: Keys, retention_s: int) -> None:
        self.keys, self.retention_s = keys, retention_s

    def ensure_sink(self, name: str | None, group: str) -> Call[int]:
        """Make the sink's group, from the stream's first entry; standing groups are left alone."""
        args: tuple[Arg, ...] = (group, self._expiry(name))
        return Call(int, script("ensure_group"), (self.keys.results(name),), args)

    def read_results(
        self, name: str | None, group: str, consumer: str, count: int, block_ms: int
    ) -> Call[list[Delivered]]:
        """Up to `count` completions not read before, after at most `block_ms` (at least 1)."""
        stream = self.keys.results(name)
        command = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "BLOCK", block_ms)
        return Call(_delivered, None, (), (*command, "STREAMS", stream, ">"), "once")

    def unacknowledged(self, name: str | None, group: str, consumer: str) -> Flow[list[Delivered]]:
        """What the consumer read and has not acknowledged, oldest first."""
        out: list[Delivered] = []
        after = "-"
        while after:
            keys = (self.keys.results(name), self.keys.attempts)
            args = (group, consumer, after, PAGE, FIELD)
            rows, last, _ = yield Call(lambda r: r, script("mine"), keys, args)
            out += [Delivered(entry.decode(), raw) for entry, raw, _, _ in rows]
            after = f"({last.decode()}" if last else ""
        return out

    def ack_results(self, name: str | None, group: str, entry_ids: Sequence[str]) -> Flow[int]:
        """Acknowledge; entries that all groups have acknowledged are deleted. Returns how many were."""
        n = 0
        for i in range(0, len(entry_ids), PAGE):
            args: tuple[Arg, ...] = (group, self._expiry(name), *entry_ids[i : i + PAGE])
            n += yield Call(int, script("ack_results"), (self.keys.results(name),), args)
        return n

    def _expiry(self, name: str | None) -> int:
        """An empty stream of a run goes when its counters do; the lane's own stays."""
        return 0 if name in (None, DEFAULT_RESULTS) else self.retention_s

    def result_length(self, name: str | None) -> Call[int]:
        """Completions in the stream that some sink has yet to take."""
        return Call(int, None, (), ("XLEN", self.keys.results(name)))

    def result_lag(self, name: str | None, group: str) -> Call[int]:
        """Completions that the sink has not read, or read and not acknowledged. No group: all of them."""
        return Call(int, script("lag"), (self.keys.results(name),), (group,))

    def kept(self, job_id: str) -> Call[bytes | None]:
        """The completion of a job that an application awaits, for a while after its end."""
        return Call(lambda raw: raw, None, (), ("GET", self.keys.kept(job_id)))

    def read_replies(self, name: str, after: str, block_ms: int) -> Call[list[Delivered]]:
        """Completions of an application's own stream after an entry; at most `block_ms` (at least 1) long."""
        command = ("XREAD", "COUNT", PAGE, "BLOCK", block_ms, "STREAMS", self.keys.results(name), after)
        return Call(_delivered, None, (), command, "once")

    def drop_replies(self, name: str, entry_ids: Sequence[str]) -> Call[int]:
        """Delete what an application has taken from its own stream."""
        return Call(int, None, (), ("XDEL", self.keys.results(name), *entry_ids))


def _delivered(reply: Any) -> list[Delivered]:
    return [
        Delivered(entry.decode(), body.get(FIELD.encode(), b""))
        for _, entries in (reply or ())
        for entry, body in entries
        if body is not None
    ]
