"""The one and only end of a job: `Completion` and its parts.

What an engine writes and a sink reads, so unknown fields are passed over: a sink may be older than the
engine. Knows nothing of Redis.
"""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import BaseModel, Field

from headrace.fields import VERSION, Kind, Status


class TokenLogprob(BaseModel):
    """Log-probability (natural) of one token at its position, and of the best alternatives there."""

    token_id: int
    token: str | None = None
    logprob: float
    rank: int
    top: list[tuple[int, str | None, float]] = Field(default_factory=list)  # (id, text, logprob), best first


class Choice(BaseModel):
    """One of the `n` answers of a job; kind score has one, without text."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = Field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None
    """kind score: sum of the continuation's log-probabilities."""
    is_greedy: bool | None = None
    """kind score: every continuation token was the most probable one."""


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class ErrorInfo(BaseModel):
    """Why a job did not end ok."""

    code: str
    message: str


class Timings(BaseModel):
    """Unix seconds; None where it did not happen."""

    enqueued: float | None = None
    leased: float | None = None
    first_token: float | None = None
    finished: float | None = None


class Completion(BaseModel):
    """The one and only end of a job."""

    v: int = VERSION
    id: str
    run: str
    lane: str
    kind: Kind | None = None
    status: Status
    choices: list[Choice] = Field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One entry per prompt token; the first is None."""
    usage: Usage = Field(default_factory=Usage)
    error: ErrorInfo | None = None
    attempts: int = 1
    timings: Timings = Field(default_factory=Timings)
    engine: str = ""
    model: str = ""
    reply_to: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"v": self.v})

    @classmethod
    def parse(cls, raw: bytes) -> Completion:
        return cls.model_validate(orjson.loads(raw))
