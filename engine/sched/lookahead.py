"""The waiting line of an engine that looks ahead: it starts requests in the order of `engine.sched.plan`.

It plans over a window of the oldest requests, so that memory and time stay bounded whatever waits behind
them. Unfairness is bounded too: a request is overtaken by at most `bound` later ones. One line serves one
priority; `engine.sched.waiting` puts them in order.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain

from engine.request import Request
from engine.sched.lengths import Lengths
from engine.sched.plan import Machine, arrange
from engine.sched.radix import Pending

#: A request may be overtaken by this many times the look-ahead. In a window that is kept full, the average
#: request waits while as many start as the window holds, so a bound near one would undo the plan.
UNFAIRNESS = 4
#: The window is planned anew when a part of it has started: one in this many.
PART = 4
#: Requests that started last, whose prefixes a new plan continues: more than the kinds that a plan mixes.
WARM = 8


class Lookahead:
    """Implements `engine.sched.waiting.Line`."""

    def __init__(
        self, ahead: int, machine: Machine, lengths: Lengths, salt_of: Callable[[Request], bytes]
    ) -> None:
        """`ahead`: requests to look at beyond those that could start at once; `salt_of` keeps prompts apart
        that share no blocks even where they are equal."""
        self.bound = UNFAIRNESS * ahead
        self._size = ahead + machine.rows
        self._machine, self._lengths, self._salt_of = machine, lengths, salt_of
        self._window: OrderedDict[str, Pending] = OrderedDict()  # both in order of arrival
        self._behind: OrderedDict[str, Pending] = OrderedDict()
        self._order: deque[Pending] = deque()  # the plan; entries may be gone
        self._fresh: list[Pending] = []  # in the window and not in the plan; entries may be gone
        self._started: deque[Pending] = deque(maxlen=WARM)
        self._tickets = self._taken = self._plan_again_at = 0

    def __len__(self) -> int:
        return len(self._window) + len(self._behind)

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they should start. The line must not change meanwhile."""
        self._plan_if_due()
        # One pass may start as many as there are rows before anyone looks here again.
        overtaken = self._overtaken(self.bound - self._machine.rows)
        yield from (p.request for p in overtaken)
        passed = set(overtaken)
        for p in chain(self._order, self._fresh, self._behind.values()):
            if not p.gone and p not in passed:
                yield p.request

    def add(self, request: Request) -> None:
        self._behind[request.id] = Pending(request, self._tickets)
        self._tickets += 1
        self._fill_window()

    def remove(self, request: Request) -> bool:
        """It starts, or was cancelled; False when it is not here."""
        p = self._window.pop(request.id, None) or self._behind.pop(request.id, None)
        if p is None:
            return False
        p.gone = True
        self._taken += 1
        self._started.append(p)
        self._fill_window()
        return True

    def _fill_window(self) -> None:
        while self._behind and len(self._window) < self._size:
            request_id, p = self._behind.popitem(last=False)
            self._window[request_id] = p
            self._fresh.append(p)

    def _plan_if_due(self) -> None:
        while self._order and self._order[0].gone:
            self._order.popleft()
        planned = len(self._window) - len(self._fresh)
        short = self._fresh and planned < self._machine.rows
        if not short and self._taken < self._plan_again_at:
            return
        self._plan_again_at = self._taken + -(-len(self._window) // PART)
        self._fresh = []
        pending = list(self._window.values())
        for p in pending:
            if not p.words:
                p.words = array("I", p.request.prompt).tobytes()
                p.salt = self._salt_of(p.request)
            p.expected = self._lengths.expected(p.request)
        first = self._overtaken(self.bound // 2)
        late = set(first)
        order = arrange([p for p in pending if p not in late], self._machine, self._started)
        self._order = deque(first + order)

    def _overtaken(self, times: int) -> list[Pending]:
        """Those that at least `times` later ones have overtaken, oldest first.

        Of the rows taken so far, all but (ticket - older ones that still wait) came after this one.
        """
        out: list[Pending] = []
        for older, p in enumerate(self._window.values()):
            if self._taken - p.ticket + older < times:
                break  # and so are all younger ones
            out.append(p)
        return out
