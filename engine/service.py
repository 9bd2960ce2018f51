"""The long-lived engine process: leases jobs, feeds the core, commits completions.

The one file in `engine/` that knows Redis. Four threads, each with one duty:

    intake   leases as many jobs as there are free rows plus a small look-ahead, tokenises, hands them over
    step     (the main thread) runs the core's steps; replaces its ranks when one died
    commit   turns finished requests into completions and finishes them in batches, fenced
    keeper   renews leases while steps make progress, reports the heartbeat

A job is *held* from its lease until its completion is committed, fenced off or handed back. What this
process holds may be lost with it: the lease runs out and another engine takes the job.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable

from engine.config import EngineConfig, ModelSpec, check_parallel, context_length
from engine.engine import Engine
from engine.errors import EngineError, WorkerDied
from engine.exec.base import Executor
from engine.held import Held, HeldJobs
from engine.jobs import Jobs
from engine.models.registry import read_spec
from engine.request import Request
from engine.tokenizer import load_tokenizer
from headrace.connection import connect
from headrace.errors import StoreError, StoreFull, StoreUnavailable
from headrace.ledger import Leased, Ledger
from headrace.messages import Completion, Priority
from headrace.patience import Patience
from headrace.settings import Settings
from headrace.store import Store

log = logging.getLogger("headrace.engine")

#: Jobs leased beyond the free rows, so that a row that ends finds the next job tokenised.
LOOK_AHEAD = 0.25
#: Completions that one finish call carries at most.
COMMIT_BATCH = 200
#: Deaths of a rank in a row, with no finished job between them, after which the engine gives up.
MAX_BARREN_RESTARTS = 3
#: Seconds between heartbeats.
HEARTBEAT_S = 1.0


def build_executor(config: EngineConfig, spec: ModelSpec) -> Executor:
    """The executor that `config.executor` names; Ray is imported only when it is used."""
    if config.executor == "ray":
        from engine.exec.ray import RayExecutor

        return RayExecutor(config, spec)
    from engine.exec.inproc import InprocExecutor

    return InprocExecutor(config, spec)


def serve(config: EngineConfig, settings: Settings) -> int:
    """Run an engine until SIGTERM or SIGINT; returns the exit code.

    Raises EngineError where the engine cannot be built and StoreError where the server cannot be used.
    """
    spec = read_spec(config.model)
    check_parallel(spec, config)
    service = Service(config, spec, settings, build_executor)

    def listen() -> None:
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, lambda *_: service.drain())

    listen()
    service.run(started=listen)  # again then, because Ray takes the signals for itself when it starts
    return 0


class Service:
    """One engine on one lane. `run` blocks; `drain` may be called from anywhere, a second time to hurry."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        settings: Settings,
        build: Callable[[EngineConfig, ModelSpec], Executor],
    ) -> None:
        self.config, self.spec, self.settings, self.build = config, spec, settings, build
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.ledger = Ledger(settings.lane, int(settings.retention_days * 86_400))
        self.jobs = Jobs(
            load_tokenizer(config.model),
            spec,
            context_length(spec, config),
            self.id,
            config.model_name,
            settings,
        )
        self.store = Store(connect(settings.redis, settings.allow_volatile))
        self.engine = Engine(config, spec, build(config, spec))
        self.held = HeldJobs()
        self._done: queue.SimpleQueue[Held | None] = queue.SimpleQueue()
        self._wake = threading.Event()  # work for the step loop
        self._freed = threading.Event()  # room for the intake
        self._draining = threading.Event()
        self._hurry = threading.Event()
        self._closed = threading.Event()
        self._state = "loading"
        self._failure: BaseException | None = None
        self._full: set[str | None] = set()  # result streams at their bound
        self._cursors = dict.fromkeys(Priority, "0-0")
        self._committed = 0
        self._deaths = 0  # of ranks, since a job was last committed
        self._committed_at_death = -1

    # -- life ------------------------------------------------------------------------------------

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until drained; calls `started` when the ranks stand. Raises what ended the engine early."""
        keeper = self._start(self._keep, "keeper")
        try:
            self.engine.start()
            started()
            self._enter("ready")
            intake, commit = self._start(self._take_in, "intake"), self._start(self._commit, "commit")
            self._step_until_drained(intake)
            self._draining.set()
            intake.join()
            self._done.put(None)
            commit.join()
        except BaseException as e:
            self._failure = self._failure or e
        self._draining.set()
        self._closed.set()
        self.engine.stop()
        keeper.join()
        self._leave()
        self.store.close()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Stop intake and finish what runs; the second call hands back what runs."""
        if self._draining.is_set():
            self._hurry.set()
        self._draining.set()
        self._wake.set()

    def _start(self, duty: Callable[[], None], name: str) -> threading.Thread:
        def guarded() -> None:
            try:
                duty()
            except BaseException as e:
                self._failure = self._failure or e
                self._hurry.set()
                self.drain()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _enter(self, state: str) -> None:
        self._state = state
        log.info("engine_state engine=%s lane=%s state=%s", self.id, self.settings.lane, state)

    def _leave(self) -> None:
        """Hand back what is held and take the name off the lists."""
        try:
            self._hand_back(self.held.all())
            self.store.run(self.ledger.leave(self.id))
        except StoreError as e:
            # the leases run out by themselves
            log.warning("left_silently engine=%s cause=%s", self.id, e)

    def _hand_back(self, held: list[Held], failed: bool = False) -> None:
        if held:
            n = self.store.run(self.ledger.release(self.id, [h.leased for h in held], failed))
            log.info("handed_back engine=%s jobs=%d failed=%s", self.id, n, failed)
        for h in held:
            self.held.drop(h)

    # -- step (the main thread) ------------------------------------------------------------------

    def _step_until_drained(self, intake: threading.Thread) -> None:
        deadline = math.inf
        while not self._hurry.is_set() and time.monotonic() < deadline:
            if self._draining.is_set() and deadline == math.inf:
                self._enter("draining")
                deadline = time.monotonic() + self.settings.drain_s
            if self.engine.has_work:
                try:
                    for request in self.engine.step():
                        self._ended(request)
                except WorkerDied as death:
                    self._replace_ranks(death)
            elif self._draining.is_set() and not intake.is_alive():
                return
            else:
                self._wake.wait(0.1)
                self._wake.clear()

    def _ended(self, request: Request) -> None:
        held = self.held.finished(request)
        if held is not None:
            self._done.put(held)

    def _replace_ranks(self, death: WorkerDied) -> None:
        """Jobs go back to the queue, where any engine of the lane may take them; then new ranks start."""
        self._deaths = self._deaths + 1 if self._committed == self._committed_at_death else 1
        self._committed_at_death = self._committed
        log.error("rank_died engine=%s rank=%d jobs=%d cause=%s", self.id, death.rank, len(self.held), death)
        self._enter("restarting")
        self.engine.take_unfinished()
        self._hand_back([h for h in self.held.all() if h.unfinished], failed=True)
        if self._deaths > MAX_BARREN_RESTARTS:
            raise EngineError(
                f"ranks died {self._deaths} times without a finished job between; last: {death}"
            )
        self.engine.restart(self.build(self.config, self.spec))
        self._enter("ready")

    # -- intake ----------------------------------------------------------------------------------

    def _take_in(self) -> None:
        patience = Patience(math.inf)
        swept = time.monotonic()
        lost_reply = False
        while not self._draining.is_set():
            try:
                room = self._room()
                if not room or self._results_full():
                    self._freed.wait(0.05)
                    self._freed.clear()
                    continue
                if lost_reply:  # what a lost reply handed over is ours, and nobody else will run it
                    leased = self.store.run(self.ledger.held_by(self.id))
                    lost_reply = False
                elif time.monotonic() - swept > self.settings.lease_s / 4:
                    swept = time.monotonic()
                    leased = self._sweep(room)
                else:
                    leased = self.store.run(self.ledger.lease(self.id, room))
                    if not leased:
                        leased = self.store.run(self.ledger.wait_for_jobs(self.id, room, 200))
                patience.over()
            except (StoreUnavailable, StoreFull) as e:
                lost_reply = True
                patience.wait(e, self._draining)
                continue
            for one in leased:
                self._accept(one)

    def _room(self) -> int:
        """Jobs to lease now: none until a worthwhile number of places is free."""
        if self._state != "ready":
            return 0
        most = int(self.config.max_num_seqs * (1 + LOOK_AHEAD)) + 1
        free = most - max(self.held.requests, len(self.held))
        return free if free >= max(1, most // 8) else 0

    def _results_full(self) -> bool:
        """Back-pressure: whether a result stream that this engine writes to is still at its bound."""
        for name in list(self._full):
            if self.store.run(self.ledger.result_length(name)) < self.settings.result_bound:
                self._full.discard(name)
        return bool(self._full)

    def _sweep(self, room: int) -> list[Leased]:
        """One page of expired leases of each priority."""
        out: list[Leased] = []
        for priority in Priority:
            if len(out) < room:
                idle_ms = int(self.settings.lease_s * 1000)
                page = self.store.run(
                    self.ledger.reclaim(self.id, priority, idle_ms, self._cursors[priority], room - len(out))
                )
                self._cursors[priority] = page.cursor
                out += page.leased
        if out:
            log.warning("reclaimed engine=%s jobs=%d", self.id, len(out))
        return out

    def _accept(self, leased: Leased) -> None:
        held = Held(leased, time.time())
        if not self.held.add(held):
            return  # its lease ran out and came back to us: it runs already
        requests = self.jobs.prepare(held)
        self.held.started(held, requests)
        try:
            for request in requests:
                self.engine.add(request)
        except EngineError as e:
            for request_id in self.held.drop(held):
                self.engine.cancel(request_id)
            self.jobs.refuse(held, e)
            self.held.add(held)
        if held.completion is not None:
            self._done.put(held)
        else:
            self._wake.set()

    # -- commit ----------------------------------------------------------------------------------

    def _commit(self) -> None:
        patience = Patience(math.inf)
        last = False
        while not last:
            batch = [self._done.get()]
            while len(batch) < COMMIT_BATCH and not self._done.empty():
                batch.append(self._done.get())
            last = None in batch
            items = [(held, self.jobs.completion(held)) for held in batch if held is not None]
            while items:
                try:
                    self._finish(items)
                    patience.over()
                    break
                except (StoreUnavailable, StoreFull) as e:
                    if self._hurry.is_set() or (self._draining.is_set() and last):
                        return  # the leases run out, and the jobs are run again
                    patience.wait(e, self._hurry)

    def _finish(self, items: list[tuple[Held, Completion]]) -> None:
        states = self.store.run(self.ledger.finish(self.id, [(h.leased, c) for h, c in items]))
        wasted = 0
        for (held, completion), state in zip(items, states, strict=True):
            self.held.drop(held)
            if state == "done":
                self._committed += 1
            else:
                wasted += completion.usage.completion_tokens
        if wasted:
            log.warning("fenced engine=%s wasted_tokens=%d", self.id, wasted)
        for name in {c.reply_to for _, c in items}:
            if self.store.run(self.ledger.result_length(name)) >= self.settings.result_bound:
                self._full.add(name)
        self._freed.set()

    # -- keeper ----------------------------------------------------------------------------------

    def _keep(self) -> None:
        renewed = moved_at = time.monotonic()
        seen = -1
        while not self._closed.wait(HEARTBEAT_S):
            now = time.monotonic()
            if self.engine.step_count != seen or not self.engine.has_unfinished:
                seen, moved_at = self.engine.step_count, now
            try:
                self.store.run(self.ledger.heartbeat(self.id, self._report()))
                if now - renewed >= self.settings.lease_s / 4:
                    if now - moved_at < self.settings.lease_s:
                        self._renew()
                    else:
                        log.error("stuck engine=%s seconds=%.0f: leases run out", self.id, now - moved_at)
                    renewed = now
            except StoreError as e:
                log.warning("keeper_failed engine=%s cause=%s", self.id, e)

    def _renew(self) -> None:
        held = {h.entry: h for h in self.held.all()}
        lost = self.store.run(self.ledger.renew(self.id, [h.leased for h in held.values()]))
        for one in lost:
            gone = held[one.stream, one.entry_id]
            for request_id in self.held.drop(gone):
                self.engine.cancel(request_id)
        if lost:
            log.warning("leases_lost engine=%s jobs=%d", self.id, len(lost))

    def _report(self) -> dict[str, object]:
        return {
            "state": self._state,
            "model": self.config.model_name,
            "pid": os.getpid(),
            "held": len(self.held),
            "committed": self._committed,
            **self.engine.stats.to_dict(),
        }
