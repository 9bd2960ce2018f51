"""How long an output will be: a guess for each run, learned from what has ended; max_tokens is the prior.

Rows of a run that ask for different max_tokens are different tasks and are learned apart.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.request import FinishReason, Request

#: Outputs that the prior counts for, and those that are remembered.
PRIOR, MEMORY = 8, 256
#: Runs that are remembered, the latest used ones.
RUNS = 4096


class Lengths:
    """Moving averages of output lengths."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()  # (number, mean)

    def expected(self, request: Request) -> int:
        """Output tokens, at least 1 and at most max_tokens. A score row has none and counts as 1."""
        sampling = request.sampling
        if sampling.score_from is not None:
            return 1
        most = sampling.max_tokens
        number, mean = self._seen.get((request.run, most), (0, 0.0))
        return max(1, sampling.min_tokens, round((PRIOR * most + number * mean) / (PRIOR + number)))

    def learn(self, request: Request) -> None:
        """A request has ended by itself."""
        if request.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        if request.sampling.score_from is not None:
            return
        key = (request.run, request.sampling.max_tokens)
        number, mean = self._seen.pop(key, (0, 0.0))
        number = min(number + 1, MEMORY)
        self._seen[key] = (number, mean + (len(request.output) - mean) / number)
        if len(self._seen) > RUNS:
            self._seen.popitem(last=False)
