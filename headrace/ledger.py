"""The only code that changes queue state. Every method builds a `Call` or a `Flow`; a store runs it.

    submit -> lease -> (renew)* -> finish          one job, in order
                    -> release | crashed           back to the queue, for anyone
           cancel ................ finish          at any time, also by whoever cancels

What is here: submitting. Leases are in `headrace.leases`, ends in `headrace.ends`, cancels in
`headrace.cancels`, dead letters in `headrace.deadletters`, runs and result streams in files of their own.
Every call may be made again after a lost reply. Each script is described in its own file; `docs/wire.md`
has the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from headrace.cancels import CancelCalls
from headrace.deadletters import DeadLetter, DeadLetterCalls
from headrace.errors import InvalidJob, StoreFull
from headrace.keys import FIELD, GROUP, Keys
from headrace.leases import PRIORITIES, Attempts, Leased
from headrace.messages import Job, Kind
from headrace.parts import BATCH, BATCH_BYTES, batches, numbered, text, words
from headrace.results import ResultCalls
from headrace.runs import RunCalls, RunProgress
from headrace.store import AsyncStore, Call, Flow, Store, script

__all__ = [
    "BATCH",
    "BATCH_BYTES",
    "AsyncStore",
    "Attempts",
    "Leased",
    "Ledger",
    "RunProgress",
    "Store",
]

#: Seconds that a run's marks and counters outlive its last change.
RETENTION_S = 7 * 86_400
#: Largest payload that stands in its stream entry; larger ones are kept beside it, so that no read of many
#: entries is a reply of many megabytes. The hard limit is `headrace.messages.MAX_JOB_BYTES`.
INLINE_BYTES = 64 << 10
#: Tokens that a chat without max_tokens is taken to make, for fairness only, and that a completion makes.
CHAT_TOKENS, COMPLETION_TOKENS = 256, 16


class Ledger(ResultCalls, RunCalls, CancelCalls, DeadLetterCalls):
    """Calls on one lane."""

    def __init__(self, lane: str, retention_s: int = RETENTION_S) -> None:
        super().__init__(Keys(lane), retention_s)
        self.lane = lane
        self._streams = tuple(self.keys.jobs(p) for p in PRIORITIES)

    def submit(self, jobs: Sequence[Job], bound: int) -> Flow[list[str]]:
        """Accept jobs. One word each, in order: "new", "queued" (accepted before), the status it ended
        with, or "full": the lane holds `bound` jobs as urgent as this one or more, or the server is at its
        maxmemory; wait and offer it again. Raises InvalidJob for a job of another lane."""
        for job in jobs:
            if job.lane != self.lane:
                raise InvalidJob(f"job {job.id} is for lane {job.lane}, not {self.lane}: submit it there")
        states: list[str] = []
        for part in batches([(job, job.to_bytes()) for job in jobs]):
            runs = numbered(job.run for job, _ in part)
            keys = [*self._streams, self.keys.runs]
            for run in runs:
                keys += (self.keys.marks(run), self.keys.run(run))
            args: list[Any] = [GROUP, FIELD, bound, self.retention_s, INLINE_BYTES, len(runs), *runs]
            for job, raw in part:
                args += (job.id, _STREAM_NO[job.priority], runs[job.run], job.tenant or "")
                args += (estimated_tokens(job, len(raw)), raw)
            try:
                states += yield Call(words, script("submit"), tuple(keys), tuple(args))
            except StoreFull:
                states += ["full"] * len(part)
        return states

    def redrive(self, letter: DeadLetter, job: Job, bound: int) -> Flow[str]:
        """Submit a dead letter's job again, under its id and with a fresh budget, and drop the letter.
        Returns what `submit` says; "full" leaves the letter. May be cut anywhere and done again."""
        yield Call(text, script("reopen"), (self.keys.marks(job.run), self.keys.run(job.run)), (job.id,))
        (state,) = yield from self.submit([job], bound)
        if state != "full":
            yield self.purge(letter.letter_id)
        return state

    def heartbeat(self, engine: str, state: Mapping[str, Any]) -> Call[float]:
        """Report an engine's state. Returns the server's time in unix seconds."""
        args = (engine, orjson.dumps(dict(state)))
        return Call(float, script("heartbeat"), (self.keys.engines,), args, "renewal")

    def engines(self) -> Call[dict[str, dict[str, Any]]]:
        """Boot id -> {"at": unix seconds by the server's clock, "state": {...}}."""

        def parse(flat: Any) -> dict[str, dict[str, Any]]:
            return {text(k): orjson.loads(v) for k, v in flat.items()}

        return Call(parse, None, (), ("HGETALL", self.keys.engines))

    def jobs_waiting(self) -> Flow[int]:
        """Jobs in the lane, waiting or leased."""
        n = 0
        for stream in self._streams:
            n += yield Call(int, None, (), ("XLEN", stream))
        return n


#: Number of each priority's stream in scripts.
_STREAM_NO = {priority: n for n, priority in enumerate(PRIORITIES, start=1)}


def estimated_tokens(job: Job, size: int) -> int:
    """What a job will cost an engine, for the fairness of intake: four bytes of JSON are about a token, and
    it generates what it may. Never 0."""
    params = job.params
    if job.kind is Kind.SCORE:
        return size // 4 + 1
    made = params.max_tokens or (CHAT_TOKENS if job.kind is Kind.CHAT else COMPLETION_TOKENS)
    return size // 4 + 1 + params.n * made
