"""An engine's life: build, start its threads, step until drained, hand back what is left.

Runs the step loop itself, in the main thread; intake, commit and keeper have files of their own.
"""

from __future__ import annotations

import logging
import math
import os
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
from engine.models.registry import read_spec
from engine.service.commit import commit_left_behind, commit_until_done
from engine.service.desk import Desk
from engine.service.held import Held
from engine.service.intake import Intake
from engine.service.jobs import Jobs
from engine.service.keeper import keep
from engine.service.process import build as build_name
from engine.service.spool import Spool, spool_folder
from engine.tokenizer import load_tokenizer
from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.settings import Settings
from headrace.store import Store

log = logging.getLogger("headrace.engine")

#: Deaths of a rank in a row, with no committed job between them, after which the engine gives up. One job
#: that kills ranks costs two in a row at most, as its suspects are run in halves; three such jobs a few more.
MAX_BARREN_RESTARTS = 8

Build = Callable[[EngineConfig, ModelSpec], Executor]


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

    def __init__(self, config: EngineConfig, spec: ModelSpec, settings: Settings, build: Build) -> None:
        self.spec, self.build = spec, build
        boot = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        context = context_length(spec, config)
        tokenizer = load_tokenizer(config.model)
        self.desk = Desk(
            id=boot,
            config=config,
            settings=settings,
            engine=Engine(config, spec, build(config, spec)),
            jobs=Jobs(tokenizer, spec, context, boot, config.model_name, settings),
            ledger=Ledger(settings.lane, int(settings.retention_days * 86_400)),
            store=Store(connect(settings.redis, settings.allow_volatile)),
        )
        self.desk.spool = _spool(self.desk)
        self._failure: BaseException | None = None
        self._deaths = 0  # of ranks, since a job was last committed
        self._committed_at_death = -1

    def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Serve until drained; calls `started` when the ranks stand. Raises what ended the engine early."""
        desk = self.desk
        keeper = self._start(lambda: keep(desk), "keeper")
        try:
            commit_left_behind(desk)
            desk.engine.start()
            started()
            self._fit_context()
            self._enter("ready")
            intake = self._start(Intake(desk).run, "intake")
            commit = self._start(lambda: commit_until_done(desk), "commit")
            self._step_until_drained(intake)
            desk.draining.set()
            intake.join()
            desk.done.put(None)
            commit.join()
        except BaseException as e:
            self._failure = self._failure or e
        desk.draining.set()
        desk.closed.set()
        desk.engine.stop()
        keeper.join()
        self._leave()
        if desk.spool is not None:
            desk.spool.close()
        desk.store.close()
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Stop intake and finish what runs; the second call hands back what runs."""
        if self.desk.draining.is_set():
            self.desk.hurry.set()
        self.desk.draining.set()
        self.desk.wake.set()

    def _start(self, duty: Callable[[], None], name: str) -> threading.Thread:
        def guarded() -> None:
            try:
                duty()
            except BaseException as e:
                self._failure = self._failure or e
                self.desk.hurry.set()
                self.drain()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _enter(self, state: str) -> None:
        self.desk.state = state
        log.info("engine_state engine=%s lane=%s state=%s", self.desk.id, self.desk.settings.lane, state)

    def _fit_context(self) -> None:
        """A chat without max_tokens asks for the rest of the context; a smaller KV pool cannot give that."""
        desk = self.desk
        pool = (desk.engine.executor.num_kv_blocks - 1) * desk.config.block_size
        desk.jobs.context = min(desk.jobs.context, pool)

    def _step_until_drained(self, intake: threading.Thread) -> None:
        desk, deadline = self.desk, math.inf
        while not desk.hurry.is_set() and time.monotonic() < deadline:
            if desk.draining.is_set() and deadline == math.inf:
                self._enter("draining")
                deadline = time.monotonic() + desk.settings.drain_s
            if desk.engine.has_work:
                try:
                    for request in desk.engine.step():
                        if (held := desk.held.finished(request)) is not None:
                            desk.done.put(held)
                except WorkerDied as death:
                    self._replace_ranks(death)
            elif desk.draining.is_set() and not intake.is_alive():
                return
            else:
                desk.wake.wait(0.1)
                desk.wake.clear()

    def _replace_ranks(self, death: WorkerDied) -> None:
        """Jobs go back to the queue, where any engine of the lane may take them; then new ranks start."""
        desk = self.desk
        self._deaths = self._deaths + 1 if desk.committed == self._committed_at_death else 1
        self._committed_at_death = desk.committed
        log.error(
            "rank_died engine=%s rank=%d jobs=%d cause=%s",
            desk.id, death.rank, len(desk.held), " ".join(death.evidence.split()),
        )  # fmt: skip
        self._enter("restarting")
        desk.engine.take_unfinished()
        unfinished = [h for h in desk.held.all() if h.unfinished]
        # Jobs that only waited have nothing to do with the death. They go first: what is left died together.
        self._hand_back([h for h in unfinished if not h.started])
        self._hand_back([h for h in unfinished if h.started], death)
        if self._deaths > MAX_BARREN_RESTARTS:
            raise EngineError(
                f"ranks died {self._deaths} times without a finished job between; last: {death}"
            )
        desk.engine.restart(self.build(desk.config, self.spec))
        self._enter("ready")

    def _hand_back(self, held: list[Held], death: WorkerDied | None = None) -> None:
        """To the queue, at once, as suspects where a rank died under them. Without a server the leases run
        out, as nobody renews them."""
        desk = self.desk
        for h in held:
            desk.held.drop(h)
        try:
            leased = [h.leased for h in held]
            if death is None:
                n = desk.store.run(desk.ledger.release(desk.id, leased))
            else:
                evidence = {
                    "engine": desk.id, "rank": death.rank, "error": death.evidence, "build": build_name(),
                    "at": round(desk.clock.now(), 3),
                }  # fmt: skip
                n = desk.store.run(desk.ledger.crashed(desk.id, leased, evidence))
            log.info("handed_back engine=%s jobs=%d suspect=%s", desk.id, n, death is not None)
        except StoreError as e:
            log.warning("not_handed_back engine=%s jobs=%d cause=%s", desk.id, len(held), e)

    def _leave(self) -> None:
        """Hand back what is held and take the name off the lists."""
        if left := self.desk.held.all():
            self._hand_back(left)
        try:
            self.desk.store.run(self.desk.ledger.leave(self.desk.id))
        except StoreError as e:
            log.warning("left_silently engine=%s cause=%s", self.desk.id, e)


def _spool(desk: Desk) -> Spool | None:
    settings = desk.settings
    folder = spool_folder(settings.spool, desk.store.connections.shown, settings.lane)
    try:
        return Spool(folder, desk.id, settings.spool_mb << 20)
    except OSError as e:
        log.warning(
            "no_spool folder=%s cause=%s: completions made during an outage live in memory only, set spool",
            folder, e.strerror,
        )  # fmt: skip
        return None
