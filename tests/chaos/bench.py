"""A lane on a server of its own and the engine processes that serve it, for tests of the service."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.messages import Completion
from headrace.runs import RunProgress
from headrace.store import Store
from tests.chaos.parts import EngineProcess, Server, job, wait_for

LANE = "l"


@dataclass
class Bench:
    server: Server
    folder: Path
    engines: list[EngineProcess] = field(default_factory=list)

    def engine(self, *flags: str, url: str | None = None) -> EngineProcess:
        made = EngineProcess(url or self.server.url, LANE, self.folder, flags, f"engine{len(self.engines)}")
        made.start()
        self.engines.append(made)
        made.wait_ready()
        return made

    def submit(self, n: int, *, steps: int = 20, first: int = 0, **fields: object) -> list[str]:
        with_store = self.store()
        jobs = [job(f"j{i}", LANE, steps=steps, **fields) for i in range(first, first + n)]
        states = with_store.run(Ledger(LANE).submit(jobs, 100_000))
        with_store.close()
        return states

    def progress(self) -> RunProgress:
        store = self.store()
        try:
            return store.run(Ledger(LANE).progress("r"))
        finally:
            store.close()

    def wait_ended(self, n: int, seconds: float = 60) -> RunProgress:
        def ended() -> bool:
            try:
                return self.progress().ended >= n
            except StoreError:
                return False

        wait_for(ended, seconds, lambda: "\n" + "\n".join(e.said()[-1500:] for e in self.engines))
        return self.progress()

    def completions(self) -> list[Completion]:
        """All of the default result stream."""
        raw = self.server.client.xrange(Ledger(LANE).keys.results(None))
        return [Completion.parse(fields[b"m"]) for _, fields in raw]

    def counts(self) -> Counter[str]:
        return Counter(c.id for c in self.completions())

    def store(self) -> Store:
        return Store(connect(self.server.url))

    def close(self) -> None:
        for engine in self.engines:
            engine.kill()
        self.server.stop()

    def log_lines_in(self, engine: EngineProcess, seconds: float) -> int:
        before = len(engine.said().splitlines())
        time.sleep(seconds)
        return len(engine.said().splitlines()) - before
