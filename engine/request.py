"""One sequence as the core sees it: token ids, how many of them are computed, and how to sample.

The core knows nothing of text or queues. Whoever submits a request may attach a `monitor` that looks
at each new token and ends the row (stop strings are built that way, in `engine.text`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class FinishReason(StrEnum):
    """Why a row ended, in OpenAI's words where it has one."""

    STOP = "stop"  # EOS, stop token id or stop string
    LENGTH = "length"  # max_tokens or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token of a row is chosen. Checked where jobs are validated; ranks trust it.

    Order, as in vLLM: logprobs are taken from the raw logits; then logit_bias, min_tokens (masks stop
    ids), penalties, temperature, min_p, top_k, top_p, and the Gumbel-max draw keyed by (seed, position).
    """

    max_tokens: int = 16
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0  # always set: 63 bits; a job without one gets a hash of its id, so a retry repeats it
    stop_token_ids: tuple[int, ...] = ()  # EOS ids included unless ignore_eos
    min_tokens: int = 0
    logprobs: int | None = None  # None: off; 0: the sampled token's only; n: the n best as well
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    #: kind "score": index of the first scored prompt token (>= 1). No token is generated.
    score_from: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that a greedy row costs a few bytes."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if value != default:
                out[f.name] = value
        return out

    @classmethod
    def from_wire(cls, raw: dict[str, Any]) -> Sampling:
        raw = dict(raw)
        if "stop_token_ids" in raw:
            raw["stop_token_ids"] = tuple(raw["stop_token_ids"])
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token that stands there, and of the best ones.

    `rank` counts from 1 (1 means the token was the most probable one).
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class Monitor(Protocol):
    """Looks at each new token of a row; lives on the driver."""

    def push(self, token_id: int) -> bool:
        """Take one new token; True ends the row with reason `stop`.

        A stop token id that ends the row is not pushed: it is no text. An exception ends this row alone,
        with reason `error`.
        """
        ...


@dataclass(slots=True, eq=False)
class Request:
    """A sequence on its way through the scheduler, which owns everything below the line.

    A stop token id that ended the row stays the last token of `output`, as in vLLM; whoever makes text of
    it hides it.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    monitor: Monitor | None = None
    salt: bytes = b""  # isolates the prefix cache (per tenant); empty shares it
    priority: int = 0  # lower runs first
    run: str = ""  # requests of one run are expected to have outputs of like length
    on_token: Any = None  # optional callable(request, token_id), for streaming; sees stop token ids too
    arrival: float = 0.0  # time.monotonic() at submit; set by the engine

    # -- owned by the scheduler ------------------------------------------------------------------
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per output token
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by prompt position
    seq: int = -1  # order of first start; together with the priority it decides who is preempted
    computed: int = 0  # tokens whose keys and values are in its blocks (or will be, by plans sent)
    pending: int = 0  # tokens that plans sent will sample and whose results are not known yet
    cached: int = 0  # prompt tokens that the prefix cache held at first admission
    row: int = -1  # the worker's permanent row while running, -1 otherwise
    blocks: list[int] = field(default_factory=list)
    chain: Any = None  # engine.sched.prefix.Chain, where prefixes are cached
    preemptions: int = 0
    finish: FinishReason | None = None
    error: tuple[str, str] | None = None  # (code, message) where finish is ERROR
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens known: prompt and output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def limit(self) -> int:
        """Tokens at which the row ends: prompt and max_tokens; a score row never gets there."""
        extra = self.sampling.max_tokens if self.sampling.score_from is None else 1
        return len(self.prompt) + extra
