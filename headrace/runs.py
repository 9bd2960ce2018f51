"""Calls on runs: their counters, their total, forgetting them. Part of `headrace.ledger.Ledger`.

A run is the jobs that were submitted under one name. Its marks (job id -> state) are what makes submits
and ends happen once; its counters are moved by the same scripts that move the marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.keys import Keys
from headrace.store import Call, Flow, script

#: Jobs that one page of `forget_run` looks at.
PAGE = 1000


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


class RunCalls:
    """Run calls of one lane."""

    keys: Keys

    def progress(self, run: str) -> Call[RunProgress]:
        return Call(_progress, None, (), ("HGETALL", self.keys.run(run)))

    def mark(self, run: str, job_id: str) -> Call[str | None]:
        """A job's state: "q" while it is queued or runs, "x" where it was forgotten, else how it ended."""
        args = ("HGET", self.keys.marks(run), job_id)
        return Call(lambda mark: mark.decode() if mark else None, None, (), args)

    def set_total(self, run: str, total: int) -> Call[int]:
        """Say how many rows the run has in all."""
        return Call(int, None, (), ("HSET", self.keys.run(run), "total", total))

    def drop_marks(self, run: str, job_ids: Sequence[str]) -> Call[int]:
        """Forget that jobs ended, for a producer that knows it from its output and never submits them again:
        the marks of a run of any length then cost nothing. The counters stay."""
        return Call(int, None, (), ("HDEL", self.keys.marks(run), *job_ids))

    def forget_run(self, run: str) -> Flow[None]:
        """Forget a run, so that its rows can be submitted again. What is still queued of it is run in vain:
        its end is dropped without a completion. Completions that no sink has read yet stay readable."""
        keys = (self.keys.marks(run), self.keys.run(run), self.keys.runs, self.keys.cancels)
        cursor = "0"
        while True:
            cursor = yield Call(bytes.decode, script("forget"), keys, (run, cursor, PAGE))
            if cursor == "0":
                return


def _progress(reply: dict[bytes, bytes]) -> RunProgress:
    counters: dict[str, Any] = {k.decode(): int(v) for k, v in reply.items()}
    return RunProgress(**{k: v for k, v in counters.items() if k in RunProgress.__slots__})
