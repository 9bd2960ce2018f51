"""The jobs that this engine holds: leased, not yet committed. Book-keeping only; knows no Redis and no torch.

One job is one to `n` requests of the core; it is ready to commit when the last of them ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.request import Request
from headrace.messages import Completion, Job, Status

if TYPE_CHECKING:
    from engine.text import Prepared
    from headrace.ledger import Leased


@dataclass(slots=True, eq=False)
class Held:
    """A leased job on its way to its completion."""

    leased: Leased
    leased_at: float  # unix seconds
    job: Job | None = None
    prepared: Prepared | None = None
    unfinished: int = 0
    completion: Completion | None = None  # set where the job ended without the core (bad input, dead)
    newer: bool = False  # of a version that this engine cannot read
    stopped: Status | None = None  # why the keeper cancelled its requests: cancelled or expired

    @property
    def started(self) -> bool:
        """Whether one of its requests has run."""
        return self.prepared is not None and any(r.seq >= 0 for r in self.prepared.requests)

    @property
    def entry(self) -> tuple[str, str]:
        return self.leased.stream, self.leased.entry_id


class HeldJobs:
    """All held jobs, by stream entry and by request. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], Held] = {}
        self._by_request: dict[str, Held] = {}
        self._requests = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def requests(self) -> int:
        """Unfinished requests of all held jobs."""
        return self._requests

    def add(self, held: Held) -> bool:
        """False where the entry is held already (a lease that ran out and came back to us)."""
        with self._lock:
            if held.entry in self._jobs:
                return False
            self._jobs[held.entry] = held
            return True

    def started(self, held: Held, requests: Iterable[Request]) -> None:
        with self._lock:
            for r in requests:
                self._by_request[r.id] = held
                held.unfinished += 1
                self._requests += 1

    def finished(self, request: Request) -> Held | None:
        """The job whose last request this was, else None."""
        with self._lock:
            held = self._by_request.pop(request.id, None)
            if held is None:
                return None
            self._requests -= 1
            held.unfinished -= 1
            return held if held.unfinished == 0 else None

    def requests_of(self, held: Held) -> list[str]:
        """Ids of the job's requests that still run."""
        with self._lock:
            return [rid for rid, h in self._by_request.items() if h is held]

    def drop(self, held: Held) -> list[str]:
        """Forget a job; returns the ids of its requests that still run."""
        with self._lock:
            self._jobs.pop(held.entry, None)
            ids = [rid for rid, h in self._by_request.items() if h is held] if held.unfinished else []
            for rid in ids:
                del self._by_request[rid]
            self._requests -= len(ids)
            held.unfinished = 0
            return ids

    def all(self) -> list[Held]:
        with self._lock:
            return list(self._jobs.values())
