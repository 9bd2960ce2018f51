"""Stop strings: found in the text as it grows, whatever the tokens' borders are.

Pure text: knows nothing of tokens or requests. The match that ends first wins, and of several that end
at the same character the longest; so the result depends on the text alone and not on how it was cut
into tokens. Sits between `engine.detokenizer` and `engine.text`.

Cost of a push: one `startswith` per new character and per stop string that ends in that character, on a
window as long as the longest stop string.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class StopMatcher:
    """Collects text and cuts it before (or after, with `include`) the first stop string.

    `stops`: non-empty strings. `stop` is the one that matched, None so far.
    """

    __slots__ = (
        "_by_last", "_first", "_include", "_parts", "_reach", "_size", "_sorted", "_tail", "_taken", "stop",
    )  # fmt: skip

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stop: str | None = None
        self._include = include
        self._sorted = sorted(set(stops))
        self._first = {s[0] for s in self._sorted}
        self._reach = max(map(len, self._sorted), default=0) - 1  # characters that a match may reach back
        self._by_last: dict[str, list[str]] = {}
        for s in sorted(self._sorted, key=len, reverse=True):
            self._by_last.setdefault(s[-1], []).append(s)
        self._parts: list[str] = []
        self._size = 0
        self._tail = ""
        self._taken = 0  # parts that `take` has given out

    @property
    def text(self) -> str:
        """All text so far; after a match, only what is kept."""
        return "".join(self._parts)

    def push(self, text: str, *, armed: bool = True) -> bool:
        """Add text; True when a stop string ends in it. Unarmed text (below min_tokens) cannot end one."""
        if self.stop is not None or not text:
            return self.stop is not None
        window = self._tail + text
        self._parts.append(text)
        self._size += len(text)
        if armed:
            for end in range(len(self._tail) + 1, len(window) + 1):
                for s in self._by_last.get(window[end - 1], ()):
                    if len(s) <= end and window.startswith(s, end - len(s)):
                        self._cut(s, self._size - len(window) + end)
                        return True
        self._tail = window[-self._reach :] if self._reach > 0 else ""
        return False

    def take(self) -> str:
        """The text that may be shown by now and was not taken before."""
        new = "".join(self._parts[self._taken :])
        safe = len(new) - self.held()
        self._parts[self._taken :] = [new[:safe], new[safe:]]
        self._taken += 1
        return new[:safe]

    def held(self) -> int:
        """How many of the last characters may yet turn out to be a stop string, and must not be shown."""
        if self.stop is not None:
            return 0
        for start, char in enumerate(self._tail):
            if char in self._first:
                suffix = self._tail[start:]
                # The sorted list keeps all strings that begin with the suffix together, from here on.
                at = bisect_left(self._sorted, suffix)
                if at < len(self._sorted) and self._sorted[at].startswith(suffix):
                    return len(suffix)
        return 0

    def _cut(self, stop: str, end: int) -> None:
        self.stop = stop
        taken = sum(map(len, self._parts[: self._taken]))
        kept = "".join(self._parts)[: end if self._include else end - len(stop)]
        self._parts = [kept[:taken], kept[taken:]]
        self._taken = 1
