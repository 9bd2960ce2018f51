"""What a long-lived process does while its server is away: wait a little longer each time, then give up.

Used by loaders and sinks, whose calls may all be made again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass

from headrace.errors import StoreError

log = logging.getLogger("headrace.patience")

#: First and longest pause between attempts, in seconds. With the 2 s to connect, work goes on within 5 s of
#: the server's return.
FIRST_S, LONGEST_S = 0.1, 2.0


@dataclass(slots=True)
class Patience:
    """One per loop. `limit_s`: how long an outage may last; infinity for processes that never give up."""

    limit_s: float
    _since: float | None = None
    _pause: float = FIRST_S

    def wait(self, error: StoreError, stop: threading.Event) -> None:
        """Sleep before the next attempt, or until `stop`. Raises `error` once the limit is passed."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            log.warning("outage_began cause=%s", error)
        if now - self._since > self.limit_s:
            raise error
        stop.wait(self._pause * random.uniform(0.5, 1))
        self._pause = min(self._pause * 2, LONGEST_S)

    def over(self) -> None:
        """The server answered."""
        if self._since is not None:
            log.warning("outage_ended seconds=%.1f", time.monotonic() - self._since)
            self._since, self._pause = None, FIRST_S
