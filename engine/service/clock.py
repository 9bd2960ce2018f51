"""The server's time, as this engine knows it: what deadlines are judged by.

An engine's own clock may be wrong or step; its monotonic one may not. Each heartbeat's reply says what time
it is at the server, for all engines and producers the same.
"""

from __future__ import annotations

import time


class ServerClock:
    """Until the first heartbeat was answered, this machine's time."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def heard(self, server_time: float) -> None:
        self._ahead = server_time - time.monotonic()

    def now(self) -> float:
        """Unix seconds."""
        return time.monotonic() + self._ahead
