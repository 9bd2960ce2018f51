"""Calls that end jobs before their time. Part of `headrace.ledger.Ledger`.

A cancel is a wish that stands in the lane until the job ends: engines look at it when they lease, between
steps, and the finish script looks at it last of all. A run's waiting jobs need no turn for that: the
first engine that hears of it ends them all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from headrace.ends import EndCalls
from headrace.errors import InvalidJob
from headrace.keys import FIELD, GROUP
from headrace.leases import Leased
from headrace.messages import Completion, ErrorInfo, Job, Status, Timings
from headrace.parts import BATCH, as_is, parts, words
from headrace.store import Arg, Call, Flow, script


class CancelCalls(EndCalls):
    """Cancel calls of one lane."""

    def cancel(self, run: str, job_ids: Sequence[str]) -> Flow[list[str]]:
        """Ask for jobs to end as cancelled. One word each: "cancelling", the status that it ended with
        before, or "unknown"."""
        out: list[str] = []
        for part in parts(job_ids):
            out += yield self._cancel([(run, job_id) for job_id in part])
        return out

    def cancel_anywhere(self, job_id: str) -> Flow[str]:
        """Cancel a job whose run is not known: in every run of the lane that has it unfinished."""
        runs = yield Call(words, None, (), ("ZREVRANGE", self.keys.runs, 0, -1))
        found = "unknown"
        for part in parts(runs):
            for word in (yield self._cancel([(run, job_id) for run in part])):
                if found == "unknown" or word == "cancelling":
                    found = word
        return found

    def cancel_run(self, run: str) -> Call[list[str]]:
        """Ask for all of a run to end as cancelled: what waits and runs now, and what is still submitted to
        it, until `forget_run`. The next engine to see it calls `end_waiting`."""
        return self._cancel([(run, "")])

    def end_waiting(self, run: str) -> Flow[int]:
        """End the waiting jobs of a run that is being cancelled, without a turn in line. Returns how many."""
        me, n = f"cancel-{uuid.uuid4().hex}", 0
        unreadable: list[Leased] = []
        keys = (*self._streams, self.keys.attempts, self.keys.later)
        while rows := (yield Call(as_is, script("take"), keys, (GROUP, me, BATCH, FIELD, run), "once")):
            leased = yield from self._with_payloads(rows, 0)
            ends = []
            for one in leased:
                try:
                    ends.append((one, cancelled(Job.parse(one.raw), one)))
                except InvalidJob:  # or of a newer version: an engine's to judge
                    unreadable.append(one)
            n += (yield from self.finish(me, ends)).count("done")
        yield from self.release(me, unreadable)
        yield from self.leave(me)
        return n

    def _cancel(self, items: Sequence[tuple[str, str]]) -> Call[list[str]]:
        keys = (self.keys.cancels, *(self.keys.marks(run) for run, _ in items))
        args: list[Arg] = [self.retention_s, *(word for item in items for word in item)]
        return Call(words, script("cancel"), keys, tuple(args))


def cancelled(job: Job, leased: Leased) -> Completion:
    """The end of a job that was cancelled before an engine ran it."""
    return Completion(
        id=job.id,
        run=job.run,
        lane=job.lane,
        kind=job.kind,
        status=Status.CANCELLED,
        error=ErrorInfo(code="cancelled", message="the job was cancelled while it waited"),
        attempts=leased.failed,
        timings=Timings(enqueued=job.enqueued, finished=time.time()),
        reply_to=job.reply_to,
        meta=job.meta,
    )
