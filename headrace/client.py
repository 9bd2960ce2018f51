"""What applications use: `Client`, for asyncio (`headrace.sync` has it for everything else).

A client that awaits answers has a result stream of its own, read by one background task, so an answer costs
no polling. A job that ended before it was asked for is answered from the completion that the ledger keeps
for an hour. Commands in flight are never cancelled (see `headrace.store.AsyncStore`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from headrace.connection import connect_async
from headrace.durable import Ack, check_ack, confirm
from headrace.errors import LaneFull, ResultExpired, StoreError
from headrace.keys import QUEUED, REPLY_PREFIX
from headrace.ledger import Ledger, RunProgress
from headrace.messages import Completion, Job
from headrace.settings import Settings
from headrace.store import AsyncStore

log = logging.getLogger("headrace.client")

T = TypeVar("T")

#: Jobs in one round trip of `submit_many`.
BATCH = 200
#: Milliseconds of one blocking read of the reply stream; `close` waits for it to end.
READ_MS = 500
#: Seconds between looks for an answer that another client asked for.
LOOK_S = 0.5
#: Seconds of the first and the longest pause while the lane is full.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
_OWN = frozenset({"id", "run", "priority", "tenant", "deadline", "meta", "reply_to", "traceparent"})


class Client:
    """One lane, for asyncio. An async context manager.

    `url` and `lane` default to the settings (HEADRACE_REDIS, HEADRACE_LANE, `headrace.toml`). `timeout`:
    seconds to wait while the lane is full. Raises StoreError where the server cannot be used, InvalidJob
    for a job that can never run, LaneFull.
    """

    def __init__(self, url: str | None = None, lane: str | None = None, timeout: float = 60.0) -> None:
        self.settings = Settings.load({"redis": url, "lane": lane})
        self.lane = self.settings.lane
        self.timeout = timeout
        self.ledger = Ledger(self.lane, int(self.settings.retention_days * 86_400))
        self._reply_to = f"{REPLY_PREFIX}{uuid.uuid4().hex}"
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._runs: dict[str, str] = {}
        self._store: AsyncStore | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Client:
        connections = await connect_async(self.settings.redis, self.settings.allow_volatile)
        self._store = AsyncStore(connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop reading and disconnect. Jobs that were submitted go on."""
        self._closing = True
        if self._reader is not None:
            await self._reader
        for future in self._waiting.values():
            future.cancel()
        if self._store is not None:
            await self._store.close()

    # -- ask and wait ----------------------------------------------------------------------------

    async def generate(self, prompt: str | Sequence[int], **fields: Any) -> Completion:
        """Complete a prompt: text, or token ids. `fields` are sampling parameters and job fields."""
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        value = prompt if isinstance(prompt, str) else list(prompt)
        return await self._ask({"kind": "completion", key: value}, fields)

    async def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Completion:
        """The assistant's next turn."""
        return await self._ask({"kind": "chat", "messages": [dict(m) for m in messages]}, fields)

    async def score(self, prompt: str, continuation: str, **fields: Any) -> Completion:
        """The log-likelihood of a continuation (`choices[0].score`, `choices[0].is_greedy`)."""
        return await self._ask({"kind": "score", "prompt": prompt, "continuation": continuation}, fields)

    async def result(self, job_id: str, timeout: float | None = None) -> Completion:
        """The completion of a job that this or another client awaits; may be asked for again within an hour.

        Raises TimeoutError after `timeout` seconds, ResultExpired where it ended but is no longer kept.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            future = self._waiting.get(job_id)
            if future is not None:
                await asyncio.wait([future], timeout=_within(LOOK_S, deadline))
                if future.done():
                    self._waiting.pop(job_id, None)
                    return future.result()
            if (raw := await self._run(self.ledger.kept(job_id))) is not None:
                self._waiting.pop(job_id, None)
                return Completion.parse(raw)
            if (run := self._runs.get(job_id)) is not None:
                mark = await self._run(self.ledger.mark(run, job_id))
                if mark not in (None, QUEUED) and await self._run(self.ledger.kept(job_id)) is None:
                    raise ResultExpired(f"job {job_id} ended {mark}, and its completion is no longer kept")
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} has not ended within {timeout:g} s")
            if future is None:
                await asyncio.sleep(_within(LOOK_S, deadline))

    # -- submit ----------------------------------------------------------------------------------

    async def submit(self, job: Job | Mapping[str, Any], ack: Ack = "memory") -> str:
        """Put one job into the lane; returns its id. Its completion goes to the stream that `reply_to` names,
        where a sink takes it. Give `reply_to=client.reply_to` to fetch it with `result`.

        `ack`: how far it is carried first: "memory" (the server has it), "fsync" (on its disk), "replica" (on
        a second server). Raises NotDurable where that took too long, StoreError where it cannot be had.
        """
        check_ack(ack)
        built = self._built(job)
        await self._offer([built])
        await self._confirm(built.run, ack)
        return built.id

    @property
    def reply_to(self) -> str:
        """Name of this client's own result stream."""
        return self._reply_to

    async def submit_many(
        self,
        jobs: Iterable[Job | Mapping[str, Any]] | AsyncIterable[Job | Mapping[str, Any]],
        ack: Ack = "memory",
    ) -> Counter[str]:
        """Put any number of jobs into the lane, no faster than it takes them. `ack` as in `submit`, once for
        each batch.

        Returns how many were "new", "queued" (accepted before) or had ended, by status. Memory does not grow
        with their number.
        """
        check_ack(ack)
        states: Counter[str] = Counter()
        batch: list[Job] = []
        async for job in _each(jobs):
            batch.append(self._built(job))
            if len(batch) == BATCH:
                states.update(await self._offer(batch))
                await self._confirm(batch[0].run, ack)
                batch = []
        states.update(await self._offer(batch))
        if batch:
            await self._confirm(batch[0].run, ack)
        return states

    async def cancel(self, job_id: str, run: str | None = None) -> str:
        """Ask for a job to end: it ends as `cancelled`, when an engine leases it or between two steps of it.

        `run`: the job's; without it, the one that this client gave it, or every run of the lane that has it.
        Returns "cancelling", the status that it ended with before, or "unknown".
        """
        run = run or self._runs.get(job_id)
        if run is None:
            return await self._run(self.ledger.cancel_anywhere(job_id))
        (word,) = await self._run(self.ledger.cancel(run, [job_id]))
        return word

    async def cancel_run(self, run: str) -> None:
        """Ask for all jobs of a run to end as `cancelled`, also those that are still to be submitted."""
        await self._run(self.ledger.cancel_run(run))

    async def progress(self, run: str) -> RunProgress:
        return await self._run(self.ledger.progress(run))

    # -- inside ----------------------------------------------------------------------------------

    async def _ask(self, what: Mapping[str, Any], fields: Mapping[str, Any]) -> Completion:
        own_id = {"id": uuid.uuid4().hex}  # a question asked twice is two jobs, unless its id says otherwise
        job = self._built({**own_id, **what, **_split(fields), "reply_to": self._reply_to})
        self._waiting[job.id] = asyncio.get_running_loop().create_future()
        self._runs[job.id] = job.run
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        try:
            await self._offer([job])
            return await self.result(job.id)
        finally:
            self._waiting.pop(job.id, None)
            self._runs.pop(job.id, None)

    def _built(self, job: Job | Mapping[str, Any]) -> Job:
        if isinstance(job, Job):
            return job
        default_run = f"apps-{datetime.now(UTC):%Y-%m-%d}"
        return Job.build({"run": default_run, "lane": self.lane, "enqueued": time.time(), **job})

    async def _offer(self, jobs: list[Job]) -> list[str]:
        """Until the lane has taken them all."""
        states: dict[str, str] = {}
        pause, deadline = FIRST_PAUSE_S, time.monotonic() + self.timeout
        left = jobs
        while left:
            answers = await self._run(self.ledger.submit(left, self.settings.lane_bound))
            states |= {job.id: s for job, s in zip(left, answers, strict=True)}
            refused = [job for job, s in zip(left, answers, strict=True) if s == "full"]
            if len(refused) < len(left):  # it drains: only a lane that stands still is an error
                pause, deadline = FIRST_PAUSE_S, time.monotonic() + self.timeout
            left = refused
            if left and time.monotonic() > deadline:
                raise LaneFull(
                    f"lane {self.lane} held {self.settings.lane_bound} jobs for {self.timeout:g} s: "
                    "start more engines, or submit more slowly"
                )
            if left:
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(pause * 2, LONGEST_PAUSE_S)
        return [states[job.id] for job in jobs]

    async def _read(self) -> None:
        """Hand completions of the own stream to those who await them."""
        after = "0-0"
        while not self._closing:
            try:
                entries = await self._run(self.ledger.read_replies(self._reply_to, after, READ_MS))
            except StoreError:  # `result` looks for kept completions meanwhile
                await asyncio.sleep(LOOK_S)
                continue
            for entry in entries:
                after = entry.entry_id
                try:
                    done = Completion.parse(entry.raw)
                except ValueError:  # anyone may write to a stream; the others' answers must go on
                    log.error("unreadable_completion entry=%s bytes=%d", after, len(entry.raw))
                    continue
                future = self._waiting.get(done.id)
                if future is not None and not future.done():
                    future.set_result(done)
            if entries:
                await self._run(self.ledger.drop_replies(self._reply_to, [e.entry_id for e in entries]))

    async def _confirm(self, run: str, ack: Ack) -> None:
        await confirm(self._connected.connections, self.ledger.keys.run(run), ack)

    async def _run(self, work: Any) -> Any:
        return await self._connected.run(work)

    @property
    def _connected(self) -> AsyncStore:
        if self._store is None:
            raise StoreError("the client is not connected: use it as `async with Client(...) as client:`")
        return self._store


def _split(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Job fields stay, everything else is a sampling parameter."""
    own = {k: v for k, v in fields.items() if k in _OWN}
    return own | {"params": {k: v for k, v in fields.items() if k not in _OWN}}


def _within(seconds: float, deadline: float | None) -> float:
    return seconds if deadline is None else max(0.0, min(seconds, deadline - time.monotonic()))


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterable[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
