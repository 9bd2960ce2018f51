"""`headrace run` behind its flags: one process tree from an input file to an output file.

    this process    loader thread: input -> lane       sink thread: results -> output
                    main thread: watches everything, starts what is missing, shows progress
    children        the embedded server (without --redis) and the engine

What is done is known from two files beside the output (see `headrace.cli.workdir`), so the command may
be cut anywhere and given again. The engine is started when the first unfinished row is queued: a run
that is done already, or is refused, starts none.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from headrace.cli.child import DRAIN_S, Engine
from headrace.cli.common import CommandError
from headrace.cli.parts import Part, interrupts
from headrace.cli.progress import Progress, Snapshot, summary
from headrace.cli.workdir import Manifest, Workdir
from headrace.connection import connect
from headrace.embedded import EmbeddedServer
from headrace.errors import StoreUnavailable
from headrace.ledger import Ledger
from headrace.settings import Settings
from headrace.store import Store
from producer.admitted import AdmittedRows
from producer.load import Loader, parser_for
from sink.base import Consumer
from sink.jsonl import JsonlTarget

#: Seconds between looks at the parts.
TICK_S = 0.1
#: Seconds between looks at the server for rows that will never come, and how long nothing may be on the way.
LOOK_S, SETTLED_S = 1.0, 3.0
#: Seconds to wait for the loader at the end: it may hang in a read of standard input that never returns.
LOADER_END_S = 2.0
#: Deaths of the embedded server in a row, without a row finished between, that a run puts up with.
MAX_SERVER_DEATHS = 3
#: Seconds that the server may be away.
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What to run. `engine` is the engine's command without its queue flags."""

    input: str
    output: Path
    model: str
    fingerprint: str
    engine: list[str]
    error_file: Path | None = None
    redis: str | None = None
    run: str | None = None
    lane: str | None = None
    allow_volatile: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: `complete` when every row of the input is in the output."""

    complete: bool
    failed: int


def execute(plan: RunPlan) -> Outcome:
    """Run to the end or to an interrupt (SIGINT, SIGTERM). Raises HeadraceError where it cannot be done."""
    workdir = Workdir(plan.output)
    workdir.check()
    settings = Settings.load({"redis": plan.redis, "allow_volatile": plan.allow_volatile or None})
    with ExitStack() as stack:
        stack.enter_context(workdir.locked())
        if plan.redis:
            connect(plan.redis, settings.allow_volatile).close()  # before the manifest says that a run began
        if plan.fresh or workdir.nothing_written(plan.error_file):
            _forget(plan, workdir, settings)
        manifest = workdir.begin(plan.model, plan.fingerprint, plan.run, plan.lane)
        seen = stack.enter_context(interrupts())
        server = None if plan.redis else stack.enter_context(EmbeddedServer(workdir.server))
        url = plan.redis or (server.url if server else "")
        store = Store(connect(url, settings.allow_volatile))
        stack.callback(store.close)
        run = _Run(plan, workdir, manifest, settings, store, url, server)
        stack.callback(run.close)
        return run.run(seen)


class _Run:
    """One pass over the input. The main thread owns it; two threads work for it, each a `Part`."""

    def __init__(
        self,
        plan: RunPlan,
        workdir: Workdir,
        manifest: Manifest,
        settings: Settings,
        store: Store,
        url: str,
        server: EmbeddedServer | None,
    ) -> None:
        self.plan, self.manifest, self.store, self.server = plan, manifest, store, server
        self.server_deaths, self.done_at_death = 0, -1
        self.ledger = Ledger(manifest.lane, int(settings.retention_days * 86_400))
        self.target = JsonlTarget(plan.output, workdir.written, plan.error_file)
        self.target.recover()
        own = None if plan.redis else manifest.run  # on a shared server, marks are for others to see as well
        self.consumer = Consumer(store, self.ledger, manifest.run, "run", self.target, PATIENCE_S, own)
        self.admitted = AdmittedRows(workdir.rows, manifest.passes)
        self.loader = Loader(
            store,
            self.ledger,
            parser_for(plan.input, manifest.run, manifest.lane, manifest.run),
            self.admitted,
            self.target.written,
            settings.lane_bound,
            PATIENCE_S,
        )
        queue = ["--redis", url, "--lane", manifest.lane]
        queue += ["--allow-volatile"] if settings.allow_volatile else []
        self.engine = Engine([*plan.engine, *queue], workdir.log)
        self.before = self.target.tally.copy()
        self.progress = Progress()
        self.started = self.looked = time.monotonic()
        self.settled_since: float | None = None

    def close(self) -> None:
        self.progress.close()
        self.target.close()
        self.admitted.close()

    def run(self, interrupts: list[int]) -> Outcome:
        if self.before.total:
            self.progress.say(f"continuing: {self.before.total:,} rows are in {self.plan.output} already")
        sink = Part("sink", self.consumer.run)
        load = Part("loader", self._load)
        try:
            while not self._complete() and not interrupts:
                self._tend_server()
                load.check()
                sink.check()
                self._tend_engine()
                self._look_for_lost_rows()
                self.progress.show(self._snapshot())
                time.sleep(TICK_S)
        finally:
            load.end(LOADER_END_S)
            self.engine.stop(0.0 if len(interrupts) > 1 else DRAIN_S)
            sink.end(PATIENCE_S)
        sink.check()
        while self.consumer.step(block_ms=1):  # what the engine finished while it was ended
            pass
        return self._report()

    def _load(self, stop: threading.Event) -> None:
        self.loader.stop = stop
        self.loader.run(self.plan.input)

    def _complete(self) -> bool:
        return self.loader.loaded.complete and self.target.tally.total >= len(self.admitted)

    def _tend_server(self) -> None:
        """Start the embedded server again when it died: what it acknowledged is on the disk."""
        if self.server is None or (death := self.server.revive()) is None:
            return
        done = self.target.tally.total
        self.server_deaths = 1 if done > self.done_at_death else self.server_deaths + 1
        self.done_at_death = done
        if self.server_deaths > MAX_SERVER_DEATHS:
            raise CommandError(
                f"{death}, for the {self.server_deaths}th time without a row finished between: see "
                f"{self.server.folder / 'valkey.log'}; the same command continues"
            )
        self.progress.say(f"{death}: started again, nothing is lost")

    def _tend_engine(self) -> None:
        """Start it when there is work, restart it when it died."""
        if not self.engine.started:
            if self.loader.unfinished.is_set():
                try:
                    self._free_jobs(failed=False)  # of an earlier pass, which was killed: no fault of theirs
                except StoreUnavailable:
                    return  # in the next round; the sink's thread decides how long that may last
                self.engine.start()
            return
        pid = self.engine.pid
        answered = self.target.tally.total - self.before.total - self.loader.loaded.rejected  # by engines
        if (death := self.engine.watch(max(0, answered))) is not None:
            self.progress.say(f"{death}: started again, its rows are run again")
            with contextlib.suppress(StoreUnavailable):  # the leases run out by themselves, a little later
                self._free_jobs(failed=True, pid=pid)

    def _free_jobs(self, failed: bool, pid: int | None = None) -> None:
        """Hand back at once what dead engines held, instead of when their leases run out.

        On an embedded server every engine but the present one is dead; on a shared one only ours (`pid`).
        """
        ours = f"{socket.gethostname()}-{pid}-"
        for engine in self.store.run(self.ledger.engines()):
            if (pid is None and self.plan.redis) or (pid is not None and not engine.startswith(ours)):
                continue
            if failed:
                self.store.run(self.ledger.release_dead(engine))
            else:
                held = self.store.run(self.ledger.held_by(engine))
                self.store.run(self.ledger.release(engine, held))
                self.store.run(self.ledger.leave(engine))

    def _look_for_lost_rows(self) -> None:
        """Rows that ended, but whose completions are gone, would be awaited for ever."""
        now = time.monotonic()
        if not self.loader.loaded.complete or now - self.looked < LOOK_S:
            return
        self.looked = now
        with contextlib.suppress(StoreUnavailable):  # the sink's thread decides how long that may last
            run = self.store.run(self.ledger.progress(self.manifest.run))
            if run.ended < run.submitted or self.consumer.lag():
                self.settled_since = None
            elif self.settled_since is None:
                self.settled_since = now
            elif now - self.settled_since > SETTLED_S:
                raise CommandError(
                    f"{len(self.admitted) - self.target.tally.total} rows ended in an earlier run, but are "
                    f"neither in {self.plan.output} nor on the server: --fresh runs everything again"
                )

    def _snapshot(self) -> Snapshot:
        tally, complete = self.target.tally, self.loader.loaded.complete
        state = ""
        if tally.total == self.before.total and not self._complete():
            state = "engine starting" if self.engine.started else "reading input"
        return Snapshot(
            done=tally.total,
            failed=tally.failed,
            total=len(self.admitted) if complete else None,
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            completion_tokens=tally.completion_tokens,
            state=state,
        )

    def _report(self) -> Outcome:
        snapshot, complete = self._snapshot(), self._complete()
        if complete:
            if not self.engine.started:
                self.progress.say("nothing was left to run")
            self.progress.close()
            made = snapshot.completion_tokens - self.before.completion_tokens
            seconds = time.monotonic() - self.started
            print(summary(self.target.tally.rows, snapshot, made, seconds))
            print(f"written to {self.plan.output}; the engine's log is {self.engine.log}")
        else:
            self.progress.say(
                f"stopped: {snapshot.done:,} rows are in {self.plan.output}; the same command continues"
            )
        return Outcome(complete, snapshot.failed)


def _forget(plan: RunPlan, workdir: Workdir, settings: Settings) -> None:
    """--fresh: the output, the working folder and what an outside server knows of the run."""
    try:
        last = workdir.previous()
    except CommandError:
        last = None
    if last is not None and plan.redis:
        store = Store(connect(plan.redis, settings.allow_volatile))
        store.run(Ledger(last.lane).forget_run(last.run))
        store.close()
    workdir.remove(plan.error_file)
