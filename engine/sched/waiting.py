"""The waiting queue: lower priority number first; within one, preempted rows, then a line of new requests.

Knows nothing of blocks or budgets. Every operation costs O(1) in the number of requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from engine.request import Request


class Line(Protocol):
    """New requests of one priority."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they should run. The line must not change meanwhile."""
        ...

    def add(self, request: Request) -> None: ...

    def remove(self, request: Request) -> bool:
        """Take one out from wherever it stands; False when it is not here."""
        ...


class Fifo:
    """A line in which the first to come goes first."""

    def __init__(self) -> None:
        # An OrderedDict, because a plain dict walks over all the holes at its front each time its first
        # entry is asked for.
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def add(self, request: Request) -> None:
        self._requests[request.id] = request

    def remove(self, request: Request) -> bool:
        return self._requests.pop(request.id, None) is not None


class Waiting:
    """Requests that have no row. `line` makes the line of a priority that was not seen before."""

    def __init__(self, line: Callable[[], Line] = Fifo) -> None:
        self._line = line
        self._lines: dict[int, tuple[OrderedDict[str, Request], Line]] = {}  # (preempted rows, new requests)

    def __len__(self) -> int:
        return sum(len(preempted) + len(line) for preempted, line in self._lines.values())

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they should run. The queue must not change meanwhile."""
        for priority in sorted(self._lines):
            preempted, line = self._lines[priority]
            yield from preempted.values()
            yield from line

    def add(self, request: Request) -> None:
        """A new request joins the line of its priority."""
        self._of(request.priority)[1].add(request)

    def resume(self, request: Request) -> None:
        """A preempted row goes before all of its priority: before those preempted earlier as well, which
        were newer than it."""
        preempted, _ = self._of(request.priority)
        preempted[request.id] = request
        preempted.move_to_end(request.id, last=False)

    def remove(self, request: Request) -> bool:
        """Take one out from wherever it stands; False when it is not here."""
        preempted, line = self._of(request.priority)
        return preempted.pop(request.id, None) is not None or line.remove(request)

    def _of(self, priority: int) -> tuple[OrderedDict[str, Request], Line]:
        if priority not in self._lines:
            self._lines[priority] = (OrderedDict(), self._line())
        return self._lines[priority]
