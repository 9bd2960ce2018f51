"""The consumer loop that all sinks share, and the protocol a store keeps to be one.

read -> write -> commit -> acknowledge, in this order and no other: an entry is acknowledged only once
its row is durable, and a row that is durable already is not written again (the store knows job ids),
so a crash between any two of the steps neither loses nor doubles a row. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from headrace.messages import Completion, Status


@dataclass(slots=True)
class Tally:
    """Rows by status and their tokens."""

    rows: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, completion: Completion) -> None:
        usage = completion.usage
        self.count(completion.status, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def count(self, status: Status, prompt: int, cached: int, completed: int) -> None:
        self.rows[status.value] = self.rows.get(status.value, 0) + 1
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completed

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @property
    def ok(self) -> int:
        return self.rows.get(Status.OK.value, 0)

    @property
    def failed(self) -> int:
        return self.total - self.ok


class Target(Protocol):
    """A store of rows. Every method raises SinkError where the store cannot be written."""

    tally: Tally
    """Of everything that is committed, earlier passes included."""

    def recover(self) -> None:
        """Take the store over and undo what an earlier process left half done; before the first write."""
        ...

    def write(self, batch: list[Completion]) -> None:
        """Stage completions; those whose job id is in the store already, or staged, are passed over."""
        ...

    def commit(self) -> None:
        """Make what was staged durable: all of it, or none of it and SinkError."""
        ...

    def close(self) -> None: ...
