"""What travels: `Job` in, `Completion` out. Validated, versioned, JSON bytes by orjson.

Field names follow the OpenAI API where it has one and vLLM where it does not. The same checks run
where a job is submitted and again where it is leased, because anyone may write to a stream. This file
holds the job and gives all names of the contract; it knows nothing of Redis. `docs/wire.md` describes
the same fields for other languages.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, StrictStr, ValidationError, model_validator

from headrace.completion import Choice, Completion, ErrorInfo, Timings, TokenLogprob, Usage
from headrace.errors import InvalidJob
from headrace.fields import (
    NAME_PATTERN,
    VERSION,
    GivenText,
    Kind,
    Name,
    Number,
    Priority,
    Status,
    Strict,
    Text,
    TokenId,
    readable,
)
from headrace.sampling import SamplingParams

__all__ = [
    "MAX_JOB_BYTES",
    "NAME_PATTERN",
    "VERSION",
    "Choice",
    "Completion",
    "ErrorInfo",
    "Job",
    "Kind",
    "Message",
    "Priority",
    "SamplingParams",
    "Status",
    "TextPart",
    "Timings",
    "TokenLogprob",
    "Usage",
    "job_id",
    "readable",
]

#: Largest job, in bytes of JSON.
MAX_JOB_BYTES = 1 << 20
#: Largest `meta`, in bytes of JSON.
MAX_META_BYTES = 16 << 10
MAX_MESSAGES = 4096


class TextPart(Strict):
    """One part of a message's content, in OpenAI's list form."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Annotated[StrictStr, Field(pattern=r"^[a-z_]{1,32}$")]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[Text, Field(max_length=256)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class Job(Strict):
    """One prompt to run. Exactly one of `messages`, `prompt`, `prompt_token_ids` is given.

    Raises InvalidJob from `Job.parse` and `Job.build`; `id` names the job for ever.
    """

    v: Literal[1] = 1
    id: Name
    run: Name
    lane: Name
    kind: Kind
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt: GivenText | None = None
    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    continuation: GivenText | None = None
    """kind score: the text whose log-likelihood after the prompt is asked for."""
    continuation_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    params: SamplingParams = Field(default_factory=SamplingParams)
    priority: Priority = Priority.NORMAL
    tenant: Name | None = None
    """Whose job it is: tenants share an engine evenly, however many runs or jobs they have."""
    deadline: Number | None = None
    """Unix seconds."""
    reply_to: Name | None = None
    """Name of the result stream; None: the lane's default one."""
    meta: dict[str, Any] = Field(default_factory=dict)
    traceparent: Annotated[StrictStr, Field(max_length=128)] | None = None
    enqueued: Number | None = None
    """Unix seconds at submit, by the submitter's clock; only for reports."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Job:
        given = [k for k in ("messages", "prompt", "prompt_token_ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of messages, prompt, prompt_token_ids (got {', '.join(given) or 'none'})"
            )
        if (self.kind is Kind.CHAT) != (given[0] == "messages"):
            raise ValueError(f"kind {self.kind.value} does not take {given[0]}")
        scored = (self.continuation is not None) + (self.continuation_token_ids is not None)
        if scored != (self.kind is Kind.SCORE):
            raise ValueError("kind score, and no other, takes one of continuation, continuation_token_ids")
        try:
            size = len(orjson.dumps(self.meta))
        except TypeError as e:  # of orjson: surrogates, keys that are no text, 65-bit numbers, deep nesting
            raise ValueError(f"meta cannot be written as JSON: {e}") from None
        if size > MAX_META_BYTES:
            raise ValueError(f"meta of {size} bytes of JSON exceeds the limit of {MAX_META_BYTES}")
        return self

    def to_bytes(self) -> bytes:
        """The stream field. Raises InvalidJob over MAX_JOB_BYTES."""
        raw = orjson.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"v": self.v})
        _check_size(raw)
        return raw

    @classmethod
    def parse(cls, raw: bytes) -> Job:
        """From stream bytes; raises InvalidJob with one readable line."""
        _check_size(raw)
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as e:
            raise InvalidJob(f"job is not valid JSON: {e}", "invalid_json") from None
        if not isinstance(value, dict):
            raise InvalidJob(f"job is a JSON {type(value).__name__}, not an object", "invalid_json")
        return cls.build(value)

    @classmethod
    def build(cls, value: dict[str, Any]) -> Job:
        """From a plain mapping; `id` defaults to a hash of run and content."""
        try:
            if value.get("id") is not None:
                return cls.model_validate(value)
            job = cls.model_validate(value | {"id": "pending"})
        except ValidationError as e:
            raise InvalidJob(readable(e)) from None
        content = job.model_dump(mode="json", exclude_defaults=True, exclude=_TRANSPORT)
        return job.model_copy(update={"id": job_id(job.run, "", content)})


#: Fields that say how a job travels and not what it asks; its default id does not depend on them.
_TRANSPORT = {"id", "enqueued", "reply_to", "traceparent", "priority", "tenant", "deadline"}


def _check_size(raw: bytes) -> None:
    if len(raw) > MAX_JOB_BYTES:
        raise InvalidJob(
            f"job of {len(raw)} bytes exceeds the limit of {MAX_JOB_BYTES}: shorten the prompt",
            "job_too_large",
        )


def job_id(run: str, row_key: str, content: Any) -> str:
    """Default identity: 32 hex characters of a hash over run, row key and content.

    Loading a file twice gives the same ids; a changed row gives another one.
    """
    h = hashlib.blake2b(digest_size=16)
    for part in (run, row_key):
        data = part.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "big") + data)
    h.update(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    return h.hexdigest()
