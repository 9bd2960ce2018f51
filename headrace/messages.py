"""What travels: `Job` in, `Completion` out. Validated, versioned, JSON bytes by orjson.

Field names follow the OpenAI API where it has one and vLLM where it does not. The same checks run
where a job is submitted and again where it is leased, because anyone may write to a stream. This file
knows nothing of Redis; `docs/wire.md` describes the same fields for other languages.
"""

from __future__ import annotations

import hashlib
import math
from enum import StrEnum
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from headrace.errors import InvalidJob

#: Version of the job and completion envelopes.
VERSION = 1
#: Largest job, in bytes of JSON.
MAX_JOB_BYTES = 1 << 20
#: Largest `meta`, in bytes of JSON.
MAX_META_BYTES = 16 << 10
#: Ceilings on client-supplied numbers.
MAX_N = 64
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 24
MAX_MESSAGES = 4096

#: Job ids, run names, lane names and result stream names: safe in keys, file names and logs.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"text holds a lone surrogate at character {e.start}, which is not valid Unicode"
        ) from None
    return text


def _given(text: str) -> str:
    if not text:
        raise ValueError("text is empty")
    return text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[StrictStr, AfterValidator(_encodable)]
GivenText = Annotated[Text, AfterValidator(_given)]
Number = Annotated[float, Field(strict=True), AfterValidator(_finite)]  # ints pass, strings and bools do not
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class Kind(StrEnum):
    """What a job asks for."""

    CHAT = "chat"
    COMPLETION = "completion"
    SCORE = "score"


class Priority(StrEnum):
    """Streams of one lane, most urgent first."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BULK = "bulk"


class Status(StrEnum):
    """How a job ended."""

    OK = "ok"
    ERROR = "error"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DEAD = "dead"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingParams(_Strict):
    """How completions are drawn. Ceilings are checked here, the model's own limits by the engine."""

    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)] | None = None
    """None: as many as the context holds for chat, 16 for completions."""
    min_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS)] = 0
    temperature: Annotated[Number, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 31)] = 0
    """0 and -1 mean off."""
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIAS
    )
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] = 1
    stop: list[Annotated[GivenText, Field(max_length=MAX_STOP_CHARS)]] = Field(
        default_factory=list, max_length=MAX_STOP_STRINGS
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """None: off; 0: of the sampled token only; n: the n best as well."""
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    skip_special_tokens: StrictBool = True
    include_stop_str_in_output: StrictBool = False
    return_token_ids: StrictBool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_keys(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, dict):
            value = {str(k): v for k, v in value.items()}
            for k in value:
                if not k.isascii() or not k.isdigit() or int(k) >= 1 << 31:
                    raise ValueError(f"logit_bias key {k[:32]!r} is not a token id")
        return value

    @model_validator(mode="after")
    def _min_below_max(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        return self


class TextPart(_Strict):
    """One part of a message's content, in OpenAI's list form."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Annotated[StrictStr, Field(pattern=r"^[a-z_]{1,32}$")]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[Text, Field(max_length=256)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class Job(_Strict):
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
_TRANSPORT = {"id", "enqueued", "reply_to", "traceparent", "priority", "deadline"}


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


def readable(e: ValidationError) -> str:
    """The first problems of a pydantic error as one line: `params.n: Input should be ... (got 0)`."""
    lines = []
    for err in e.errors(include_url=False)[:3]:
        where = ".".join(str(p) for p in err["loc"] if not str(p).startswith(("constrained-", "function-")))
        got = err.get("input")
        hidden = isinstance(got, (dict, list)) or err["type"] == "missing"
        shown = "" if hidden else f" (got {str(got)[:60]!r})"
        message = err["msg"].removeprefix("Value error, ")
        if err["type"] == "extra_forbidden":
            message, shown = "unknown field", ""
        lines.append(f"{where}: {message}{shown}" if where else message)
    return "; ".join(lines).encode("utf-8", "replace").decode()


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
