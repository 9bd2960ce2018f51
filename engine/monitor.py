"""The watcher of one running row: turns its tokens into text and ends it at a stop string.

Joins `engine.detokenizer` and `engine.stops` behind the core's `Monitor` protocol; a row has one only
where its text matters before it ends. Knows nothing of jobs beyond their sampling parameters.
"""

from __future__ import annotations

from engine.detokenizer import Detokenizer
from engine.stops import StopMatcher
from engine.tokenizer import Tokenizer
from headrace.messages import SamplingParams


class TextMonitor:
    """A running row's text: ends the row at the first stop string. Implements `engine.request.Monitor`.

    A stop string must end in text that comes after the first `min_tokens` tokens.
    """

    __slots__ = ("_count", "_matcher", "_min_tokens", "_stream")

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: list[int] | None) -> None:
        """`prompt`: the ids that the text continues; None where it stands alone (chat)."""
        self._stream = Detokenizer(tokenizer, skip_special=params.skip_special_tokens, after=prompt)
        self._matcher = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._count = 0

    def push(self, token_id: int) -> bool:
        self._count += 1
        return self._matcher.push(self._stream.push(token_id), armed=self._count > self._min_tokens)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the row."""
        return self._matcher.stop

    @property
    def text(self) -> str:
        """All text so far; cut at the stop string once there is one."""
        return self._matcher.text

    def delta(self) -> str:
        """Text that may be shown since the last call: what could still become a stop string is held back."""
        return self._matcher.take()
