"""The engine core: requests in, finished requests out, one step at a time.

Joins the scheduler to an executor and keeps up to `overlap_depth` plans on their way beside the one whose
result is awaited. Synchronous: whoever owns the engine calls `step` in a loop from one thread. Only `add`
and `cancel` may be called from other threads. Knows nothing of text, queues or Redis.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from time import monotonic, perf_counter

from engine.config import EngineConfig, ModelSpec, context_length
from engine.errors import EngineError, InvalidRequest
from engine.exec.base import Executor, RankReport
from engine.models.registry import prefix_salt
from engine.request import Request
from engine.sched.admission import Limits
from engine.sched.flight import fail
from engine.sched.scheduler import Scheduler
from engine.stats import EngineStats


class Engine:
    """One model on one executor.

    When `step` raises WorkerDied the engine stands still and has lost nothing: `restart` with a new
    executor goes on with all unfinished requests, `take_unfinished` hands them back.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec, executor: Executor) -> None:
        self.config = config
        self.spec = spec
        self.executor = executor
        self.stats = EngineStats()
        #: Results that have arrived. It stands still when the ranks do; leases are renewed while it moves.
        self.step_count = 0
        self._context = context_length(spec, config)
        self._scheduler: Scheduler | None = None
        self._lock = threading.Lock()  # guards the two below
        self._live: dict[str, Request] = {}  # added and not yet returned as finished
        self._inbox: deque[tuple[bool, Request]] = deque()  # (True to add, False to cancel; request)
        self._ended: list[Request] = []  # to be returned by the next step

    def start(self) -> list[RankReport]:
        """Start the ranks. Raises what loading raises: ConfigError, CheckpointError, CapacityError,
        WorkerDied."""
        reports = self.executor.start()
        self._scheduler = self._new_scheduler()
        return reports

    # -- from any thread -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest when it can never run or its id is in use."""
        self.scheduler.check(request)
        request.arrival = monotonic()
        with self._lock:
            if request.id in self._live:
                raise InvalidRequest(
                    "duplicate_id", f"request {request.id} is running already: give each its own id"
                )
            self._live[request.id] = request
            self._inbox.append((True, request))

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step, which returns it with reason `cancelled`. False when it is not
        here (it ended before, or never came)."""
        with self._lock:
            request = self._live.get(request_id)
            if request is not None:
                self._inbox.append((False, request))
            return request is not None

    # -- from the owner's thread -----------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: requests, or results still on their way."""
        return bool(self._live or self._ended or self.scheduler.flights)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs; from any thread, also before `start`."""
        return bool(self._live)

    def step(self) -> list[Request]:
        """Send what can be sent, wait for one result, return the requests that ended.

        Returns at once when there is nothing to do. Raises WorkerDied when a rank is dead or hung.
        """
        scheduler, executor = self.scheduler, self.executor
        began = perf_counter()
        self._take_inbox(scheduler)
        sending = 0.0
        while len(scheduler.flights) <= executor.overlap_depth:
            plan = scheduler.schedule()
            if plan is None:
                break
            sent = perf_counter()
            executor.submit(plan)
            sending += perf_counter() - sent
        if scheduler.flights:
            asked = perf_counter()
            result = executor.result()
            sending += perf_counter() - asked
            self._ended += scheduler.update(scheduler.flights[0].plan, result)
            self.step_count += 1
        self.stats.executing_s += sending
        self.stats.scheduling_s += perf_counter() - began - sending
        return self._hand_over(scheduler)

    def drain(self) -> list[Request]:
        """Step until nothing is left; returns all that ended."""
        ended = []
        while self.has_work:
            ended += self.step()
        return ended

    def abort_all(self) -> list[Request]:
        """End every request now, with reason `cancelled`; returns them and what had ended before."""
        scheduler = self.scheduler
        self._take_inbox(scheduler)
        with self._lock:
            live = list(self._live.values())
        for request in live:
            if request.finish is None:
                scheduler.cancel(request)
                self._ended.append(request)
        return self._hand_over(scheduler)

    def take_unfinished(self) -> list[Request]:
        """Take out every request that has not ended, output so far included, in running order."""
        self._take_inbox(self.scheduler)
        out = self.scheduler.evacuate()
        with self._lock:
            for request in out:
                del self._live[request.id]
        return out

    def restart(self, executor: Executor) -> list[RankReport]:
        """Replace the ranks, after WorkerDied: all unfinished requests go on from the output they have.

        A request that no longer fits (the new ranks may have less memory) ends as an error with the next
        step. When the new ranks fail to start, nothing is lost and `restart` may be called again.
        """
        self.executor.stop()
        self.executor = executor
        reports = executor.start()
        self._take_inbox(self.scheduler)
        unfinished = self.scheduler.evacuate()
        self._scheduler = self._new_scheduler()
        for request in unfinished:
            try:
                self._scheduler.check(request)
            except InvalidRequest as error:
                fail(request, error.code, str(error))
                request.finished_at = monotonic()
                self._ended.append(request)
            else:
                self._scheduler.add(request)
        return reports

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, as benchmarks want it between runs."""
        self.scheduler.sharing.clear()

    def check_integrity(self) -> None:
        """Raises EngineError when the book-keeping of rows and blocks does not add up."""
        self.scheduler.check_integrity()

    def stop(self) -> None:
        """End the ranks. Safe to call twice and after a death."""
        self.executor.stop()

    # -- inside ----------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Scheduler:
        if self._scheduler is None:
            raise EngineError("the engine has no ranks yet: call start() first")
        return self._scheduler

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        kv_blocks = self.executor.num_kv_blocks - 1  # without the null block
        self.stats.kv_blocks = kv_blocks
        return Scheduler(
            Limits(self.spec.vocab_size, self._context, config.block_size, kv_blocks),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.stats,
            lookahead=config.lookahead,
            cache_prefixes=config.enable_prefix_caching,
            salt_of=partial(prefix_salt, self.spec),
        )

    def _take_inbox(self, scheduler: Scheduler) -> None:
        while self._inbox:
            is_new, request = self._inbox.popleft()
            if is_new:
                scheduler.add(request)
            elif request.finish is None:
                scheduler.cancel(request)
                self._ended.append(request)

    def _hand_over(self, scheduler: Scheduler) -> list[Request]:
        ended, self._ended = self._ended, []
        if ended:
            with self._lock:
                for request in ended:
                    del self._live[request.id]
        stats, pool = self.stats, scheduler.pool
        stats.running = len(scheduler.running)
        stats.waiting = len(scheduler.waiting) + len(self._inbox)
        stats.kv_used = pool.capacity - pool.available
        return ended
