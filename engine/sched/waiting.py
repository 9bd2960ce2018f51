"""The waiting queue: lower priority number first; within one, preempted rows, then first come.

Knows nothing of blocks or budgets. Every operation costs O(1) in the number of requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from engine.request import Request


class Waiting:
    """Requests that have no row."""

    def __init__(self) -> None:
        #: (priority, False for preempted rows) -> requests in order. An OrderedDict, because a plain dict
        #: walks over all the holes at its front each time its first entry is asked for.
        self._queues: dict[tuple[int, bool], OrderedDict[str, Request]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they should run. The queue must not change meanwhile."""
        for key in sorted(self._queues):
            yield from self._queues[key].values()

    def add(self, request: Request) -> None:
        """A new request goes behind all of its priority."""
        self._queue(request.priority, True)[request.id] = request

    def resume(self, request: Request) -> None:
        """A preempted row goes before all of its priority: before those preempted earlier as well, which
        were newer than it."""
        queue = self._queue(request.priority, False)
        queue[request.id] = request
        queue.move_to_end(request.id, last=False)

    def remove(self, request: Request) -> bool:
        """Take one out from wherever it stands; False when it is not here."""
        for fresh in (True, False):
            key = (request.priority, fresh)
            queue = self._queues.get(key)
            if queue and queue.pop(request.id, None):
                if not queue:
                    del self._queues[key]
                return True
        return False

    def _queue(self, priority: int, fresh: bool) -> OrderedDict[str, Request]:
        return self._queues.setdefault((priority, fresh), OrderedDict())
