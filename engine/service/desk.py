"""What the four threads of an engine share: the core, the held jobs, the store, and the signals between them.

Each field has one writer, named beside it; everything else is thread-safe by itself.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.engine import Engine
from engine.service.clock import ServerClock
from engine.service.held import Held, HeldJobs
from engine.service.jobs import Jobs
from engine.service.spool import Spool
from headrace.ledger import Ledger
from headrace.settings import Settings
from headrace.store import Store


@dataclass(slots=True, eq=False)
class Desk:
    """One engine's shared state."""

    id: str  # unique to this boot: the fence of all its leases
    config: EngineConfig
    settings: Settings
    engine: Engine
    jobs: Jobs
    ledger: Ledger
    store: Store
    spool: Spool | None = None
    """None where no folder for it can be used."""
    held: HeldJobs = field(default_factory=HeldJobs)
    done: queue.SimpleQueue[Held | None] = field(default_factory=queue.SimpleQueue)
    """Jobs to commit; None after the last one."""
    wake: threading.Event = field(default_factory=threading.Event)
    """There is work for the step loop."""
    freed: threading.Event = field(default_factory=threading.Event)
    """There is room for the intake."""
    draining: threading.Event = field(default_factory=threading.Event)
    """No more intake."""
    hurry: threading.Event = field(default_factory=threading.Event)
    """Hand back what runs."""
    closed: threading.Event = field(default_factory=threading.Event)
    """The ranks are gone; the keeper ends."""
    state: str = "loading"  # the step thread's
    committed: int = 0  # the commit thread's
    full: dict[str | None, frozenset[str]] = field(default_factory=dict)
    """Result streams at their bound, with the runs that write to them: the commit thread adds, the intake
    removes."""

    @property
    def clock(self) -> ServerClock:
        return self.jobs.clock
